"""Trust in foreign code, earned: a tiny layer is run and compared with the reference before anything real is."""

import dataclasses
from typing import Final

import torch
from torch import Tensor

from moe_dispatch.backend import Backend
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import BACKENDS
from moe_dispatch.system import failures
from moe_dispatch.workloads import ROUTINGS, make_experts, torch_dtype

SEED: Final = 20


def probe(backend: Backend, problem: MoEProblem, device: torch.device) -> str:
    """Run a tiny layer of the problem's dtypes and activation through a backend.

    Args:
        backend: The one on trial.
        problem: Whose dtypes, activation and biases the tiny layer has.
        device: Where to run.

    Returns:
        Why the backend cannot be trusted; empty if its result is right. What it raises becomes the reason, unless it
        is a lost device or a lack of memory, which is raised on.
    """
    tiny = dataclasses.replace(problem, M=5, K=256, N=256, E=4, topk=2, mode="eager", needs_grad=False)
    if backend.unsupported_reasons(tiny):
        tiny = dataclasses.replace(tiny, K=1024, N=1024)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        generator = torch.Generator(device).manual_seed(SEED)
        experts = make_experts(tiny, tiny.dtype, device, generator, act_dtype=tiny.act_dtype)
        hidden = torch.randn(tiny.M, tiny.K, generator=generator, device=device).to(torch_dtype(tiny.act_dtype))
        routing_generator = torch.Generator().manual_seed(SEED)
        weights, ids = ROUTINGS["uniform"].sample(tiny.M, tiny.E, tiny.topk, device, routing_generator)
        reference = BACKENDS.load("reference")(backend.machine)
        truth_config = reference.config_type.model_validate({"compute_fp32": True})
        truth = reference.run(hidden, experts, weights, ids, truth_config).float()
        try:
            out = backend.run(hidden, experts, weights, ids, backend.default_config(tiny))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:
            if failures.lost_device(error) or failures.out_of_memory(error):
                raise  # no verdict on the backend's arithmetic
            return f"its probe raised {failures.summary(error)}"
    return _fault(out, hidden, truth, backend.tolerance.get(tiny.dtype))


def _fault(out: object, hidden: Tensor, truth: Tensor, tolerance: float | None) -> str:
    """What is wrong with a result; empty if nothing is."""
    if not isinstance(out, Tensor):
        return f"its probe returned {type(out).__name__} in place of a tensor"
    if (out.dtype, out.shape) != (hidden.dtype, hidden.shape):
        given, wanted = f"{out.dtype} {list(out.shape)}", f"{hidden.dtype} {list(hidden.shape)}"
        return f"its probe was wrong: it returned {given} for hidden_states of {wanted}, which the output must be alike"
    if tolerance is None:
        return "it declares no tolerance for weights of this dtype, by which its probe could be judged"
    error_size = ((out.float() - truth).norm() / truth.norm()).item()
    if not error_size <= tolerance:  # NaN included
        return f"its probe was wrong: relative error {error_size:.3g} against fp32, at most {tolerance:g} is allowed"
    return ""
