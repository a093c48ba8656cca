"""A module's tensors as `ExpertWeights`, without keeping anything of the model alive."""

import weakref
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from moe_dispatch.dispatch.borrowed_experts import BorrowedExperts, may_be_held
from moe_dispatch.dispatch.gradients import is_any_recorded
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.integrations.transformers.layout import Layout
from moe_dispatch.numerics import FP8
from moe_dispatch.tensor_memory import address
from moe_dispatch.weight_checks import scales_of_rows

_SCALES: Final = ("gate_up_scale", "down_scale")


class ModuleExperts(BorrowedExperts):
    """The weights of a module, which may store them transposed and scales in other dtypes and shapes."""

    def lend(self, name: str, tensor: Tensor) -> None:
        """See `BorrowedExperts.lend`."""
        super().lend(name, tensor)
        vars(self).pop(f"_{name}_prepared", None)

    def as_indexed(self, name: str, tensor: Tensor) -> Tensor:
        """See `BorrowedExperts.as_indexed`."""
        if name in _SCALES:
            return self.prepared_scale(name, tensor.detach())
        return tensor.transpose(1, 2) if self.transposed and name in ("gate_up", "down") else tensor

    def prepared_scale(self, name: str, stored: Tensor) -> Tensor:
        """A module's scales as kernels read them: themselves, or a small copy, made anew once they may have changed."""
        if self.dtype != "fp8_channel" and stored.dtype == torch.float32:
            return stored
        made: tuple[object, Tensor] | None = vars(self).get(f"_{name}_prepared")
        state = None if changes_unnoticed(stored) else (address(stored), stored._version)
        if made is not None and made[0] == state and state is not None:
            return made[1]
        scale = stored.to(torch.float32)
        if self.dtype == "fp8_channel":
            of_gate_up = name == "gate_up_scale"
            scale = scales_of_rows(
                scale, self.gate_up.shape[1] if of_gate_up else self.K, interleaved=of_gate_up and self.interleaved
            )
        setattr(self, f"_{name}_prepared", (state, scale))
        return scale


class _Kept(NamedTuple):
    """What was built for one state of a module: its layout and each tensor's address, dtype and shape."""

    state: tuple[object, ...]
    sources: tuple["weakref.ref[Tensor]", ...]
    experts: ExpertWeights


# Weak in the module, so that a deleted model takes its entries with it.
_kept: Final["weakref.WeakKeyDictionary[nn.Module, _Kept]"] = weakref.WeakKeyDictionary()


def sources_of(module: nn.Module, layout: Layout) -> tuple[Tensor, ...]:
    """The module's tensors in the layout's order, as its attributes give them now."""
    return tuple(getattr(module, name) for name in layout.tensors)


def records_gradient(sources: Sequence[Tensor]) -> bool:
    """Whether autograd records a product with these weights. FP8 weights have no gradient."""
    return sources[0].dtype != FP8 and is_any_recorded(sources)


def changes_unnoticed(tensor: Tensor) -> bool:
    """Whether a tensor may change while its version stays: FSDP refills it, or inference mode keeps no versions."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed or tensor.is_inference()


def experts_of(module: nn.Module, layout: Layout, sources: tuple[Tensor, ...]) -> ExpertWeights:
    """The module's weights for one call, during which the caller holds `sources`.

    Raises:
        InvalidInputError: The tensors are not what backends can read.
    """
    if records_gradient(sources):
        return _build(ExpertWeights, layout, sources)  # anew: a kept object would keep the graph of a step
    state = (layout, *((address(source), source.dtype, source.shape) for source in sources))
    kept = _kept.get(module)
    known = kept if kept is not None and kept.state == state else None
    if known and all(reference() is source for reference, source in zip(known.sources, sources, strict=True)):
        return known.experts
    plain = tuple(source.detach() for source in sources)
    if not may_be_held():
        return _build(ExpertWeights, layout, plain)
    # The same memory by new tensors is known: expert parallelism takes local ones at every call.
    experts = known.experts if known else _build(ModuleExperts, layout, plain)
    assert isinstance(experts, ModuleExperts)  # noqa: S101 - no others are kept here
    for name, source in zip(_names(sources), sources, strict=True):
        experts.lend(name, source)
    _kept[module] = _Kept(state, tuple(weakref.ref(source) for source in sources), experts)
    return experts


def _build(kind: type[ExpertWeights], layout: Layout, sources: tuple[Tensor, ...]) -> ExpertWeights:
    gate_up, down, *others = as_indexed(layout, sources)
    return kind(
        gate_up,
        down,
        **others_by_name(gate_up, others),
        activation=layout.activation,
        interleaved=layout.interleaved,
        transposed=layout.transposed,
    )


def as_indexed(layout: Layout, sources: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors as `ExpertWeights` takes them: views of transposed weights, and of scales of tensors."""
    gate_up, down, *others = sources
    if layout.scaled_by_tensor:
        others = [scale.flatten(1) for scale in others]
    if layout.transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    return gate_up, down, *others


def others_by_name(gate_up: Tensor, others: Sequence[Tensor]) -> dict[str, Any]:
    """The tensors beside the weights, as `ExpertWeights` names them."""
    kinds = _SCALES if gate_up.dtype == FP8 else ("gate_up_bias", "down_bias")
    return dict(zip(kinds, others, strict=True)) if others else {}


def _names(sources: Sequence[Tensor]) -> tuple[str, ...]:
    return ("gate_up", "down", *others_by_name(sources[0], sources[2:]))
