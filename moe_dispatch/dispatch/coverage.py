"""Which token counts stand for all others: running one of each kind leaves nothing to compile or to prove."""

import torch

from moe_dispatch.dispatch.planner import Planner
from moe_dispatch.experts import ExpertWeights

# Triton compiles another binary where an integer argument is divisible by this.
_DIVISOR = 16


def representative_token_counts(
    planner: Planner,
    experts: ExpertWeights,
    topk: int,
    act_dtype: torch.dtype,
    capability: tuple[int, int] | None,
    most: int,
    backend: str | None = None,
) -> tuple[int, ...]:
    """The least and the greatest token count of each kind of eager call with up to `most` tokens, in ascending order.

    Two token counts are of one kind where the same backend runs in the same configuration within the same power of two,
    and Triton specialises its kernels alike. Between the two ends launchers change no constant, though they may differ
    at both: a scan over blocks of slots takes the next power of two of their number.

    The planner chooses for each token count, and nothing is run; `backend` is the one that the calls will name, if any.
    """
    least: dict[object, int] = {}
    greatest: dict[object, int] = {}
    for M in range(1, most + 1):
        problem = experts.problem(M, topk, act_dtype, capability)
        plan = next(planner.eligible(problem, experts, backend), None)
        if plan is not None:
            kind = plan.proof, M % _DIVISOR == 0
            least.setdefault(kind, M)
            greatest[kind] = M
    return tuple(sorted({*least.values(), *greatest.values()}))
