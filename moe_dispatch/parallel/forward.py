"""One call of a layer that is spread over ranks: agree, dispatch, run this rank's experts, combine."""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from moe_dispatch.arrived_rows import ArrivedInputs
from moe_dispatch.dispatch.call import on_device
from moe_dispatch.dispatch.checks import check, check_out
from moe_dispatch.dispatch.gradients import needs_grad
from moe_dispatch.dispatch.internals import any_autocast_enabled
from moe_dispatch.dispatch.settled_plans import SETTLING_CALLS, SettledPlans
from moe_dispatch.errors import InvalidInputError, MoEDispatchError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.parallel.exchange import Arrived, Exchange, LocalTokens
from moe_dispatch.parallel.sharded_experts import ShardedExperts

_MAX_KINDS: Final = 4096  # Kinds of calls that a layer remembers; when full, all are forgotten.


@dataclass(frozen=True)
class CallPlan:
    """What serves a kind of call.

    Attributes:
        exchange: Carries tokens and results.
        experts: This rank's weights, with the load that the exchange lets expect.
    """

    exchange: Exchange
    experts: ExpertWeights


def forward_sharded(
    hidden_states: Tensor,
    layer: ShardedExperts,
    topk_weights: Tensor,
    topk_ids: Tensor,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`moe_forward` of a layer that is spread over ranks. Collective: every rank calls, also one without tokens.

    Args:
        hidden_states: ``[M, K]``; M may differ from rank to rank where tokens are sharded, and be 0.
        layer: This rank's part of the layer.
        topk_weights: ``[M, topk]``, as for `moe_forward`.
        topk_ids: ``[M, topk]``, global: 0…E-1 of the whole layer; others add nothing.
        backend: The backend that runs this rank's experts; equal on all ranks.
        out: Memory for the output, as for `moe_forward`.

    Returns:
        ``[M, K]`` in hidden_states' dtype: the sum over the experts of all ranks. Partial sums of the ranks cross in
        hidden_states' dtype.

    Raises:
        InvalidInputError: As for `moe_forward`; a gradient is needed; or another rank refuses its arguments.
        UnknownNameError: The named backend is not registered; nothing was run, as with the next two.
        BackendUnsupportedError: The named backend cannot run this.
        BackendUnavailableError: The named backend is missing or broken.
        ExpertParallelMismatchError: The ranks are not in the same call.
        ExpertParallelLostError: A rank is dead, late or failed, in this call or an earlier one.
    """
    session = layer.session
    watch = session.watch
    watch.begin()
    settled = None
    if out is None and not _may_need_grad(hidden_states, layer, topk_weights):
        settled = layer.settled.find(hidden_states, layer.local, topk_weights, topk_ids, backend)
    if settled is None:
        try:
            _check_once(layer, (hidden_states, topk_weights, topk_ids), backend, out)
        except MoEDispatchError as error:  # the caller's fault, which is to cost no more than this call
            session.refuse(error)
            raise
    M, topk = topk_ids.shape
    capacity = session.agreed_capacity(layer.number, M, topk, hidden_states.dtype, backend)
    if not capacity:
        return torch.empty_like(hidden_states) if out is None else out
    plan = call_plan(layer, capacity, topk, hidden_states.dtype, capturing=settled is None and session.capturing)
    try:
        with on_device(layer.device):
            tokens = local_tokens(hidden_states, layer, topk_weights, topk_ids, capacity)
            arrived = plan.exchange.dispatch(tokens)
            partial = session.run_local(arrived_inputs(plan.experts, arrived), backend)
            result = plan.exchange.combine(partial, arrived, tokens)
            return result if out is None else out.copy_(result)
    except BaseException as error:
        watch.broken(error)
        raise


def _may_need_grad(hidden_states: object, layer: ShardedExperts, topk_weights: object) -> bool:
    """Whether a gradient may be needed, which settled kinds do not tell; True where an argument is no tensor."""
    if not isinstance(hidden_states, Tensor) or not isinstance(topk_weights, Tensor):
        return True
    return needs_grad(hidden_states, layer.local, topk_weights)


def call_plan(layer: ShardedExperts, capacity: int, topk: int, act_dtype: torch.dtype, *, capturing: bool) -> CallPlan:
    """What serves a kind of call; remembered until `warm_up` chooses anew."""
    session = layer.session
    key = (session.choices, capacity, topk, act_dtype, capturing)
    if (plan := layer.plans.get(key)) is None:
        kind = session.kind(layer.placement, layer.local, capacity, topk, act_dtype)
        exchange = session.choose(kind)
        plan = CallPlan(exchange, layer.weights_expecting(exchange.arriving_share(kind)))
        _remember(layer.plans, key, plan)
    return plan


def local_tokens(
    hidden_states: Tensor, layer: ShardedExperts, topk_weights: Tensor, topk_ids: Tensor, capacity: int
) -> LocalTokens:
    """A call's tensors as exchanges take them."""
    return LocalTokens(
        hidden_states.contiguous(),
        topk_weights.float().contiguous(),
        topk_ids.contiguous(),
        layer.placement,
        capacity,
        replicated=layer.session.options.tokens == "replicated",
    )


def arrived_inputs(experts: ExpertWeights, arrived: Arrived) -> ArrivedInputs:
    """The rows that arrived as the dispatcher takes them, with this rank's weights."""
    weights, ids = arrived.topk_weights.contiguous(), arrived.topk_ids.contiguous()
    return ArrivedInputs(arrived.hidden_states, experts, weights, ids, arrived.out)


def _check_once(layer: ShardedExperts, tensors: tuple[Tensor, Tensor, Tensor], backend: str | None, out: Any) -> None:
    """Check a call unless one of its kind was checked before. The key has all that a check may ask of a call.

    A kind that comes often is settled: later calls of it are recognised by `SettledPlans`.

    Args:
        layer: The call's.
        tensors: Its hidden_states, topk_weights and topk_ids.
        backend: As the caller gives it.
        out: The caller's memory for the output, if any.
    """
    local = layer.local
    hidden_states, topk_weights, topk_ids = tensors
    arguments = hidden_states, local, topk_weights, topk_ids
    try:
        key: Any = (
            *[(type(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.layout) for tensor in tensors],
            needs_grad(*arguments[:3]),
            backend,
        )
        calls = 0 if out is not None or local.moved else layer.checked.get(key, 0)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # no tensors; the check says which
        calls, key = 0, None
    if not calls:
        check(*arguments, backend)
        if needs_grad(*arguments[:3]):
            raise InvalidInputError(
                "a layer that is spread over ranks has no gradient; call it under torch.no_grad() or "
                "torch.inference_mode()"
            )
        if out is not None:
            check_out(out, arguments, needs_grad=False)
        planner, mode = layer.session.dispatcher.planner, layer.session.mode
        (M, topk), capability = topk_ids.shape, planner.machine.capability
        planner.require(backend, local.problem(max(M, 1), topk, hidden_states.dtype, capability, mode))
    elif calls >= SETTLING_CALLS and not (any_autocast_enabled() or layer.session.capturing):
        layer.settled.keep(True, arguments, backend)
        calls = 0
    if _remember(layer.checked, key, calls + 1):
        layer.settled = SettledPlans(on_cuda=layer.device.type == "cuda")


def _remember(remembered: dict[Any, Any], key: Any, value: Any) -> bool:
    """Keep a value; returns whether everything before was forgotten to make room."""
    if full := len(remembered) >= _MAX_KINDS and key not in remembered:
        remembered.clear()
    remembered[key] = value
    return full
