"""A part of a layer's experts is ranked by the load that it expects, not by all slots of the call."""

import dataclasses

import pytest
import torch

from moe_dispatch import moe_forward
from moe_dispatch.dispatch import torch_operator
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine
from moe_dispatch.policies.learned.policy import LearnedPolicy
from moe_dispatch.policies.rules import RulesPolicy
from moe_dispatch.policies.shipped import ShippedPolicy
from moe_dispatch.policy import Policy
from moe_dispatch.problem import DType, MoEProblem
from moe_dispatch.registry import make_backend
from moe_dispatch.workloads import WORKLOADS

pytestmark = pytest.mark.usefixtures("compiling")
H200 = Machine.load("h200")
LAYERS: tuple[tuple[str, DType], ...] = (("deepseek-v3", "fp8"), ("qwen3-30b-a3b", "bf16"))
TOKENS = tuple(4**power for power in range(8))


def part(name: str, dtype: DType, M: int, ranks: int = 2) -> MoEProblem:
    """The problem of one of `ranks` ranks that each hold as many of a named layer's experts and see all M tokens."""
    whole = WORKLOADS[name].problem(M, dtype, H200, "graph")
    return dataclasses.replace(whole, E=whole.E // ranks, routed_experts=whole.E)


@pytest.mark.parametrize("policy", [RulesPolicy, ShippedPolicy])
@pytest.mark.parametrize(("name", "dtype"), LAYERS)
def test_a_part_is_ranked_as_a_layer_with_its_load(policy: type[Policy], name: str, dtype: DType) -> None:
    ranking = policy(H200)
    for M in TOKENS:
        problem = part(name, dtype, M)
        load = dataclasses.replace(problem, topk=problem.topk // 2, routed_experts=None)
        assert problem.whole_layer == load
        assert _able(ranking, problem, problem) == _able(ranking, load, problem)


@pytest.mark.parametrize(("name", "dtype"), LAYERS)
def test_cost_models_take_a_part_for_a_layer_that_half_the_tokens_reach(name: str, dtype: DType) -> None:
    ranking = LearnedPolicy(H200)
    for M in TOKENS[1:]:
        problem = part(name, dtype, M)
        load = dataclasses.replace(problem, M=M // 2, routed_experts=None)
        assert dict(_able(ranking, problem, problem)) == pytest.approx(dict(_able(ranking, load, problem)), rel=0.05)


@pytest.mark.parametrize(("M", "first"), [(512, "triton_persistent"), (8192, "gluon_hopper"), (32768, "gluon_hopper")])
def test_what_was_fastest_for_half_of_the_experts_comes_first(M: int, first: str) -> None:
    problem = part("qwen3-30b-a3b", "bf16", M)
    assert _able(LearnedPolicy(H200), problem, problem)[0][0] == first


def _able(policy: Policy, ranked: MoEProblem, run: MoEProblem) -> list[tuple[str, float | None]]:
    """A policy's ranking of one problem, of the backends that can run another, with the times that it expects."""
    made = ((choice, make_backend(choice.backend, H200).backend) for choice in policy.rank(ranked))
    return [(choice.backend, choice.us) for choice, backend in made if backend and not backend.unsupported_reasons(run)]


@pytest.mark.parametrize("backend", ["triton_splitk", "triton_persistent", "deep_gemm"])
@pytest.mark.parametrize(("name", "dtype"), LAYERS)
def test_a_part_gets_the_configuration_of_its_load(backend: str, name: str, dtype: DType) -> None:
    behind = make_backend(backend, H200).backend
    assert behind is not None

    for problem in (part(name, dtype, M) for M in TOKENS):
        assert behind.default_config(problem) == behind.default_config(problem.whole_layer)


def test_the_expected_load_of_a_part() -> None:
    problem = part("deepseek-v3", "fp8", 16, ranks=64)
    assert problem.slots == 128
    assert problem.expected_slots == 2
    assert problem.expected_experts == pytest.approx(4 * (1 - (1 - 8 / 256) ** 16))
    assert problem.whole_layer == dataclasses.replace(problem, M=2, topk=1, routed_experts=None)
    assert problem.flops == problem.whole_layer.flops
    whole = dataclasses.replace(problem, routed_experts=None)
    assert whole.whole_layer is whole
    assert whole.expected_slots == whole.slots
    assert problem.roofline_us(4e12, 1e15) < whole.roofline_us(4e12, 1e15)


def test_fewer_routed_experts_than_there_are_here_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="at least E=4, got 3"):
        MoEProblem(M=1, K=8, N=8, E=4, topk=1, routed_experts=3)
    weights = torch.zeros(4, 16, 8), torch.zeros(4, 8, 8)
    with pytest.raises(InvalidInputError, match="at least the 4 experts here, got 3"):
        ExpertWeights(*weights, routed_experts=3)


def test_weights_carry_the_number_of_routed_experts() -> None:
    torch.manual_seed(0)
    gate_up, down = torch.randn(4, 16, 8) / 8**0.5, torch.randn(4, 8, 8) / 8**0.5
    experts = ExpertWeights(gate_up, down, routed_experts=8)
    plain = ExpertWeights(gate_up, down)
    assert experts.problem(3, 2, torch.float32, None).routed_experts == 8
    assert experts.spec is not plain.spec
    assert "routed_experts=8" in repr(experts)
    experts.down.data = experts.down.data.clone()
    experts.check_unchanged()
    hidden, weights = torch.randn(3, 8), torch.rand(3, 2)
    ids = torch.tensor([[0, 5], [3, 1], [7, -1]])
    assert torch.equal(moe_forward(hidden, experts, weights, ids), moe_forward(hidden, plain, weights, ids))
    compiled = torch_operator.call(hidden, experts, weights, ids, None)
    assert torch.equal(compiled, moe_forward(hidden, plain, weights, ids))
    layer = torch_operator._layers[id(experts.gate_up)].experts
    assert layer.routed_experts == 8
