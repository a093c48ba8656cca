"""The three public functions: run a layer, prepare for it, and explain the choice."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_dispatch.dispatch import call
from moe_dispatch.dispatch.explanation import Explanation
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine
from moe_dispatch.parallel.forward import forward_sharded
from moe_dispatch.parallel.sharded_experts import ShardedExperts


def moe_forward(
    hidden_states: Tensor,
    experts: ExpertWeights | ShardedExperts,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Run a Mixture-of-Experts layer on the fastest backend for this machine, dtype and token count.

    ``out[m] = Σ_j topk_weights[m, j] · down[e](act(gate_up[e](hidden_states[m])))`` with ``e = topk_ids[m, j]``; sums
    in fp32.

    Capturable in a CUDA graph once the same token count has run before (`warm_up`), and compiled by torch.compile
    with ``fullgraph=True``.

    Under torch.autocast on the layer's device, FP32 weights are cast to autocast's dtype, BF16 or FP16, and
    hidden_states to the weights'; the result is cast back, and gradients arrive in the dtypes of the tensors given.
    Each call casts all experts, so inference is faster with weights in BF16. Weights in half precision and quantised
    ones are never cast, and a layer that is spread over ranks is computed in the dtype of its tensors. Autocast reaches
    no further inside.

    Differentiable in hidden_states, topk_weights, the weights and the biases, compiled or not. Autograd keeps only the
    inputs of a call; the backward computes the product with gate_up and the activation again. It uses grouped products
    for BF16 weights on compute capability 9.x, and elsewhere goes expert by expert, which waits for the device once;
    `explain` says which, and why. It adds nothing atomically: the same inputs give the same bits. FP8 weights
    have no gradient themselves, and the quantisation of activations counts as the identity. Second derivatives
    (``create_graph=True``), forward mode and torch.func's transforms run the reference, which is slow.

    Args:
        hidden_states: ``[M, K]``; the weights' dtype, or BF16, FP16 or FP32 with quantised weights or under autocast.
        experts: The layer's weights; or this rank's part of a layer that `ExpertParallel` spread over ranks, with the
            whole layer's ids. Every rank of its group then makes the call; see `forward_sharded` for what it raises.
        topk_weights: ``[M, topk]``, fp32 (BF16 and FP16 are converted).
        topk_ids: ``[M, topk]``, int32 or int64. An id outside 0…E-1 adds nothing, whatever its weight (under
            expert parallelism, an expert of another rank). The same expert twice in a row counts twice.
        backend: Run this one or raise. None lets the policy choose and fall back.
        out: Memory for the output: ``[M, K]`` in hidden_states' dtype and on its device, contiguous, sharing no memory
            with the inputs. Not where a gradient is needed. After an exception its content is undefined.

    Returns:
        ``[M, K]`` in hidden_states' dtype; `out` where it is given, else fresh memory.

    Raises:
        InvalidInputError: Shapes, dtypes or devices do not fit; nothing was launched.
        BackendUnsupportedError: The named backend cannot run this; its reasons are listed.
        BackendUnavailableError: The named backend is missing or broken.
        BackendFailedError: The named backend raised.
        NoBackendError: Nothing can run this; every backend's reasons are listed.
        DeviceLostError: The CUDA context is gone; only a new process can go on.
    """
    if isinstance(experts, ShardedExperts):
        if torch.compiler.is_compiling():
            # The ranks talk to each other on the host, which a graph cannot hold.
            return call.uncompiled(forward_sharded, hidden_states, experts, topk_weights, topk_ids, backend, out)
        return forward_sharded(hidden_states, experts, topk_weights, topk_ids, backend, out)
    if torch.compiler.is_compiling():
        return call.call_traced(hidden_states, experts, topk_weights, topk_ids, backend, out)
    return call.call_eagerly(hidden_states, experts, topk_weights, topk_ids, backend, out)


def warm_up(
    experts: ExpertWeights,
    topk: int,
    tokens: Sequence[int],
    act_dtype: torch.dtype | None = None,
    *,
    up_to: int | None = None,
    backend: str | None = None,
    into_out: bool = False,
) -> None:
    """Compile and run once what calls of these token counts will run, eagerly and in a CUDA graph.

    Call it before capturing a graph or serving the first request: kernels compile, foreign backends are probed, and a
    backend that fails is replaced now instead of then.

    Args:
        experts: The layer's weights.
        topk: Experts per token.
        tokens: Token counts; a captured graph needs its own in here.
        act_dtype: The dtype of hidden_states. None stands for the weights' own, or BF16 with FP8 weights.
        up_to: Also prepare for every eager call of at most this many tokens: one of each kind that the policies
            distinguish is run.
        backend: The backend that the calls will name; None where the policy chooses.
        into_out: Whether the calls will give `out`.

    Raises:
        InvalidInputError: The experts or a number are not what is described above.
    """
    if torch.compiler.is_compiling():  # a trace through a backend fails, and would be held against it
        call.uncompiled(call.warm_up, experts, topk, tokens, act_dtype, backend, up_to, into_out=into_out)
    else:
        call.warm_up(experts, topk, tokens, act_dtype, backend, up_to, into_out=into_out)


def explain(*arguments: object, machine: Machine | None = None) -> Explanation:
    """Say what would run, why, and what speaks against everything else.

    Args:
        *arguments: A `MoEProblem`, or the four arguments of a live `moe_forward` call. Nothing of the call is run.
        machine: Answer for this machine instead of the one at hand.

    Returns:
        An `Explanation`; print it.

    Raises:
        InvalidInputError: The arguments are neither, or the problem is for another device than this machine has.
    """
    if torch.compiler.is_compiling():  # as for `warm_up`, for it probes
        return call.uncompiled(call.explain, arguments, machine)
    return call.explain(arguments, machine)
