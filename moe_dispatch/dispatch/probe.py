"""Probes of foreign backends: a tiny layer is run and compared with the reference before anything real is."""

import dataclasses
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from moe_dispatch.backend import Backend, Inputs
from moe_dispatch.dispatch.checks import result_fault, shares_memory
from moe_dispatch.dispatch.watched_runs import same_bits
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.guard import foreign_errors
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import BACKENDS, LAST_RESORT
from moe_dispatch.system import failures
from moe_dispatch.workloads import ROUTINGS, make_experts, torch_dtype

SEED: Final = 20


@dataclass(frozen=True)
class _Trial:
    """One of the calls that a probe makes.

    Attributes:
        inputs: The call's arguments.
        truth: The right answer, fp32 ``[M, K]``.
        before: Copies of all tensors that the backend sees.
    """

    inputs: Inputs
    truth: Tensor
    before: tuple[Tensor, ...]


def probe(backend: Backend, problem: MoEProblem, device: torch.device) -> str:
    """Run a tiny layer of the problem's dtypes, activation and biases through a backend, on three inputs.

    The routing holds what a backend must get right and a benchmark never shows: ids outside 0…E-1 with NaN for weights,
    and the same expert twice in a row. The third run goes into memory of ours. All results are compared after the last
    run, and the inputs with copies.

    Returns:
        Why the backend cannot be trusted; empty if its results are right. What it raises becomes the reason, unless it
        is a lost device or a lack of memory, which is raised on.
    """
    tiny = dataclasses.replace(problem, M=5, K=256, N=256, E=4, topk=2, mode="eager", needs_grad=False)
    if backend.unsupported_reasons(tiny):
        tiny = dataclasses.replace(tiny, K=1024, N=1024)
    tolerance = backend.tolerance.get(tiny.dtype)
    if not isinstance(tolerance, int | float):
        return "it declares no tolerance for weights of this dtype, by which its probe could be judged"
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        experts = make_experts(
            tiny, tiny.dtype, device, torch.Generator(device).manual_seed(SEED), act_dtype=tiny.act_dtype
        )
        trials = [_trial(backend, tiny, experts, seed) for seed in range(SEED, SEED + 3)]
        ours = torch.full_like(trials[-1].inputs[0], torch.nan)
        try:
            config = backend.default_config(tiny)
            outs = [backend.run(*trial.inputs, config) for trial in trials[:-1]]
            for out, trial in zip(outs, trials, strict=False):
                if fault := result_fault(out, trial.inputs):  # which run_into would stumble over
                    return f"its probe was wrong: {fault}"
            outs.append(backend.run_into(*trials[-1].inputs, config, ours))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except foreign_errors() as error:
            if failures.lost_device(error) or failures.out_of_memory(error):
                raise  # says nothing about the backend's arithmetic
            return f"its probe raised {failures.summary(error)}"
        if outs[-1] is not ours:
            return "its probe was wrong: run_into returned another tensor than the one it was to write into"
        return _verdict(outs, trials, tolerance)


def _trial(backend: Backend, tiny: MoEProblem, experts: ExpertWeights, seed: int) -> _Trial:
    device = experts.device
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(tiny.M, tiny.K, generator=generator, dtype=torch.float32, device=device)
    weights, ids = ROUTINGS["uniform"].sample(tiny.M, tiny.E, tiny.topk, "cpu", torch.Generator().manual_seed(seed))
    ids[0, 0], ids[1, 1] = -1, tiny.E
    weights[0, 0] = weights[1, 1] = torch.nan
    ids[2, 1] = ids[2, 0]
    inputs = (hidden.to(torch_dtype(tiny.act_dtype)), experts, weights.to(device), ids.to(device))
    reference = BACKENDS.load(LAST_RESORT)(backend.machine)
    config = reference.config_type.model_validate(
        {"compute_fp32": True, "quantize_activations": backend.quantizes_activations(tiny)}
    )
    return _Trial(inputs, reference.run(*inputs, config).float(), tuple(tensor.clone() for tensor in _seen(inputs)))


def _seen(inputs: Inputs) -> tuple[Tensor, ...]:
    """The tensors that a backend could write to, or return memory of."""
    hidden_states, experts, topk_weights, topk_ids = inputs
    return hidden_states, topk_weights, topk_ids, *(tensor for _, tensor in experts.tensors())


def _verdict(outs: list[Tensor], trials: list[_Trial], tolerance: float) -> str:
    """What is wrong with a probe's results; empty if nothing is."""
    for out, trial in zip(outs, trials, strict=True):
        if fault := result_fault(out, trial.inputs):
            return f"its probe was wrong: {fault}"
        if not all(map(same_bits, _seen(trial.inputs), trial.before)):
            return "its probe was wrong: it wrote to its inputs"
    if shares_memory(outs[0], outs[1]):
        return "its probe was wrong: it returned the same memory for two calls, and each output must be fresh memory"
    for out, trial in zip(outs, trials, strict=True):
        error = ((out.float() - trial.truth).norm() / trial.truth.norm()).item()
        if not error <= tolerance:  # NaN included
            return f"its probe was wrong: relative error {error:.3g} against fp32, at most {tolerance:g} is allowed"
    return ""
