"""The one call, and the question why."""

import dataclasses
import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from moe_dispatch import ops
from moe_dispatch.dispatcher import Dispatcher, get_dispatcher
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.explain import Explanation
from moe_dispatch.machine import Machine
from moe_dispatch.problem import MoEProblem
from moe_dispatch.workloads import ROUTINGS

_ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)
_IDS = (torch.int32, torch.int64)


def moe_forward(
    hidden_states: Tensor,
    experts: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Run a Mixture-of-Experts layer on the fastest backend for this machine, dtype and token count.

    out[m] = Σ_j topk_weights[m, j] · down[e](act(gate_up[e](hidden_states[m]))) with e = topk_ids[m, j]; sums in fp32.

    Capturable in a CUDA graph once the same token count has run before (`warm_up`), and compiled by torch.compile
    with ``fullgraph=True``. Differentiable through the reference backend, for which a compiled graph breaks.

    Args:
        hidden_states: ``[M, K]``; the weights' dtype, or BF16, FP16 or FP32 with block FP8 weights.
        experts: The layer's weights.
        topk_weights: ``[M, topk]``, fp32 (BF16 and FP16 are converted).
        topk_ids: ``[M, topk]``, int32 or int64. An id outside 0…E-1 adds nothing, whatever its weight: expert
            parallelism's "not mine". The same expert twice in a row counts twice.
        backend: Run this one or raise. None lets the policy choose and fall back.

    Returns:
        ``[M, K]`` in hidden_states' dtype; fresh memory.

    Raises:
        InvalidInputError: Shapes, dtypes or devices do not fit; nothing was launched.
        BackendUnsupportedError: The named backend cannot run this; its reasons are listed.
        BackendUnavailableError: The named backend is missing or broken.
        BackendFailedError: The named backend raised.
        NoBackendError: Nothing can run this; every backend's reasons are listed.
        DeviceLostError: The CUDA context is gone; only a new process can go on.
    """
    _check(hidden_states, experts, topk_weights, topk_ids)
    if torch.compiler.is_compiling():
        if experts.wants_grad(hidden_states, topk_weights):
            from moe_dispatch.uncompiled import dispatch_uncompiled

            out: Tensor = dispatch_uncompiled(hidden_states, experts, topk_weights, topk_ids, backend)
            return out
        return ops.call(hidden_states, experts, topk_weights, topk_ids, backend)
    return dispatch(hidden_states, experts, topk_weights, topk_ids, backend)


def dispatch(
    hidden_states: Tensor, experts: ExpertWeights, topk_weights: Tensor, topk_ids: Tensor, backend: str | None
) -> Tensor:
    """`moe_forward` behind its checks: settle what a backend may rely on, and hand over."""
    if hidden_states.shape[0] == 0:
        return hidden_states.clone()  # not empty_like: a gradient may pass through it
    if topk_weights.dtype is not torch.float32:
        topk_weights = topk_weights.float()
    dispatcher = get_dispatcher(experts.device)
    inputs = (hidden_states.contiguous(), experts, topk_weights.contiguous(), topk_ids.contiguous(), backend)
    if _elsewhere(experts.device):
        with torch.cuda.device(experts.device):
            return dispatcher.forward(*inputs)
    return dispatcher.forward(*inputs)


def _elsewhere(device: torch.device) -> bool:
    """Whether another GPU is current: Triton and DeepGEMM launch there, whatever the tensors say."""
    return device.type == "cuda" and _several_gpus() and torch.cuda.current_device() != device.index


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one, off the hot path; nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def _several_gpus() -> bool:
    return torch.cuda.device_count() > 1


def warm_up(
    experts: ExpertWeights,
    topk: int,
    tokens: Sequence[int],
    act_dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> None:
    """Compile and prove what calls of these token counts will run, eagerly and in a CUDA graph.

    Call it before capturing a graph or serving the first request: kernels compile, foreign backends are probed, and a
    backend that fails is replaced now instead of then.

    Args:
        experts: The layer's weights.
        topk: Experts per token.
        tokens: Token counts.
        act_dtype: Of hidden_states; the weights' own, or BF16 with block FP8 weights, if None.
        backend: The one that the calls will name; None where the policy chooses.
    """
    dtype = act_dtype or (torch.bfloat16 if experts.dtype == "fp8" else experts.gate_up.dtype)
    device = experts.device
    for M in filter(None, tokens):
        hidden_states = torch.randn(M, experts.K, device=device).to(dtype)
        weights, ids = ROUTINGS["uniform"].sample(M, experts.E, topk, device)
        with torch.no_grad(), _current(device):
            get_dispatcher(device).warm_up((hidden_states, experts, weights, ids), backend)


def explain(*asked: object, machine: Machine | None = None) -> Explanation:
    """Say what would run, why, and what speaks against everything else.

    Args:
        *asked: A `MoEProblem`, or the four arguments of a live `moe_forward` call. Nothing of the call is run.
        machine: Answer for this machine instead of the one at hand.

    Returns:
        An `Explanation`; print it.
    """
    if len(asked) == 1 and isinstance(asked[0], MoEProblem):
        problem = asked[0]
        dispatcher = Dispatcher(machine, live=False) if machine else _dispatcher_for(problem)
        return dispatcher.explain(problem)
    if len(asked) != 4:
        raise InvalidInputError(
            "explain takes a MoEProblem, or hidden_states, experts, topk_weights and topk_ids as moe_forward does; "
            f"got {len(asked)} arguments: {', '.join(type(one).__name__ for one in asked)}"
        )
    hidden_states, experts, topk_weights, topk_ids = asked
    _check(hidden_states, experts, topk_weights, topk_ids)  # type: ignore[arg-type]  # this is what it checks
    assert isinstance(hidden_states, Tensor)  # noqa: S101 - checked above, repeated for the type checker
    assert isinstance(experts, ExpertWeights)  # noqa: S101
    assert isinstance(topk_weights, Tensor)  # noqa: S101
    assert isinstance(topk_ids, Tensor)  # noqa: S101
    there = machine or get_dispatcher(experts.device).machine
    M, topk = topk_ids.shape
    problem = experts.problem(M, topk, hidden_states.dtype, there.capability)
    problem = dataclasses.replace(
        problem, device=there.device, needs_grad=experts.wants_grad(hidden_states, topk_weights)
    )
    if machine:
        return Dispatcher(machine, live=False).explain(problem)
    with _current(experts.device):
        return get_dispatcher(experts.device).explain(problem)


def _dispatcher_for(problem: MoEProblem) -> Dispatcher:
    here = get_dispatcher("cpu" if problem.device == "cpu" else None)
    if (problem.device, problem.capability) == (here.machine.device, here.machine.capability):
        return here
    raise InvalidInputError(
        f"the problem is for {problem.device} {problem.capability}, and this machine is {here.machine.name} "
        f"({here.machine.device} {here.machine.capability}); give `machine=Machine.load(FILE)` to ask for another one"
    )


def _check(hidden_states: Tensor, experts: ExpertWeights, topk_weights: Tensor, topk_ids: Tensor) -> None:
    """Refuse what no backend could take. The happy path is one expression: it runs on every call."""
    if (
        isinstance(experts, ExpertWeights)
        and isinstance(hidden_states, Tensor)
        and isinstance(topk_weights, Tensor)
        and isinstance(topk_ids, Tensor)
        and hidden_states.dim() == topk_ids.dim() == 2
        and hidden_states.shape[1] == experts.K
        and topk_weights.shape == topk_ids.shape
        and topk_ids.shape[0] == hidden_states.shape[0]
        and topk_ids.shape[1] > 0
        and hidden_states.dtype in (_ACTIVATIONS if experts.dtype == "fp8" else (experts.gate_up.dtype,))
        and topk_weights.dtype in _ACTIVATIONS
        and topk_ids.dtype in _IDS
        and hidden_states.device == topk_weights.device == topk_ids.device == experts.device
    ):
        return
    raise InvalidInputError(_complaint(hidden_states, experts, topk_weights, topk_ids))


def _complaint(hidden_states: object, experts: object, topk_weights: object, topk_ids: object) -> str:
    """What is wrong with the arguments of a call, in their order; the first fault found."""
    if not isinstance(experts, ExpertWeights):
        return f"experts must be ExpertWeights(gate_up, down), got {type(experts).__name__}"
    tensors = {"hidden_states": hidden_states, "topk_weights": topk_weights, "topk_ids": topk_ids}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            return f"{name} must be a torch.Tensor, got {type(tensor).__name__}"
        if tensor.dim() != 2:
            return f"{name} must be two-dimensional, got shape {list(tensor.shape)}; flatten batch and sequence first"
        if tensor.device != experts.device:
            return f"{name} is on {tensor.device} and the experts are on {experts.device}; move one of them"
    assert isinstance(hidden_states, Tensor)  # noqa: S101 - checked above, repeated for the type checker
    assert isinstance(topk_weights, Tensor)  # noqa: S101
    assert isinstance(topk_ids, Tensor)  # noqa: S101
    if topk_ids.dtype in _ACTIVATIONS and topk_weights.dtype in _IDS:
        return "topk_weights and topk_ids are swapped: the order is hidden_states, experts, topk_weights, topk_ids"
    if topk_ids.dtype not in _IDS:
        return f"topk_ids must be int32 or int64, got {topk_ids.dtype}"
    if topk_weights.dtype not in _ACTIVATIONS:
        return f"topk_weights must be float32 (bfloat16 and float16 are converted), got {topk_weights.dtype}"
    if hidden_states.shape[1] != experts.K:
        return f"hidden_states must be [M, K={experts.K}] for {experts}, got {list(hidden_states.shape)}"
    if topk_weights.shape != topk_ids.shape:
        return f"topk_weights {list(topk_weights.shape)} and topk_ids {list(topk_ids.shape)} must both be [M, topk]"
    if topk_ids.shape[0] != hidden_states.shape[0]:
        return (
            f"hidden_states has M={hidden_states.shape[0]} tokens and topk_ids routes {topk_ids.shape[0]}; "
            "both must be [M, …]"
        )
    if topk_ids.shape[1] == 0:
        return "topk_ids must be [M, topk] with topk at least 1, got topk=0"
    return (
        f"hidden_states is {hidden_states.dtype} and the experts are {experts.dtype}; they must share a dtype, "
        "except that block FP8 experts take bfloat16, float16 or float32 activations"
    )
