"""`moe_forward` as a custom operator, so that torch.compile takes it whole: `forward`, and `forward_into` with ``out``.

An operator receives the layer's tensors one by one: what a compiled graph caches on disk must not depend on an object
of the process that compiled it. It has no gradient: where one is needed, `moe_forward` leaves the compiled graph.
"""

import weakref
from collections.abc import Callable
from typing import Final, NamedTuple, cast, get_args

import torch
from torch import Tensor

from moe_dispatch.experts import ExpertWeights
from moe_dispatch.problem import Activation

Run = Callable[[Tensor, ExpertWeights, Tensor, Tensor, str | None, Tensor | None], Tensor]


def call(
    hidden_states: Tensor,
    experts: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    backend: str | None,
    out: Tensor | None = None,
) -> Tensor:
    """Run a call through the operator; see `call_tensors`."""
    return call_tensors(
        hidden_states,
        topk_weights,
        topk_ids,
        experts.gate_up,
        experts.down,
        gate_up_scale=experts.gate_up_scale,
        down_scale=experts.down_scale,
        gate_up_bias=experts.gate_up_bias,
        down_bias=experts.down_bias,
        activation=experts.activation,
        interleaved=experts.interleaved,
        routed_experts=experts.routed_experts,
        backend=backend,
        out=out,
    )


def call_tensors(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: Activation,
    interleaved: bool,
    routed_experts: int | None = None,
    backend: str | None,
    out: Tensor | None = None,
) -> Tensor:
    """Run a call given the layer's tensors one by one. They are checked when the operator runs; see `ExpertWeights`."""
    arguments = (
        hidden_states,
        topk_weights,
        topk_ids,
        gate_up,
        down,
        gate_up_scale,
        down_scale,
        gate_up_bias,
        down_bias,
        activation,
        interleaved,
        routed_experts,
        backend or "",
    )
    if out is None:
        return cast("Tensor", torch.ops.moe_dispatch.forward(*arguments))
    torch.ops.moe_dispatch.forward_into(*arguments, out)
    return out


def _forward(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    interleaved: bool,
    routed_experts: int | None,
    backend: str,
) -> Tensor:
    optional = {
        "gate_up_scale": gate_up_scale,
        "down_scale": down_scale,
        "gate_up_bias": gate_up_bias,
        "down_bias": down_bias,
    }
    experts = _layer(gate_up, down, optional, activation, interleaved=interleaved, routed_experts=routed_experts)
    return _run(hidden_states, experts, topk_weights, topk_ids, backend or None, None)


def _forward_into(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    interleaved: bool,
    routed_experts: int | None,
    backend: str,
    out: Tensor,
) -> None:
    optional = {
        "gate_up_scale": gate_up_scale,
        "down_scale": down_scale,
        "gate_up_bias": gate_up_bias,
        "down_bias": down_bias,
    }
    experts = _layer(gate_up, down, optional, activation, interleaved=interleaved, routed_experts=routed_experts)
    _run(hidden_states, experts, topk_weights, topk_ids, backend or None, out)


def implement(run: Run) -> None:
    """Say what the operators run. `call.py` does so once: this module lies below what the operators run."""
    global _run
    _run = run


_run: Run

# Not by `torch.library.custom_op`: its wrapper for autograd and aliasing, neither of which applies here, takes the host
# four times as long as the call.
_library: Final = torch.library.Library("moe_dispatch", "DEF")  # type: ignore[no-untyped-call]


def _define(name: str, implementation: Callable[..., object], mutates: tuple[str, ...]) -> None:
    schema = torch.library.infer_schema(implementation, mutates_args=mutates)
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _library.impl(name, implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


_define("forward", _forward, ())
_define("forward_into", _forward_into, ("out",))


@torch.library.register_fake("moe_dispatch::forward", lib=_library)  # type: ignore[untyped-decorator]
def _(hidden_states: Tensor, *_args: object) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


@torch.library.register_fake("moe_dispatch::forward_into", lib=_library)  # type: ignore[untyped-decorator]
def _(*_args: object) -> None:
    return None


class _Layer(NamedTuple):
    gate_up: "weakref.ref[Tensor]"
    signature: tuple[object, ...]
    experts: ExpertWeights


# By the id of gate_up, while that lives. Backends keep what they prepare for a layer by its ExpertWeights, so the same
# tensors must give the same object.
_layers: Final[dict[int, _Layer]] = {}


def _layer(
    gate_up: Tensor,
    down: Tensor,
    optional: dict[str, Tensor | None],
    activation: str,
    *,
    interleaved: bool,
    routed_experts: int | None,
) -> ExpertWeights:
    """The layer of these tensors, made anew where a tensor was replaced or lies at another address."""
    signature = (*map(_identity, (gate_up, down, *optional.values())), activation, interleaved, routed_experts)
    key = id(gate_up)
    known = _layers.get(key)
    if known is not None and known.gate_up() is gate_up and known.signature == signature:
        return known.experts
    experts = ExpertWeights(
        gate_up.detach(),
        down.detach(),
        **optional,
        activation=_activation(activation),
        interleaved=interleaved,
        routed_experts=routed_experts,
    )

    def forget(dead: "weakref.ref[Tensor]") -> None:
        known = _layers.get(key)
        if known is not None and known.gate_up is dead:
            del _layers[key]

    _layers[key] = _Layer(weakref.ref(gate_up, forget), signature, experts)
    return experts


def _identity(tensor: Tensor | None) -> tuple[object, ...] | None:
    """What changes with the tensor, and with the memory below the same tensor (``.data = …``)."""
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.is_contiguous()


def _activation(name: str) -> Activation:
    assert name in get_args(Activation)  # noqa: S101 - it comes from a checked ExpertWeights
    return cast("Activation", name)
