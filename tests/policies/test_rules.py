"""The rules: what was measured, and a fallback for everything else."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_dispatch.machine import Machine
from moe_dispatch.policies.rules import RulesPolicy
from moe_dispatch.problem import DType
from moe_dispatch.registry import BACKENDS, make_backend
from moe_dispatch.workloads import WORKLOADS

MACHINES = Path(__file__).parents[1] / "machines"


@dataclass(frozen=True)
class Case:
    """A point measured on an H200, and the fastest there."""

    model: str
    dtype: DType
    M: int
    first: str


MEASURED = (
    Case("deepseek-v3", "fp8", 1, "triton_splitk"),
    Case("deepseek-v3", "fp8", 256, "gluon_hopper"),
    Case("deepseek-v3", "fp8", 4096, "gluon_hopper"),
    Case("deepseek-v3", "fp8", 16384, "gluon_hopper"),
    Case("qwen3-30b-a3b", "fp8", 64, "triton_splitk"),
    Case("qwen3-30b-a3b", "fp8", 512, "triton_persistent"),
    Case("qwen3-30b-a3b", "fp8", 16384, "gluon_hopper"),
    Case("qwen3-235b", "fp8", 1024, "gluon_hopper"),
    Case("qwen3-235b", "fp8", 16384, "deep_gemm"),
    Case("deepseek-v2-lite", "fp8", 4096, "gluon_hopper"),
    Case("kimi-k2-tp8", "fp8", 16384, "gluon_hopper"),
    Case("mixtral-8x7b", "fp8", 16, "triton_splitk"),
    Case("mixtral-8x7b", "fp8", 4096, "deep_gemm"),
    Case("mixtral-8x7b", "fp8", 16384, "deep_gemm"),
    Case("deepseek-v3", "bf16", 1, "triton_vector"),
    Case("deepseek-v3", "bf16", 1024, "gluon_hopper"),
    Case("deepseek-v3", "bf16", 4096, "gluon_hopper"),
    Case("qwen3-30b-a3b", "bf16", 256, "gluon_hopper"),
    Case("qwen3-30b-a3b", "bf16", 16384, "gluon_hopper"),
    Case("qwen3-235b", "bf16", 16384, "gluon_hopper"),
    Case("gpt-oss-120b", "bf16", 16384, "gluon_hopper"),
    Case("mixtral-8x7b", "bf16", 16384, "gluon_hopper"),
)


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_the_fastest_measured_comes_first_on_an_h200(case: Case) -> None:
    machine = Machine.load(MACHINES / "h200.json")
    problem = WORKLOADS[case.model].problem(case.M, case.dtype, machine)
    ranked = (make_backend(choice.backend, machine).require() for choice in RulesPolicy(machine).rank(problem))
    assert next(backend.name for backend in ranked if not backend.requirements.reasons_against(problem)) == case.first


@pytest.mark.parametrize("name", ["a100", "l40s", "b200"])
def test_where_nothing_was_measured_ours_come_first(name: str) -> None:
    machine = Machine.load(MACHINES / f"{name}.json")
    policy = RulesPolicy(machine)
    layer = WORKLOADS["mixtral-8x7b"]
    assert policy.rank(layer.problem(1, "bf16", machine))[0].backend == "triton_vector"
    assert policy.rank(layer.problem(4, "bf16", machine))[0].backend == "triton_splitk"
    assert policy.rank(layer.problem(4096, "bf16", machine))[0].backend == "triton_persistent"


@pytest.mark.parametrize("name", ["a100", "l40s", "h200", "b200"])
@pytest.mark.parametrize("M", [1, 64, 65, 512, 16384])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_every_built_in_backend_is_ranked_once_the_reference_last(name: str, M: int, dtype: DType) -> None:
    machine = Machine.load(MACHINES / f"{name}.json")
    choices = RulesPolicy(machine).rank(WORKLOADS["deepseek-v3"].problem(M, dtype, machine))
    names = [choice.backend for choice in choices]
    assert len(set(names)) == len(names)
    assert set(names) <= set(BACKENDS.names())
    assert len(names) == 7 + (machine.capability == (9, 0))  # gluon_hopper is for Hopper alone
    assert names[-1] == "reference"
    assert all(choice.reason for choice in choices)


def test_a_cpu_gets_torch_and_the_reference() -> None:
    machine = Machine.inspect("cpu")
    choices = RulesPolicy(machine).rank(WORKLOADS["deepseek-v3"].problem(4, "fp32", machine))
    assert [choice.backend for choice in choices] == ["torch_grouped", "reference"]


@pytest.mark.parametrize(
    ("name", "dtype", "M", "suits"),
    [
        ("qwen3-30b-a3b", "bf16", 1, True),
        ("qwen3-30b-a3b", "bf16", 4, True),
        ("qwen3-30b-a3b", "bf16", 16, False),
        ("deepseek-v3", "bf16", 1, True),
        ("deepseek-v3", "bf16", 4, False),
        ("mixtral-8x7b", "bf16", 1, True),
        ("mixtral-8x7b", "bf16", 4, False),
        ("deepseek-v2-lite", "bf16", 1, False),
        ("qwen3-235b", "bf16", 1, True),
        ("qwen3-235b", "bf16", 2, False),
        ("qwen3-30b-a3b", "fp8", 1, True),
        ("kimi-k2-tp8", "fp8", 1, True),
        ("qwen3-30b-a3b", "fp8", 4, True),
        ("qwen3-30b-a3b", "fp8", 8, False),
        ("kimi-k2-tp8", "fp8", 4, False),
        ("deepseek-v3", "fp8", 1, False),
    ],
)
def test_the_vector_kernels_come_first_where_experts_are_not_shared(
    name: str, dtype: DType, M: int, suits: bool
) -> None:
    machine = Machine.load(MACHINES / "h200.json")
    ranked = [choice.backend for choice in RulesPolicy(machine).rank(WORKLOADS[name].problem(M, dtype, machine))]
    # Else they are the last resort but one: they read an expert's weights again for each of its slots.
    assert ranked.index("triton_vector") == (0 if suits else len(ranked) - 2)
