"""From the public functions' arguments to the dispatcher of the layer's device, eagerly and under torch.compile."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor

from moe_dispatch.dispatch import torch_operator
from moe_dispatch.dispatch.autocast import autocasts, cast_layer, cast_tokens, shaped_as
from moe_dispatch.dispatch.checks import check, check_act_dtype, check_layer, check_out, have_memory, layout_fault
from moe_dispatch.dispatch.coverage import representative_token_counts
from moe_dispatch.dispatch.dispatcher import Dispatcher
from moe_dispatch.dispatch.explanation import Explanation
from moe_dispatch.dispatch.gradients import (
    Gradients,
    Wanted,
    compute_gradients,
    explain_backward,
    is_recorded,
    needs_grad,
)
from moe_dispatch.dispatch.internals import any_autocast_enabled, forward_mode_entered, is_fake
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine
from moe_dispatch.problem import MoEProblem
from moe_dispatch.workloads import ROUTINGS

if TYPE_CHECKING:
    from moe_dispatch.backend import Inputs

Result = TypeVar("Result")


def call_eagerly(
    hidden_states: Tensor,
    experts: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    backend: str | None,
    out: Tensor | None = None,
    dispatcher: Dispatcher | None = None,
) -> Tensor:
    """`moe_forward` outside of a trace: on the layer's GPU and without autocast, the dispatcher runs the call.

    The dispatcher is the process's one for the layer's device if None.
    """
    if not isinstance(experts, ExpertWeights):
        check(hidden_states, experts, topk_weights, topk_ids)  # raises
    device = experts.device
    if any_autocast_enabled() and autocasts(device):
        return _call_under_autocast((hidden_states, experts, topk_weights, topk_ids), backend, out, dispatcher)
    if type(hidden_states) is not Tensor or type(topk_weights) is not Tensor or type(topk_ids) is not Tensor:
        check(hidden_states, experts, topk_weights, topk_ids, backend)
        if any(map(is_fake, (hidden_states, topk_weights, topk_ids))):
            if out is not None:
                check_out(out, (hidden_states, experts, topk_weights, topk_ids), needs_grad=False)
            return torch_operator.call(hidden_states, experts, topk_weights, topk_ids, backend, out)  # for the shape
    grad = needs_grad(hidden_states, experts, topk_weights)
    if grad and out is None:
        inputs = (hidden_states, experts, topk_weights, topk_ids)
        # Inside of a transform of torch.func there is no memory to read, and only the reference can run.
        if not forward_mode_entered(hidden_states, topk_weights) and have_memory(inputs):
            check(*inputs, backend)
            return torch_operator.record(*inputs, backend)
    dispatcher = dispatcher or get_dispatcher(device)
    # Triton and DeepGEMM launch on the current GPU, wherever the tensors are.
    if dispatcher.one_of_several_gpus and torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            return dispatcher.forward(hidden_states, experts, topk_weights, topk_ids, backend, out, grad)
    return dispatcher.forward(hidden_states, experts, topk_weights, topk_ids, backend, out, grad)


def _call_under_autocast(
    inputs: "Inputs", backend: str | None, out: Tensor | None, dispatcher: Dispatcher | None
) -> Tensor:
    """`call_eagerly` in the dtype that autocast asks for, which reaches no further.

    Inside it would round torch's operators and no kernel, so the result would depend on the backend.
    """
    hidden_states, experts, topk_weights, topk_ids = inputs
    layer = cast_layer(experts)
    tokens = cast_tokens(hidden_states, layer)
    if layer is not experts and getattr(tokens, "dtype", None) is not layer.gate_up.dtype:
        check(*inputs, backend)  # raises, of what was given
    with torch.autocast(experts.device.type, enabled=False):
        if layer is experts and tokens is hidden_states:
            return call_eagerly(*inputs, backend, out, dispatcher)
        if out is not None:
            check(tokens, layer, topk_weights, topk_ids, backend)
            check_out(out, inputs, needs_grad=needs_grad(hidden_states, experts, topk_weights))
        into = out if tokens is hidden_states else None
        result = call_eagerly(tokens, layer, topk_weights, topk_ids, backend, into, dispatcher)
        return result.to(hidden_states.dtype) if out is into else out.copy_(result)  # type: ignore[union-attr]


def _run_differentiable(
    hidden_states: Tensor, experts: ExpertWeights, topk_weights: Tensor, topk_ids: Tensor
) -> Tensor:
    """Run a call on the layer's GPU. If it is recorded, only a backend that torch can differentiate runs it."""
    grad = needs_grad(hidden_states, experts, topk_weights)
    with on_device(experts.device):
        dispatcher = get_dispatcher(experts.device)
        return dispatcher.forward(hidden_states, experts, topk_weights, topk_ids, grad=grad)


def _compute_gradients(
    gradient: Tensor,
    hidden_states: Tensor,
    experts: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    wanted: Wanted,
) -> Gradients:
    with on_device(experts.device):
        machine = get_dispatcher(experts.device).machine
        return compute_gradients(gradient, (hidden_states, experts, topk_weights, topk_ids), wanted, machine)


# The custom operators run a call eagerly, and an eager call on fake tensors, or recorded, goes through an operator.
torch_operator.implement(call_eagerly, _run_differentiable, _compute_gradients)


def call_traced(
    hidden_states: Tensor,
    experts: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    backend: str | None,
    out: Tensor | None = None,
) -> Tensor:
    """`moe_forward` while torch.compile traces it.

    Bad arguments are refused when the operator runs. An exception in a trace would be the last that torch.compile sees
    of this function: it would trace what that calls from then on, down to a backend, which fails of that.
    """
    tensors = isinstance(hidden_states, Tensor) and isinstance(topk_weights, Tensor) and isinstance(topk_ids, Tensor)
    tensors = tensors and (out is None or isinstance(out, Tensor))
    inside = tensors and isinstance(experts, ExpertWeights) and not forward_mode_entered(hidden_states, topk_weights)
    if not inside or (out is not None and is_recorded(hidden_states, experts, topk_weights)):
        # To be refused, or for the reference, whose loop launches what the routing asks for.
        return uncompiled(call_eagerly, hidden_states, experts, topk_weights, topk_ids, backend, out)
    if not autocasts(experts.device):
        return torch_operator.call(hidden_states, experts, topk_weights, topk_ids, backend, out)
    layer = cast_layer(experts)
    tokens = cast_tokens(hidden_states, layer)
    if out is not None and tokens is not hidden_states:
        if layout_fault(out, hidden_states):
            return uncompiled(call_eagerly, hidden_states, experts, topk_weights, topk_ids, backend, out)
        return out.copy_(torch_operator.call(tokens, layer, topk_weights, topk_ids, backend))
    return torch_operator.call(tokens, layer, topk_weights, topk_ids, backend, out).to(hidden_states.dtype)


def uncompiled(function: Callable[..., Result], *arguments: object, **named: object) -> Result:
    """While torch.compile traces: call a function at a break in the graph."""
    from moe_dispatch.dispatch.uncompiled import call_uncompiled

    result: Result = call_uncompiled(function, *arguments, **named)
    return result


def warm_up(
    experts: ExpertWeights,
    topk: int,
    tokens: Sequence[int],
    act_dtype: torch.dtype | None,
    backend: str | None,
    up_to: int | None = None,
    *,
    into_out: bool = False,
) -> None:
    """See `moe_dispatch.warm_up`."""
    check_layer(experts)
    counts = tuple(tokens) if isinstance(tokens, Iterable) else (tokens,)
    least_up_to = () if up_to is None else (("up_to", up_to, 0),)
    numbers = ("topk", topk, 1), *least_up_to, *(("tokens", count, 0) for count in counts)
    for name, count, least in numbers:
        if type(count) is not int or count < least:
            raise InvalidInputError(f"{name} must be integers of at least {least}, got {count!r}")
    check_act_dtype(act_dtype)
    if backend is not None and not isinstance(backend, str):
        raise InvalidInputError(f"backend must be a registered name or None, got {type(backend).__name__}")
    device = experts.device
    if autocasts(device):
        with torch.no_grad():
            layer = cast_layer(experts)
        with torch.autocast(device.type, enabled=False):
            act_dtype = act_dtype if experts.quantized else None
            # Where tokens are cast, `out` gets a copy of the result: calls of either kind come.
            for into in {into_out, into_out and layer is experts}:
                warm_up(layer, topk, counts, act_dtype, backend, up_to, into_out=into)
        return
    dtype = act_dtype or experts.usual_act_dtype
    dispatcher = get_dispatcher(device)
    dispatcher.planner.named(backend)
    if up_to:
        capability = dispatcher.machine.capability
        others = representative_token_counts(dispatcher.planner, experts, topk, dtype, capability, up_to, backend)
        counts = (*counts, *(M for M in others if M not in counts))
    # Generators of its own: preparing for calls may not change what a program draws.
    generator, on_cpu = torch.Generator(device).manual_seed(0), torch.Generator().manual_seed(0)
    for M in filter(None, counts):
        hidden = torch.randn(M, experts.K, generator=generator, dtype=torch.float32, device=device).to(dtype)
        # A rank of expert parallelism may hold fewer experts than a token has. Where it does, those of other ranks are
        # among the ids, and add nothing.
        choices = experts.E if topk <= experts.E else experts.routed_experts or experts.E
        weights, ids = ROUTINGS["uniform"].sample(M, choices, topk, device, on_cpu)
        with torch.no_grad(), on_device(device):
            out = torch.empty_like(hidden) if into_out else None
            dispatcher.warm_up((hidden, experts, weights, ids), backend, out)


def explain(arguments: Sequence[object], machine: Machine | None) -> Explanation:
    """See `moe_dispatch.explain`."""
    if machine is not None and not isinstance(machine, Machine):
        raise InvalidInputError(f"machine must be a Machine, as Machine.load(FILE) gives, got {type(machine).__name__}")
    if len(arguments) == 1 and isinstance(arguments[0], MoEProblem):
        problem = arguments[0]
        dispatcher = Dispatcher(machine, live=False) if machine else _dispatcher_for(problem)
        return dispatcher.planner.explain(problem)
    if len(arguments) != 4:
        raise InvalidInputError(
            "explain takes a MoEProblem, or hidden_states, experts, topk_weights and topk_ids as moe_forward does; "
            f"got {len(arguments)} arguments: {', '.join(type(argument).__name__ for argument in arguments)}"
        )
    if isinstance(arguments[1], ExpertWeights) and autocasts(arguments[1].device):
        return _explain_under_autocast(*cast("Inputs", arguments), machine)
    check(*arguments)
    hidden_states, experts, topk_weights, topk_ids = cast("Inputs", arguments)
    described = machine or get_dispatcher(experts.device).machine
    M, topk = topk_ids.shape
    problem = experts.problem(M, topk, hidden_states.dtype, described.capability)
    problem = dataclasses.replace(
        problem, device=described.device, needs_grad=forward_mode_entered(hidden_states, topk_weights)
    )
    if machine:
        explanation = Dispatcher(machine, live=False).planner.explain(problem)
    else:
        with on_device(experts.device):
            explanation = get_dispatcher(experts.device).planner.explain(problem)
    if problem.needs_grad or not is_recorded(hidden_states, experts, topk_weights):
        return explanation
    return dataclasses.replace(explanation, notes=(*explanation.notes, explain_backward(experts, described)))


def _explain_under_autocast(
    hidden_states: Tensor, experts: ExpertWeights, topk_weights: Tensor, topk_ids: Tensor, machine: Machine | None
) -> Explanation:
    layer = cast_layer(experts, shaped_as)
    tokens = cast_tokens(hidden_states, layer)
    with torch.autocast(experts.device.type, enabled=False):
        explanation = explain((tokens, layer, topk_weights, topk_ids), machine)
    if layer is experts:
        return explanation
    note = f"autocast: each call copies all experts from fp32 to {layer.dtype}; weights in {layer.dtype} need no copy"
    return dataclasses.replace(explanation, notes=(*explanation.notes, note))


def _dispatcher_for(problem: MoEProblem) -> Dispatcher:
    here = get_dispatcher("cpu" if problem.device == "cpu" else None)
    if (problem.device, problem.capability) == (here.machine.device, here.machine.capability):
        return here
    raise InvalidInputError(
        f"the problem is for {problem.device} {problem.capability}, and this machine is {here.machine.name} "
        f"({here.machine.device} {here.machine.capability}); give `machine=Machine.load(FILE)` to ask for another one"
    )


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one; a CPU, and the current GPU, need nothing."""
    is_other = device.type == "cuda" and torch.cuda.current_device() != device.index
    return torch.cuda.device(device) if is_other else nullcontext()
