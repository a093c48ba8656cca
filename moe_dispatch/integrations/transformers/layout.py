"""How an experts module stores its weights and what it computes, or why it keeps its own forward."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from moe_dispatch.activations import Activation, allowed
from moe_dispatch.integrations.transformers.gate import GATE_ATTRIBUTES, gate_state, recognise_gate
from moe_dispatch.numerics import FP8
from moe_dispatch.problem import QUANT_BLOCK

LAYOUT: Final = "_moe_dispatch_layout"  # the attribute of a module that keeps its layout

# The options of transformers' decorator that are understood here, `has_post_expert_norm` as one to refuse.
_KNOWN_OPTIONS: Final = frozenset(
    {"experts_interface", "is_concatenated", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm"}
)
# What experts modules hold besides tensors. `forward` is an attribute where a hook or a parallel plan replaced it.
_KNOWN_ATTRIBUTES: Final = frozenset(
    {
        "config", "training", "forward", "num_experts", "hidden_dim", "hidden_size", "intermediate_dim",
        "intermediate_size", "block_size", "activation_scheme",
    }
) | _KNOWN_OPTIONS | frozenset(GATE_ATTRIBUTES)  # fmt: skip
# torch.nn.utils.parametrize's, by which PEFT adapts a weight: the weight itself is read as an attribute, adapted.
_KNOWN_SUBMODULES: Final = frozenset({"act_fn", "parametrizations"})
_FORWARD_ARGUMENTS: Final = 3  # hidden_states, top_k_index, top_k_weights, whatever a class calls them


@dataclass(frozen=True)
class Layout:
    """How a module stores its experts, or why it cannot be taken over.

    Attributes:
        tensors: Attribute names in the order gate_up, down, then scales (FP8) or biases.
        activation: What its gate computes.
        interleaved: Whether gate and up rows alternate.
        transposed: Whether the weights are ``[E, in, out]``.
        scaled_by_tensor: Whether FP8 weights have a scale per expert and projection, ``[E, 2, 1]`` and ``[E, 1, 1]``.
        gate: What `gate_state` returned when the module was inspected.
        unfit: Why the module keeps its own implementation; empty if it is taken over.
    """

    tensors: tuple[str, ...] = ()
    activation: Activation = "silu"
    interleaved: bool = False
    transposed: bool = False
    scaled_by_tensor: bool = False
    gate: tuple[object, ...] = ()
    unfit: str = ""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Pickle and copy as None: a copied module may be changed, and a loaded one is read elsewhere."""
        return type(None), ()


def layout_of(module: nn.Module) -> Layout:
    """The module's layout, inspected once. It is kept on the module, where a trace can see and guard it."""
    kept: Layout | None = getattr(module, LAYOUT, None)
    if kept is None or kept.gate != gate_state(module):
        kept = inspect_module(module)
        setattr(module, LAYOUT, kept)
    return kept


def inspect_module(module: Any) -> Layout:
    """Look at a module that transformers decorated with ``use_experts_implementation``."""
    gate = gate_state(module)
    gated = bool(getattr(module, "has_gate", True))
    up = "gate_up_proj" if gated else "up_proj"
    weight = getattr(module, up, None)
    if not isinstance(weight, Tensor) or not isinstance(getattr(module, "down_proj", None), Tensor):
        return Layout(gate=gate, unfit=f"it has no tensors {up} and down_proj")
    tensors: tuple[str, ...] = (up, "down_proj")
    if not weight.dtype.is_floating_point:
        return Layout(gate=gate, unfit=f"its weights are codes of {weight.dtype} (FP4?), which no backend reads")
    if weight.dtype == FP8:
        if unfit := _unfit_fp8(module):
            return Layout(gate=gate, unfit=unfit)
        tensors += (f"{up}_scale_inv", "down_proj_scale_inv")
    elif getattr(module, "has_bias", False):
        tensors += (f"{up}_bias", "down_proj_bias")
    for reason in _unknown_features(module, tensors):
        return Layout(gate=gate, unfit=reason)
    interleaved = gated and not getattr(module, "is_concatenated", True)
    activation = recognise_gate(module, weight, gated=gated, interleaved=interleaved)
    if activation is None:
        name = type(module)._apply_gate.__qualname__ if gated else "act_fn"
        return Layout(gate=gate, unfit=f"its gate ({name}) is none of {allowed()}")
    transposed = bool(getattr(module, "is_transposed", False))
    by_tensor = weight.dtype == FP8 and module.block_size is None
    return Layout(tensors, activation, interleaved, transposed, by_tensor, gate)


def _unknown_features(module: nn.Module, tensors: tuple[str, ...]) -> Iterator[str]:
    """What the module has that this integration does not compute, each by name."""
    if getattr(module, "has_post_expert_norm", False):
        yield "it normalises the output of each expert (has_post_expert_norm), which no backend does"
    for name, option in inspect.signature(use_experts_implementation).parameters.items():
        if option.kind is inspect.Parameter.KEYWORD_ONLY and name not in _KNOWN_OPTIONS:
            value = getattr(module, name, option.default)
            if value != option.default:
                yield f"its option {name}={value!r} of transformers' decorator is not known here"
    arguments = tuple(inspect.signature(model_forward(module)).parameters)[1:]
    for name in arguments[_FORWARD_ARGUMENTS:]:
        yield f"its forward takes an argument {name}, which is not known here"
    plain = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    for name, value in plain.items():
        # An option that is None or False is off.
        off = value is None or value is False
        if not off and name not in _KNOWN_ATTRIBUTES and not isinstance(value, Tensor):
            yield f"its attribute {name}={value!r} is not known here"
    # FSDP's first version and pruning put a plain tensor in the place of a parameter.
    for name, value in (*module._parameters.items(), *module._buffers.items(), *plain.items()):
        if isinstance(value, Tensor) and name not in tensors:
            yield f"its tensor {name} is not known here"
    for name, _ in module.named_children():
        if name not in _KNOWN_SUBMODULES:
            yield f"its submodule {name} is not known here"


def model_forward(module: nn.Module) -> Any:
    """The class's forward beneath every wrapper: transformers wraps an FP8 class once for each of a model's layers."""
    return inspect.unwrap(type(module).forward)


def _unfit_fp8(module: Any) -> str:
    if not hasattr(module, "block_size"):
        return "its weights are FP8 without scales; load the model with transformers' FP8 quantisation"
    if getattr(module, "is_transposed", False):
        return "its FP8 weights are stored transposed, which no backend reads"
    block = module.block_size
    if block is not None and tuple(block) != (QUANT_BLOCK, QUANT_BLOCK):
        return f"its FP8 blocks are {block}, and {QUANT_BLOCK}×{QUANT_BLOCK} is what the backends take"
    scheme = getattr(module, "activation_scheme", "dynamic")
    if scheme != "dynamic":
        return f"its FP8 activation scheme is {scheme!r}, and the backends quantise dynamically"
    return ""
