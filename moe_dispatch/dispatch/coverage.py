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
    """One token count for each kind of eager call with up to `most` tokens, in ascending order.

    Two token counts are of one kind where the same backend runs in the same configuration within the same power of two,
    and Triton specialises its kernels alike.

    Args:
        planner: Chooses for each token count; nothing is run.
        experts: The layer's weights.
        topk: Experts per token.
        act_dtype: The dtype of hidden_states.
        capability: The device's compute capability; None on a CPU.
        most: Largest token count.
        backend: The backend that the calls will name, if any.
    """
    kinds: dict[object, int] = {}
    for M in range(1, most + 1):
        problem = experts.problem(M, topk, act_dtype, capability)
        plan = next(planner.eligible(problem, experts, backend), None)
        if plan is not None:
            kinds.setdefault((plan.kind, M % _DIVISOR == 0), M)
    return tuple(sorted(kinds.values()))
