"""`moe_forward` inside Hugging Face transformers (5.17 and newer): one registration, then a name to ask for.

    from moe_dispatch.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moe_dispatch")

A loaded model takes ``model.set_experts_implementation("moe_dispatch")``. Layers whose gate or storage no backend
computes keep the model's own implementation, with one warning that says why.

Under torch.compile a layer stays in the graph, ``fullgraph=True`` included, once it has been called outside of one: a
layer's first call looks at the module, which a trace cannot. The graph breaks where gradients are recorded, and at
layers that store their experts transposed (gpt-oss), are offloaded, or keep their own implementation.
"""

import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from moe_dispatch.api import moe_forward
from moe_dispatch.dispatch import torch_operator
from moe_dispatch.dispatch.internals import forward_mode_entered
from moe_dispatch.errors import warn
from moe_dispatch.experts import DTYPE_NAMES, ExpertWeights
from moe_dispatch.numerics import FP8, activate_torch
from moe_dispatch.problem import ACTIVATIONS, QUANT_BLOCK, UNGATED, Activation

NAME: Final = "moe_dispatch"
_LAYOUT: Final = "_moe_dispatch_layout"  # of a module
# fp32 rounding apart, a known activation agrees exactly; GELU and its tanh form already differ by 5e-4.
_GATE_TOLERANCE: Final = 1e-5


def register() -> None:
    """Make ``experts_implementation="moe_dispatch"`` known to transformers, for plain and for block-FP8 models.

    Memory: the layer's tensors are used as they are, except where a model stores them transposed (gpt-oss): such a
    layer gets one contiguous copy of its weights at its first call, kept as long as the weights do not change. A
    change in place through ``.data`` cannot be seen by the copy: write ``weight.copy_(…)`` under ``torch.no_grad()``.

    Raises:
        ImportError: transformers is missing or older than 5.17.
    """
    try:
        from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise ImportError(
            "the transformers integration needs transformers 5.17 or newer: pip install 'moe-dispatch[transformers]'"
        ) from error
    ExpertsInterface.register(NAME, experts_forward)
    FP8ExpertsInterface.register(NAME, experts_forward)


def experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """An experts module's forward: what transformers calls once registered.

    Args:
        module: One that transformers decorated with ``use_experts_implementation``.
        hidden_states: ``[M, K]``.
        top_k_index: ``[M, topk]``; an id equal to the number of experts is expert parallelism's "not mine".
        top_k_weights: ``[M, topk]``.

    Returns:
        ``[M, K]``.
    """
    if torch.compiler.is_compiling():
        return _compiled(module, hidden_states, top_k_index, top_k_weights)
    layout = _layout(module)
    reason = layout.unfit or _unfit_call(module, layout, hidden_states)
    if reason:
        _warn_once(module, reason)
        return _own_forward(module, hidden_states, top_k_index, top_k_weights)
    return moe_forward(hidden_states, _experts(module, layout), top_k_weights, top_k_index)


@dataclass(frozen=True)
class _Layout:
    """How a module stores its experts, or why it cannot be taken over.

    Attributes:
        tensors: Attribute names in the order gate_up, down, then scales (FP8) or biases.
        activation: What its gate computes.
        interleaved: Whether gate and up rows alternate.
        transposed: Whether the weights are ``[E, in, out]``.
        unfit: Why the module keeps its own implementation; empty if it is taken over.
    """

    tensors: tuple[str, ...] = ()
    activation: Activation = "silu"
    interleaved: bool = False
    transposed: bool = False
    unfit: str = ""

    @property
    def up(self) -> str:
        return self.tensors[0]

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Nothing: a copy of the module, which may be changed, and a file of it, read elsewhere, are looked at anew."""
        return type(None), ()


@dataclass(frozen=True)
class _Held:
    """Weights built for one state of a module's tensors.

    Attributes:
        state: Of each tensor: address, version, dtype. In-place updates, adapters and moves change it.
        sources: The tensors themselves, weakly: an address may be reused by another tensor.
        experts: What was built.
    """

    state: tuple[tuple[int, int, torch.dtype], ...]
    sources: tuple["weakref.ref[Tensor]", ...]
    experts: ExpertWeights


# Weak in the module, so that a deleted model takes its entries with it.
_held: "weakref.WeakKeyDictionary[nn.Module, _Held]" = weakref.WeakKeyDictionary()
_warned: set[tuple[type, str]] = set()


def _layout(module: nn.Module) -> _Layout:
    """How the module stores its experts, looked at once. Kept on the module, where a trace can see and guard it."""
    kept: _Layout | None = getattr(module, _LAYOUT, None)
    if kept is None:
        kept = _inspect(module)
        setattr(module, _LAYOUT, kept)
    return kept


def _compiled(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward while torch.compile traces it: in the graph where nothing has to be run, kept or copied for it.

    A trace takes for a constant what is kept of one layer, and uses it for all of them; a module's tensors it takes for
    inputs, and its layout it guards.
    """
    layout: _Layout | None = getattr(module, _LAYOUT, None)
    if layout is not None and _stays_in_graph(module, layout, hidden_states, top_k_weights):
        gate_up, down, *others = (getattr(module, name) for name in layout.tensors)
        return torch_operator.call_tensors(
            hidden_states, top_k_weights, top_k_index, gate_up, down, **_by_kind(gate_up, others),
            activation=layout.activation, interleaved=layout.interleaved, backend=None,
        )  # fmt: skip
    from moe_dispatch.dispatch.uncompiled import call_uncompiled

    out: Tensor = call_uncompiled(experts_forward, module, hidden_states, top_k_index, top_k_weights)
    return out


def _stays_in_graph(module: nn.Module, layout: _Layout, hidden_states: Tensor, top_k_weights: Tensor) -> bool:
    if layout.unfit or layout.transposed or _offloaded(module) or _unfit_call(module, layout, hidden_states):
        return False
    tensors = [getattr(module, name) for name in layout.tensors]
    if not all(one.is_contiguous() for one in tensors):
        return False
    recording = torch.is_grad_enabled() and any(one.requires_grad for one in (hidden_states, top_k_weights, *tensors))
    return not recording and not forward_mode_entered(hidden_states, top_k_weights, *tensors)


def _inspect(module: nn.Module) -> _Layout:
    gated = bool(getattr(module, "has_gate", True))
    up = "gate_up_proj" if gated else "up_proj"
    weight = getattr(module, up, None)
    if not isinstance(weight, Tensor) or not isinstance(getattr(module, "down_proj", None), Tensor):
        return _Layout(unfit=f"it has no tensors {up} and down_proj")
    interleaved = gated and not getattr(module, "is_concatenated", True)
    activation = _recognised_gate(module, gated, interleaved)
    if activation is None:
        gate = type(module)._apply_gate.__qualname__ if gated else "act_fn"  # type: ignore[attr-defined]
        return _Layout(unfit=f"its gate ({gate}) is none of {', '.join(ACTIVATIONS)}")
    names: tuple[str, ...] = (up, "down_proj")
    if weight.dtype == FP8:
        if unfit := _unfit_fp8(module):
            return _Layout(unfit=unfit)
        names += (f"{up}_scale_inv", "down_proj_scale_inv")
    elif getattr(module, "has_bias", False):
        names += (f"{up}_bias", "down_proj_bias")
    return _Layout(names, activation, interleaved, bool(getattr(module, "is_transposed", False)))


def _unfit_fp8(module: nn.Module) -> str:
    block = getattr(module, "block_size", None)
    if block is None or tuple(block) != (QUANT_BLOCK, QUANT_BLOCK):
        return f"its FP8 blocks are {block}, and {QUANT_BLOCK}×{QUANT_BLOCK} is what the backends take"
    scheme = getattr(module, "activation_scheme", "dynamic")
    if scheme != "dynamic":
        return f"its FP8 activation scheme is {scheme!r}, and the backends quantise dynamically"
    scale = module.down_proj_scale_inv
    if scale.dtype != torch.float32:
        return f"its FP8 scales are {scale.dtype}, and the backends take float32"
    return ""


def _recognised_gate(module: Any, gated: bool, interleaved: bool) -> Activation | None:
    """Which activation the module's gate computes, found by running it on numbers that tell all of ours apart.

    Names would not do: a gate may clamp at a limit of its own, and hub kernels replace activations under one name.
    """
    function = getattr(module, "act_fn", None)
    if isinstance(function, nn.Module) and any(True for _ in function.parameters()):
        return None  # it learns: what it computes today is not what it computes tomorrow
    # Values beyond every clamp limit in use, and dense ones where GELU and its tanh form differ.
    gate = torch.cat([torch.linspace(-14.0, 14.0, 113), torch.tensor([-1e3, -40.0, 40.0, 1e3])])
    up = gate.roll(37)
    columns = torch.stack([gate, up], dim=1).flatten() if interleaved else torch.cat([gate, up])
    columns = (columns if gated else gate)[None]
    try:
        with torch.no_grad():
            computed = module._apply_gate(columns) if gated else module.act_fn(columns)
    except Exception:  # noqa: BLE001 - a gate that needs other inputs is simply not one of ours
        return None
    for activation in ACTIVATIONS:
        if (activation not in UNGATED) != gated:
            continue
        expected = activate_torch(columns, activation, interleaved=interleaved)
        if computed.shape == expected.shape and torch.allclose(
            computed.float(), expected, rtol=_GATE_TOLERANCE, atol=_GATE_TOLERANCE
        ):
            return activation
    return None


def _unfit_call(module: nn.Module, layout: _Layout, hidden_states: Tensor) -> str:
    weight = getattr(module, layout.up)
    if type(weight) not in (Tensor, nn.Parameter):
        return f"its weights are {type(weight).__name__}, and the backends take plain tensors"
    if weight.dtype not in DTYPE_NAMES or weight.device.type not in ("cpu", "cuda"):
        return f"its weights are {weight.dtype} on {weight.device}"
    if weight.dtype not in (FP8, hidden_states.dtype):
        return f"hidden_states are {hidden_states.dtype} and its weights {weight.dtype} (autocast?)"
    if layout.transposed and _offloaded(module):
        return "its weights are offloaded and stored transposed: every call would copy them"
    return ""


def _experts(module: nn.Module, layout: _Layout) -> ExpertWeights:
    sources = tuple(getattr(module, name) for name in layout.tensors)
    differentiable = sources[0].dtype != FP8 and torch.is_grad_enabled() and any(one.requires_grad for one in sources)
    # Kept weights would hold what an offloading hook means to free, and the graph of a step that is over; inference
    # tensors do not count their changes.
    if differentiable or _offloaded(module) or any(one.is_inference() for one in sources):
        return _build(layout, sources if differentiable else tuple(one.detach() for one in sources))
    state = tuple((one.data_ptr(), one._version, one.dtype) for one in sources)
    held = _held.get(module)
    if held and held.state == state and all(ref() is one for ref, one in zip(held.sources, sources, strict=True)):
        return held.experts
    experts = _build(layout, tuple(one.detach() for one in sources))
    _held[module] = _Held(state, tuple(weakref.ref(one) for one in sources), experts)
    return experts


def _build(layout: _Layout, sources: tuple[Tensor, ...]) -> ExpertWeights:
    gate_up, down, *others = sources
    if layout.transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    return ExpertWeights(
        gate_up.contiguous(),
        down.contiguous(),
        **_by_kind(gate_up, [one.contiguous() for one in others]),
        activation=layout.activation,
        interleaved=layout.interleaved,
    )


def _by_kind(gate_up: Tensor, others: Sequence[Tensor]) -> dict[str, Tensor]:
    """The tensors beside the weights, as `ExpertWeights` names them."""
    kinds = ("gate_up_scale", "down_scale") if gate_up.dtype == FP8 else ("gate_up_bias", "down_bias")
    return dict(zip(kinds, others, strict=True)) if others else {}


def _offloaded(module: nn.Module) -> bool:
    """Whether an accelerate hook brings the weights before each call and frees them after it."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ())))


def _own_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward beneath every wrapper: transformers wraps an FP8 class once for each of a model's layers."""
    own = inspect.unwrap(type(module).forward)
    out: Tensor = own(module, hidden_states, top_k_index, top_k_weights)
    return out


def _warn_once(module: nn.Module, reason: str) -> None:
    kind = (type(module), reason)
    if kind not in _warned:
        _warned.add(kind)
        warn(f"{type(module).__name__} keeps its own implementation, undispatched but right: {reason}")
