"""The one call, and the question why."""

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moe_dispatch.dispatch import torch_operator
from moe_dispatch.dispatch.checks import check
from moe_dispatch.dispatch.dispatcher import Dispatcher
from moe_dispatch.dispatch.explanation import Explanation
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine
from moe_dispatch.problem import MoEProblem
from moe_dispatch.workloads import ROUTINGS


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
    Autocast does not reach inside: the layer is computed in the dtype of its tensors.

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
    if torch.compiler.is_compiling():
        return _compiled(hidden_states, experts, topk_weights, topk_ids, backend)
    return dispatch(hidden_states, experts, topk_weights, topk_ids, backend)


def dispatch(
    hidden_states: Tensor, experts: ExpertWeights, topk_weights: Tensor, topk_ids: Tensor, backend: str | None
) -> Tensor:
    """`moe_forward` outside a compiled graph: in the layer's own dtype, on its GPU, hand over."""
    if not isinstance(experts, ExpertWeights):
        check(hidden_states, experts, topk_weights, topk_ids)  # raises
    if type(hidden_states) is not Tensor and isinstance(hidden_states, FakeTensor):
        return torch_operator.call(
            hidden_states, experts, topk_weights, topk_ids, backend
        )  # which knows the shape of its result
    device = experts.device
    # The private question costs a sixth of the public one.
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device.type):
        # What torch computes would be rounded, what kernels compute would not: the result would hang on the backend.
        with torch.autocast(device.type, enabled=False):
            return dispatch(hidden_states, experts, topk_weights, topk_ids, backend)
    dispatcher = get_dispatcher(device)
    # Triton and DeepGEMM launch on the current GPU, whatever the tensors say.
    if dispatcher.one_of_several_gpus and torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            return dispatcher.forward(hidden_states, experts, topk_weights, topk_ids, backend)
    return dispatcher.forward(hidden_states, experts, topk_weights, topk_ids, backend)


def _compiled(
    hidden_states: Tensor, experts: ExpertWeights, topk_weights: Tensor, topk_ids: Tensor, backend: str | None
) -> Tensor:
    """`moe_forward` while torch.compile traces it.

    What does not fit is found when the operator runs. An exception in a trace would be the last that torch.compile sees
    of this function: it would trace what that calls from then on, down to a backend, which fails of that.
    """
    tensors = isinstance(hidden_states, Tensor) and isinstance(topk_weights, Tensor) and isinstance(topk_ids, Tensor)
    if not (tensors and isinstance(experts, ExpertWeights)) or experts.wants_grad(hidden_states, topk_weights):
        from moe_dispatch.dispatch.uncompiled import call_uncompiled

        # The reference's loop launches what the routing asks for.
        out: Tensor = call_uncompiled(dispatch, hidden_states, experts, topk_weights, topk_ids, backend)
        return out
    return torch_operator.call(hidden_states, experts, topk_weights, topk_ids, backend)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one, off the hot path; nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


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
        return dispatcher.planner.explain(problem)
    if len(asked) != 4:
        raise InvalidInputError(
            "explain takes a MoEProblem, or hidden_states, experts, topk_weights and topk_ids as moe_forward does; "
            f"got {len(asked)} arguments: {', '.join(type(one).__name__ for one in asked)}"
        )
    hidden_states, experts, topk_weights, topk_ids = asked
    check(hidden_states, experts, topk_weights, topk_ids)  # type: ignore[arg-type]  # this is what it checks
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
        return Dispatcher(machine, live=False).planner.explain(problem)
    with _current(experts.device):
        return get_dispatcher(experts.device).planner.explain(problem)


def _dispatcher_for(problem: MoEProblem) -> Dispatcher:
    here = get_dispatcher("cpu" if problem.device == "cpu" else None)
    if (problem.device, problem.capability) == (here.machine.device, here.machine.capability):
        return here
    raise InvalidInputError(
        f"the problem is for {problem.device} {problem.capability}, and this machine is {here.machine.name} "
        f"({here.machine.device} {here.machine.capability}); give `machine=Machine.load(FILE)` to ask for another one"
    )
