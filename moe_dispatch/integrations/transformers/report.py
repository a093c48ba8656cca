"""Which layers of a model are dispatched, and why the others are not."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from torch import Tensor, nn

from moe_dispatch.integrations.transformers.register import NAME
from moe_dispatch.tensor_memory import offloaded, tensor_fault

State = Literal["dispatched", "own", "out of reach"]
_BLOCKS: Final = ("MoE", "Moe", "MoEBlock", "MoeBlock")  # how classes of blocks with experts end


@dataclass(frozen=True)
class LayerReport:
    """One layer of experts.

    Attributes:
        name: The module's name in the model.
        state: "dispatched" to `moe_forward`; "own" where it keeps transformers' implementation; "out of reach" where
            its class has no interface for experts, so that nothing registered is ever asked.
        reason: Why it is not dispatched; what to know of it if it is.
    """

    name: str
    kind: str
    state: State
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}): {self.state}" + (f", {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class ModelReport:
    """All layers of experts of a model; prints as one line for each."""

    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.layers)) or "no layers of experts"


def report(model: nn.Module) -> ModelReport:
    """Say of each layer of experts whether it is dispatched, without running the model.

    Layers are inspected and compared with their own forward as at their first call, and the result is kept for that
    call. A layer whose weights are not there (meta tensors, offloaded, sharded) is only inspected.

    Args:
        model: A model of transformers, loaded.
    """
    return ModelReport(tuple(_layers(model)))


def _layers(model: nn.Module) -> Iterator[LayerReport]:
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(outer) for outer in inside):
            continue
        kind = type(module).__name__
        if _asks(module):
            yield LayerReport(name, kind, *_state(module))
        elif any(map(_asks, module.modules())):
            continue  # a model or a block, or what PEFT, FSDP or torch.compile put around a layer
        elif _is_experts(name, module):
            reason = "its class does not take experts_implementation (no use_experts_implementation), so it never asks"
            yield LayerReport(name, kind, "out of reach", reason)
        elif kind.endswith(_BLOCKS) and not any(_is_experts(*each) for each in module.named_modules()):
            yield LayerReport(name, kind, "out of reach", "its experts are no module of their own, so they never ask")
        else:
            continue
        inside.append(f"{name}.")


def _asks(module: nn.Module) -> bool:
    """Whether transformers decorated the module's class. Wrappers hand out their module's attributes as their own."""
    return "is_transposed" in vars(module) and hasattr(type(module), "_apply_gate")


def _is_experts(name: str, module: nn.Module) -> bool:
    """Whether a module holds experts, by its name or its class's."""
    return name.rpartition(".")[2] == "experts" or type(module).__name__.endswith("Experts")


def _state(module: nn.Module) -> tuple[State, str]:
    from moe_dispatch.integrations.transformers.layout import layout_of
    from moe_dispatch.integrations.transformers.takeover import take_over

    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if implementation != NAME:
        return "own", f'the model runs {implementation!r}: call model.set_experts_implementation("{NAME}")'
    layout = layout_of(module)
    if layout.unfit:
        return "own", layout.unfit
    weight = getattr(module, layout.tensors[0])
    if _away(weight) or offloaded(module):
        return "dispatched", "its weights are not loaded or gathered: inspected, not compared with its own forward"
    import torch

    dtype = weight.dtype if weight.dtype.itemsize > 1 else torch.bfloat16
    with torch.no_grad():
        taken = take_over(module, dtype)
    return ("own", taken.reason) if taken.experts is None else ("dispatched", "")


def _away(weight: Tensor) -> bool:
    """Whether a weight is there during calls only, or never: on meta, or sharded, as by FSDP, DeepSpeed and plans."""
    if hasattr(weight, "to_local") or weight.is_meta:
        return True
    return not tensor_fault("it", weight) and (weight.dim() == 1 or weight.untyped_storage().nbytes() == 0)
