"""The short way to a plan, for kinds of call that have run often: one comparison of tensors in place of a dozen."""

from collections.abc import Callable
from typing import Final, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from moe_dispatch.backend import Inputs
from moe_dispatch.dispatch.internals import is_capturing, kind_check
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.layer_spec import LayerSpec

# Kinds of call of one layer kind and shape that are settled, such as inside and outside of inference mode; others go by
# the dispatcher's key.
MOST_KINDS: Final = 4
SETTLING_CALLS: Final = 16  # To settle a plan costs as much as 15 calls of a settled plan save.
_Key = tuple[LayerSpec, torch.Size, str | None]  # the shape of hidden_states; the backend that the caller names


P = TypeVar("P")


class _Settled(NamedTuple, Generic[P]):
    plan: P
    fits: Callable[..., bool]  # of hidden_states, topk_weights, topk_ids


class SettledPlans(Generic[P]):
    """Plans, of a dispatcher or of a layer over ranks, for calls that need no check and no complete key.

    The dispatcher's key asks torch for shape, dtype and device of each tensor, which takes twice as long as all else
    that it does. Here one function in C compares all of that with an earlier call's, and class, strides and
    `requires_grad`. A dispatcher holds its lock where it keeps or forgets a plan; a layer over ranks is called by one
    thread.

    Args:
        on_cuda: Whether calls may be captured in a CUDA graph; the plans of captured calls are others.
    """

    def __init__(self, *, on_cuda: bool) -> None:
        self._on_cuda: Final = on_cuda
        self._plans: dict[_Key, tuple[_Settled[P], ...]] = {}

    def find(
        self, hidden_states: Tensor, experts: ExpertWeights, topk_weights: Tensor, topk_ids: Tensor, backend: str | None
    ) -> P | None:
        """The plan for a call without `out` that needs no gradient; None if none is settled or the call is at fault."""
        try:
            for plan, fits in self._plans.get((experts.spec, hidden_states.shape, backend), ()):
                fit = fits(hidden_states, topk_weights, topk_ids) and not experts.moved
                if fit and not (self._on_cuda and is_capturing()):
                    return plan
        except (AttributeError, RuntimeError, TypeError, ValueError):  # no tensors, or tensors without an address
            pass
        return None

    def keep(self, plan: P, arguments: Inputs, backend: str | None) -> None:
        """Give calls like this one to its plan, which has run it outside of a capture.

        Args:
            plan: The plan.
            arguments: What the caller gave, contiguous where the plan needs that; weights in half precision are
                converted by `Plan.widens`.
            backend: The backend that the caller named.
        """
        hidden_states, experts, *rest = arguments
        key, tensors = (experts.spec, hidden_states.shape, backend), (hidden_states, *rest)
        settled = self._plans.get(key, ())
        known = len(settled) >= MOST_KINDS or any(fits(*tensors) for _, fits in settled)
        if not known and (fits := kind_check(tensors)):
            self._plans[key] = (*settled, _Settled(plan, fits))

    def forget(self, plan: P, spec: LayerSpec, shape: torch.Size, backend: str | None) -> None:
        """Give no further call to a plan."""
        key = spec, shape, backend
        if remaining := tuple(settled for settled in self._plans.pop(key, ()) if settled.plan is not plan):
            self._plans[key] = remaining
