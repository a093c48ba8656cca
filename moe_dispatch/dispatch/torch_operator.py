"""`moe_forward` as custom operators, so that torch.compile takes it whole.

`forward` runs a call, and `forward_into` one with ``out``. `recorded_forward` is `forward` with a gradient: autograd
keeps its inputs, and its backward is the operator `backward`, which computes the gradients from them. It is an operator
of its own because autograd's wrapper takes the host longer than many a call.

An operator receives the layer's tensors one by one: what a compiled graph caches on disk must not depend on an object
of the process that compiled it.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from moe_dispatch.activations import Activation
from moe_dispatch.dispatch.borrowed_experts import BorrowedExperts, may_be_held
from moe_dispatch.dispatch.gradients import Gradients, Wanted, is_any_recorded
from moe_dispatch.dispatch.internals import dispatch_modes, is_tracing, transforms_active
from moe_dispatch.experts import TENSORS, ExpertWeights
from moe_dispatch.tensor_memory import address

Weights = TypeVar("Weights", bound=ExpertWeights)
Run = Callable[[Tensor, ExpertWeights, Tensor, Tensor, str | None, Tensor | None], Tensor]
RunDifferentiable = Callable[[Tensor, ExpertWeights, Tensor, Tensor], Tensor]
ComputeGradients = Callable[[Tensor, Tensor, ExpertWeights, Tensor, Tensor, Wanted], Gradients]


def call(
    hidden_states: Tensor,
    experts: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    backend: str | None,
    out: Tensor | None = None,
) -> Tensor:
    """Run a call through the operator; see `call_tensors`."""
    return _call((hidden_states, topk_weights, topk_ids, *_layer_arguments(experts), backend or ""), out)


def record(
    hidden_states: Tensor, experts: ExpertWeights, topk_weights: Tensor, topk_ids: Tensor, backend: str | None
) -> Tensor:
    """Run a call of tensors that have memory, outside of a trace, and have autograd record it."""
    arguments = (hidden_states, topk_weights, topk_ids, *_layer_arguments(experts), backend or "")
    if transforms_active() or is_tracing():
        return _call(arguments)
    return cast("Tensor", _Recorded.apply(*arguments))  # type: ignore[no-untyped-call] # torch does not annotate it


def _layer_arguments(experts: ExpertWeights) -> tuple[Any, ...]:
    """The operators' arguments between topk_ids and backend."""
    return (
        experts.gate_up, experts.down, experts.gate_up_scale, experts.down_scale, experts.gate_up_bias,
        experts.down_bias, experts.activation, experts.interleaved, experts.routed_experts,
    )  # fmt: skip


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
    layer = (gate_up, down, gate_up_scale, down_scale, gate_up_bias, down_bias, activation, interleaved, routed_experts)
    return _call((hidden_states, topk_weights, topk_ids, *layer, backend or ""), out)


def _call(arguments: tuple[Any, ...], out: Tensor | None = None) -> Tensor:
    if out is None:
        recorded = is_any_recorded([argument for argument in arguments if isinstance(argument, Tensor)])
        # What torch.jit.trace has recorded may run with and without a gradient.
        recorded = recorded or (not torch.compiler.is_compiling() and is_tracing())
        operator = torch.ops.moe_dispatch.recorded_forward if recorded else torch.ops.moe_dispatch.forward
        return cast("Tensor", operator(*arguments))
    torch.ops.moe_dispatch.forward_into(*arguments, out)
    return out


# The implementations of the operators, whose arguments `_define` names.


def _forward(*arguments: Any, out: Tensor | None = None) -> Tensor:
    hidden_states, topk_weights, topk_ids, *layer, backend = arguments
    return _run(hidden_states, _layer(*layer), topk_weights, topk_ids, backend or None, out)


def _forward_into(*arguments: Any) -> None:
    *others, out = arguments
    _forward(*others, out=out)


def _backward(gradient: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients in the order of `Wanted`; an empty tensor for each that is not wanted."""
    hidden_states, topk_weights, topk_ids, *layer, wanted = arguments
    gradients = _compute_gradients(gradient, hidden_states, _layer(*layer), topk_weights, topk_ids, Wanted(*wanted))
    return _six(gradient.new_empty(0) if tensor is None else tensor for tensor in gradients)


def implement(run: Run, run_differentiable: RunDifferentiable, compute_gradients: ComputeGradients) -> None:
    """Say what the operators run. `call.py` does so once: this module lies below what the operators run.

    Torch can differentiate what `run_differentiable` runs, any number of times.
    """
    global _run, _run_differentiable, _compute_gradients
    _run, _run_differentiable, _compute_gradients = run, run_differentiable, compute_gradients


_run: Run
_run_differentiable: RunDifferentiable
_compute_gradients: ComputeGradients

# Not by `torch.library.custom_op`: its wrapper for autograd and aliasing, which `forward` does not need, takes the host
# four times as long as the call.
_library: Final = torch.library.Library("moe_dispatch", "DEF")


def _define(name: str, implementation: Callable[..., object], before: str = "", after: str = "", to: str = "") -> None:
    schema = (
        f"({before}Tensor hidden_states, Tensor topk_weights, Tensor topk_ids, Tensor gate_up, Tensor down, Tensor? "
        "gate_up_scale, Tensor? down_scale, Tensor? gate_up_bias, Tensor? down_bias, str activation, bool interleaved, "
        f"SymInt? routed_experts, {after}) -> {to}"
    )
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")


_define("forward", _forward, after="str backend", to="Tensor")
_define("forward_into", _forward_into, after="str backend, Tensor(a!) out", to="()")
_define("recorded_forward", _forward, after="str backend", to="Tensor")
_define("backward", _backward, "Tensor gradient, ", "bool[] wanted", f"({', '.join(['Tensor'] * 6)})")


@torch.library.register_fake("moe_dispatch::forward", lib=_library)  # type: ignore[untyped-decorator]
@torch.library.register_fake("moe_dispatch::recorded_forward", lib=_library)  # type: ignore[untyped-decorator]
def _(hidden_states: Tensor, *_args: object) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


@torch.library.register_fake("moe_dispatch::forward_into", lib=_library)  # type: ignore[untyped-decorator]
def _(*_args: object) -> None:
    return None


@torch.library.register_fake("moe_dispatch::backward", lib=_library)  # type: ignore[untyped-decorator]
def _(gradient: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors, wanted = _differentiable(arguments), arguments[-1]
    # Of weights that are transposed, so are the gradients: the parameter behind them takes those without a copy.
    formats = (torch.contiguous_format, torch.contiguous_format, *(torch.preserve_format,) * 4)
    return _six(
        torch.empty_like(tensor, memory_format=memory_format) if is_wanted else gradient.new_empty(0)
        for tensor, memory_format, is_wanted in zip(tensors, formats, wanted, strict=True)
    )


def _differentiable(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Of the arguments of `_forward`, those that may require a gradient, in the order of `Wanted`."""
    hidden_states, topk_weights, _, gate_up, down, _, _, gate_up_bias, down_bias, *_ = arguments
    return hidden_states, topk_weights, gate_up, down, gate_up_bias, down_bias


def _six(tensors: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    first, second, third, fourth, fifth, sixth = tensors
    return first, second, third, fourth, fifth, sixth


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None = None) -> None:  # noqa: ARG001 - torch's
    *tensors, activation, interleaved, routed_experts, _ = inputs
    ctx.layer_kind = activation, interleaved, routed_experts
    # Autograd saves no tensor that was made in inference mode: it has no version that a backward could check.
    ctx.unversioned = tuple(tensor if tensor is not None and tensor.is_inference() else None for tensor in tensors)
    ctx.save_for_backward(
        *(tensor if kept is None else None for tensor, kept in zip(tensors, ctx.unversioned, strict=True))
    )


def _kept_inputs(ctx: Any) -> tuple[Any, ...]:
    """The tensors among the arguments of `_forward`, in its order."""
    return tuple(
        saved if unversioned is None else unversioned
        for saved, unversioned in zip(ctx.saved_tensors, ctx.unversioned, strict=True)
    )


def _is_plain(gradient: Tensor) -> bool:
    """Whether autograd alone sees what is done with a gradient: no trace, no mode, no transform."""
    seen = torch.compiler.is_compiling() or dispatch_modes()
    return type(gradient) is Tensor and not seen and address(gradient) is not None


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """One gradient, or None, for each argument of `_forward`."""
    tensors = _kept_inputs(ctx)
    wanted = Wanted(*_differentiable(ctx.needs_input_grad))
    if torch.is_grad_enabled():
        gradients = _differentiate_differentiably(ctx, gradient, wanted)
    elif _is_plain(gradient):  # an operator's arguments alone take the host as long as three launches
        hidden_states, topk_weights, topk_ids, *of_layer = tensors
        experts = _layer(*of_layer, *ctx.layer_kind)
        gradients = _compute_gradients(gradient, hidden_states, experts, topk_weights, topk_ids, wanted)
    else:
        computed = torch.ops.moe_dispatch.backward(gradient, *tensors, *ctx.layer_kind, list(wanted))
        gradients = tuple(tensor if is_wanted else None for tensor, is_wanted in zip(computed, wanted, strict=True))
    hidden_states, topk_weights, gate_up, down, gate_up_bias, down_bias = gradients
    layer = (gate_up, down, None, None, gate_up_bias, down_bias)
    return hidden_states, topk_weights, None, *layer, None, None, None, None


def _differentiate_differentiably(ctx: Any, gradient: Tensor, wanted: Wanted) -> tuple[Tensor | None, ...]:
    """Gradients that have gradients (``create_graph=True``), by running the call again where torch can see inside."""
    kept = _kept_inputs(ctx)
    hidden_states, topk_weights, topk_ids, *layer = kept
    experts = _wrap(ExpertWeights, layer, *ctx.layer_kind)
    out = _run_differentiable(hidden_states, experts, topk_weights, topk_ids)
    tensors = _differentiable(kept)
    of = [tensor for tensor, is_wanted in zip(tensors, wanted, strict=True) if is_wanted]
    computed = iter(torch.autograd.grad(out, of, gradient, create_graph=True))
    return tuple(next(computed) if is_wanted else None for is_wanted in wanted)


torch.library.register_autograd(
    "moe_dispatch::recorded_forward", _differentiate, setup_context=_keep_inputs, lib=_library
)


class _Recorded(torch.autograd.Function):
    """`recorded_forward` outside of a trace: torch.library's wrapper around that takes the host five times as long."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        _keep_inputs(ctx, arguments)
        # A mode may be selective checkpointing, which keeps the results of operators by their names.
        run = torch.ops.moe_dispatch.forward if dispatch_modes() else _forward
        result = cast("Tensor", run(*arguments))
        # Autograd forbids the caller to change a view in place.
        return result.detach() if result._is_view() else result

    backward = staticmethod(_differentiate)


class _Layer(NamedTuple):
    tensors: tuple["weakref.ref[Tensor]", ...]
    signature: tuple[object, ...]
    experts: ExpertWeights


# By the id of gate_up, while all tensors of the layer live. Backends keep what they prepare for a layer by its
# ExpertWeights, so the same tensors must give the same object.
_layers: Final[dict[int, _Layer]] = {}


def _layer(*layer: Any) -> ExpertWeights:
    """The layer of these tensors, held weakly and made anew where one was replaced or lies at another address."""
    *tensors, activation, interleaved, routed_experts = layer
    gate_up = tensors[0]
    versions = tuple([_version(scale) for scale in tensors[2:4]])  # ExpertWeights may hold a converted copy
    signature = (*map(_identity, tensors), versions, activation, interleaved, routed_experts)
    key = id(gate_up)
    known = _layers.get(key)
    if known is not None and known.signature == signature:
        return known.experts
    aliases = [None if tensor is None else tensor.detach() for tensor in tensors]
    experts = _wrap(BorrowedExperts, aliases, activation, interleaved, routed_experts)
    if not may_be_held():
        return experts

    def forget(dead: "weakref.ref[Tensor]") -> None:
        known = _layers.get(key)
        if known is not None and dead in known.tensors:
            del _layers[key]

    for name, tensor, alias in zip(TENSORS, tensors, aliases, strict=True):
        if tensor is not None and getattr(experts, name) is alias:  # else it is a converted copy of scales
            experts.lend(name, tensor)
    _layers[key] = _Layer(tuple(weakref.ref(each, forget) for each in tensors if each is not None), signature, experts)
    return experts


def release(gate_up: Tensor) -> None:
    """Forget the layer of this weight until its next call: `torch.utils.swap_tensors` refuses tensors held weakly."""
    _layers.pop(id(gate_up), None)


def _wrap(
    kind: type[Weights], tensors: Sequence[Any], activation: str, interleaved: bool, routed_experts: int | None
) -> Weights:
    """The layer of the tensors that `TENSORS` names."""
    named = dict(zip(TENSORS, tensors, strict=True))
    return kind(
        **named, activation=activation, interleaved=interleaved, transposed=not named["gate_up"].is_contiguous(),
        routed_experts=routed_experts,
    )  # fmt: skip


def _version(tensor: Tensor | None) -> int | None:
    """How often a tensor was changed in place; None where that is not counted."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def _identity(tensor: Tensor | None) -> tuple[object, ...] | None:
    """What changes with the tensor, and with the memory below the same tensor (``.data = …``), while it lives."""
    if tensor is None:
        return None
    return id(tensor), tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.stride()
