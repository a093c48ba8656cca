"""A module's tensors as `ExpertWeights`, without keeping anything of the model alive."""

import weakref
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from moe_dispatch.dispatch.borrowed_experts import BorrowedExperts
from moe_dispatch.dispatch.gradients import is_any_recorded
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.integrations.transformers.layout import Layout
from moe_dispatch.numerics import FP8
from moe_dispatch.tensor_memory import address
from moe_dispatch.weight_checks import scales_of_rows

# How often the weights behind a copy may be freed or replaced before the copy is given up: a model moves a few times in
# its life, offloading frees its weights after every call.
_MOST_LOST: Final = 3
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
        state = None if why_untracked((stored,)) else (address(stored), stored._version)
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
    """What was built for one state of a module: its layout and each tensor's address, dtype, shape, maybe version."""

    state: tuple[object, ...]
    sources: tuple["weakref.ref[Tensor]", ...]
    experts: ExpertWeights
    memory: tuple["weakref.ref[torch.UntypedStorage]", ...] = ()


# Weak in the module, so that a deleted model takes its entries with it.
_in_place: Final["weakref.WeakKeyDictionary[nn.Module, _Kept]"] = weakref.WeakKeyDictionary()
_copies: Final["weakref.WeakKeyDictionary[nn.Module, _Kept]"] = weakref.WeakKeyDictionary()
_lost: Final["weakref.WeakKeyDictionary[nn.Module, int]"] = weakref.WeakKeyDictionary()


def sources_of(module: nn.Module, layout: Layout) -> tuple[Tensor, ...]:
    """The module's tensors in the layout's order, as its attributes give them now."""
    return tuple(getattr(module, name) for name in layout.tensors)


def is_straight(layout: Layout, sources: Sequence[Tensor]) -> bool:
    """Whether every backend can read the tensors where they lie."""
    return not layout.transposed and all(source.is_contiguous() for source in sources)


def is_transposed(layout: Layout, sources: Sequence[Tensor]) -> bool:
    """Whether the tensors are stored transposed and are contiguous so, which some backends can read."""
    return layout.transposed and sources[0].dtype != FP8 and all(source.is_contiguous() for source in sources)


def records_gradient(sources: Sequence[Tensor]) -> bool:
    """Whether autograd records a product with these weights. FP8 weights have no gradient."""
    return sources[0].dtype != FP8 and is_any_recorded(sources)


def why_no_copy(module: nn.Module, sources: Sequence[Tensor]) -> str:
    """Why a copy of the tensors could go stale unnoticed or would not last; empty if it can be kept."""
    what = "its weights are stored transposed, or not contiguously, and "
    if records_gradient(sources):
        return f"{what}a gradient is recorded for them: every call would copy them"
    if offloaded(module) or _lost.get(module, 0) >= _MOST_LOST:
        return f"{what}they are freed or replaced between calls (offloading): every call would copy them"
    untracked = why_untracked(sources)
    return f"{what}{untracked}: a copy could be stale" if untracked else ""


def why_untracked(sources: Sequence[Tensor]) -> str:
    """Why the tensors may change without a trace in their versions; empty if they do not."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "torch.distributed is at work, by which FSDP refills weights unnoticed"
    if any(source.is_inference() for source in sources):
        return "they are inference tensors, which do not count their changes"
    return ""


def offloaded(module: nn.Module) -> bool:
    """Whether an accelerate hook of the module itself brings the weights before each call and frees them after it."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(each, "offload", False) for each in (hook, *getattr(hook, "hooks", ())))


def experts_of(module: nn.Module, layout: Layout, sources: tuple[Tensor, ...], *, copied: bool) -> ExpertWeights:
    """The module's weights for one call, during which the caller holds `sources`.

    Args:
        module: The experts module.
        layout: Its layout.
        sources: Its tensors.
        copied: Whether to read a contiguous copy, and not the tensors where they lie.

    Raises:
        InvalidInputError: The tensors are not what backends can read.
    """
    if copied:
        return _copy_of(module, layout, sources)
    if records_gradient(sources):
        return _build(ExpertWeights, layout, sources)  # anew: a kept object would keep the graph of a step
    state = (layout, *((address(source), source.dtype, source.shape) for source in sources))
    kept = _in_place.get(module)
    if kept is None or kept.state != state:
        experts = _build(ModuleExperts, layout, tuple(source.detach() for source in sources))
    elif all(reference() is source for reference, source in zip(kept.sources, sources, strict=True)):
        return kept.experts
    else:
        experts = kept.experts  # the same memory by new tensors: expert parallelism takes local ones at every call
    assert isinstance(experts, ModuleExperts)  # noqa: S101 - no others are kept here
    for name, source in zip(_names(sources), sources, strict=True):
        experts.lend(name, source)
    _in_place[module] = _Kept(state, tuple(weakref.ref(source) for source in sources), experts)
    return experts


def _copy_of(module: nn.Module, layout: Layout, sources: tuple[Tensor, ...]) -> ExpertWeights:
    """The weights as a contiguous copy, kept until a source changes in place, is replaced, or its memory is freed."""
    state = (layout, *((address(source), source._version, source.dtype, source.shape) for source in sources))
    kept = _copies.get(module)
    if kept and not all(reference() is source for reference, source in zip(kept.sources, sources, strict=True)):
        _lost[module] = _lost.get(module, 0) + 1
    elif kept and kept.state == state:
        return kept.experts
    del kept
    _copies.pop(module, None)  # before the new one is made, so that the two do not exist together
    experts = _build(ExpertWeights, layout, tuple(source.detach() for source in sources), copied=True)
    layer = weakref.ref(module)

    def forget(memory: object) -> None:
        module = layer()
        if module is not None and (kept := _copies.get(module)) and memory in kept.memory:
            del _copies[module]
            _lost[module] = _lost.get(module, 0) + 1

    # A storage's Python object lives exactly as long as its memory, whichever tensors refer to it meanwhile.
    memory = tuple(weakref.ref(source.untyped_storage(), forget) for source in sources)
    _copies[module] = _Kept(state, tuple(weakref.ref(source) for source in sources), experts, memory)
    return experts


def _build(
    kind: type[ExpertWeights], layout: Layout, sources: tuple[Tensor, ...], *, copied: bool = False
) -> ExpertWeights:
    gate_up, down, *others = as_indexed(layout, sources)
    if copied:
        gate_up, down, *others = (tensor.contiguous() for tensor in (gate_up, down, *others))
    return kind(
        gate_up,
        down,
        **others_by_name(gate_up, others),
        activation=layout.activation,
        interleaved=layout.interleaved,
        transposed=layout.transposed and not copied,
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
