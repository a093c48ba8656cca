"""Warming up for every token count: one of each kind is run, and no kind is left out."""

import torch

from moe_dispatch import ExpertWeights, warm_up
from moe_dispatch.dispatch.coverage import representative_token_counts
from moe_dispatch.dispatch.process import get_dispatcher

EXPERTS = ExpertWeights(torch.randn(4, 64, 32), torch.randn(4, 32, 32))
MOST = 100


def test_every_kind_of_call_is_represented_at_both_of_its_ends() -> None:
    planner = get_dispatcher("cpu").planner
    counts = representative_token_counts(planner, EXPERTS, 2, torch.float32, None, MOST)

    def kind(M: int) -> object:
        plan = next(planner.eligible(EXPERTS.problem(M, 2, torch.float32, None), EXPERTS))
        return plan.proof, M % 16 == 0

    assert {kind(M) for M in counts} == {kind(M) for M in range(1, MOST + 1)}
    assert len(counts) <= 2 * len({kind(M) for M in counts})


def test_after_a_warm_up_no_call_is_a_first_run() -> None:
    warm_up(EXPERTS, 2, (), up_to=MOST)
    planner = get_dispatcher("cpu").planner
    for M in range(1, MOST + 1):
        assert planner.plan(EXPERTS.problem(M, 2, torch.float32, None), EXPERTS).proven, M
