"""The weights of a layer whose tensors belong to the caller and may be freed or replaced at any time."""

import weakref
from typing import Any

import torch
from torch import Tensor

from moe_dispatch.experts import ExpertWeights
from moe_dispatch.numerics import FP8


def may_be_held() -> bool:
    """Whether a caller's tensors may be referred to weakly between calls.

    Not while modules are converted by swapping their tensors (`torch.__future__`): torch swaps none that has a weak
    reference. A layer is then wrapped anew at each call.
    """
    return not torch.__future__.get_swap_module_params_on_conversion()


def _lent(experts: "BorrowedExperts", attribute: str) -> Tensor | None:
    """The tensor itself; None where the layer has none, or it was freed."""
    held: Tensor | weakref.ref[Tensor] | None = getattr(experts, attribute)
    return held() if isinstance(held, weakref.ref) else held


def _borrowed(name: str) -> Any:
    """An attribute that holds a lent tensor weakly and hands it out without its gradient, as backends index it."""
    attribute = f"_{name}"

    def get(experts: "BorrowedExperts") -> Tensor | None:
        tensor = _lent(experts, attribute)
        if tensor is None:
            return None
        if tensor.requires_grad and (torch.is_grad_enabled() or tensor.dtype == FP8):
            tensor = tensor.detach()  # transformers' FP8 parameters claim to require a gradient
        return experts.as_indexed(name, tensor)

    def put(experts: "BorrowedExperts", tensor: Tensor | None) -> None:
        setattr(experts, attribute, tensor)

    return property(get, put)


class BorrowedExperts(ExpertWeights):
    """Weights that keep no memory of a model that moved, was offloaded, or got other weights.

    Backends keep what they prepare for a layer by its `ExpertWeights`, so one object serves all calls of a layer. It is
    made of aliases without a gradient, and then the tensors themselves are lent to it. Hold those during a call.
    """

    gate_up: Tensor = _borrowed("gate_up")
    down: Tensor = _borrowed("down")
    gate_up_scale: Tensor | None = _borrowed("gate_up_scale")
    down_scale: Tensor | None = _borrowed("down_scale")
    gate_up_bias: Tensor | None = _borrowed("gate_up_bias")
    down_bias: Tensor | None = _borrowed("down_bias")

    def lend(self, name: str, tensor: Tensor) -> None:
        """Hold a tensor weakly from now on, in place of an alias of it."""
        setattr(self, f"_{name}", weakref.ref(tensor))

    @property
    def moved(self) -> bool:
        """See `ExpertWeights.moved`: without views of the lent tensors, which take the host longer than all else.

        Where scales and biases lie is looked at where the object is kept: it is made anew if they are others.
        """
        gate_up, down = _lent(self, "_gate_up"), _lent(self, "_down")
        # One that was freed has no address, and raises as it does in the base class.
        return gate_up.data_ptr() != self.gate_up_address or down.data_ptr() != self.down_address  # type: ignore[union-attr]

    def as_indexed(self, name: str, tensor: Tensor) -> Tensor:  # noqa: ARG002 - for subclasses
        """A lent tensor as backends index it."""
        return tensor
