"""The rules: what was measured, and a fallback for everything else."""

import pytest

from moe_dispatch.machine import Machine
from moe_dispatch.policies.rules import RulesPolicy
from moe_dispatch.problem import DType
from moe_dispatch.registry import BACKENDS, make_backend
from moe_dispatch.workloads import WORKLOADS

H200 = Machine.load("h200")
# The fastest backend at points that were measured on an H200.
MEASURED: dict[tuple[str, DType], dict[int, str]] = {
    ("deepseek-v3", "fp8"): {1: "triton_splitk", 64: "gluon_hopper", 256: "gluon_hopper", 16384: "gluon_hopper"},
    ("qwen3-30b-a3b", "fp8"): {32: "triton_splitk", 64: "triton_persistent", 16384: "gluon_hopper"},
    ("qwen3-235b", "fp8"): {1024: "gluon_hopper", 16384: "deep_gemm"},
    ("deepseek-v2-lite", "fp8"): {4096: "gluon_hopper"},
    ("kimi-k2-tp8", "fp8"): {16384: "gluon_hopper"},
    ("mixtral-8x7b", "fp8"): {16: "triton_splitk", 4096: "deep_gemm", 16384: "deep_gemm"},
    ("deepseek-v3", "bf16"): {1: "triton_vector", 256: "gluon_hopper", 4096: "gluon_hopper"},
    ("qwen3-30b-a3b", "bf16"): {256: "gluon_hopper", 16384: "gluon_hopper"},
    ("qwen3-235b", "bf16"): {16384: "gluon_hopper"},
    ("gpt-oss-120b", "bf16"): {16384: "gluon_hopper"},
    ("gpt-oss-120b", "fp8"): {64: "triton_splitk", 128: "triton_persistent", 512: "triton_persistent"},
    ("gpt-oss-120b", "mxfp4"): {64: "triton_splitk", 128: "gluon_hopper", 1024: "gluon_hopper"},
    ("mixtral-8x7b", "bf16"): {64: "triton_persistent", 128: "gluon_hopper", 16384: "gluon_hopper"},
}


@pytest.mark.parametrize(
    ("model", "dtype", "M", "first"),
    [(*layer, M, first) for layer, fastest in MEASURED.items() for M, first in fastest.items()],
)
def test_the_fastest_measured_comes_first_on_an_h200(model: str, dtype: DType, M: int, first: str) -> None:
    problem = WORKLOADS[model].problem(M, dtype, H200)
    ranked = (make_backend(choice.backend, H200).require() for choice in RulesPolicy(H200).rank(problem))
    assert next(backend.name for backend in ranked if not backend.requirements.reasons_against(problem)) == first


@pytest.mark.parametrize("name", ["a100-80gb", "l40s", "b200"])
def test_where_nothing_was_measured_ours_come_first(name: str) -> None:
    machine = Machine.load(name)
    policy = RulesPolicy(machine)
    layer = WORKLOADS["mixtral-8x7b"]
    assert policy.rank(layer.problem(1, "bf16", machine))[0].backend == "triton_vector"
    assert policy.rank(layer.problem(4, "bf16", machine))[0].backend == "triton_splitk"
    assert policy.rank(layer.problem(4096, "bf16", machine))[0].backend == "triton_persistent"


def test_where_kernels_convert_fp8_vectors_come_first_for_one_or_two_tokens_of_short_n() -> None:
    a100 = Machine.load("a100-80gb")
    for name, M, first in (
        ("qwen3-30b-a3b", 1, "triton_vector"), ("kimi-k2-tp8", 1, "triton_vector"), ("kimi-k2-tp8", 2, "triton_splitk"),
        ("qwen3-30b-a3b", 2, "triton_vector"), ("qwen3-30b-a3b", 4, "triton_splitk"),
        ("deepseek-v2-lite", 1, "triton_splitk"), ("deepseek-v3", 1, "triton_splitk"),
    ):  # fmt: skip
        assert RulesPolicy(a100).rank(WORKLOADS[name].problem(M, "fp8", a100))[0].backend == first, (name, M)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b"])
def test_split_k_is_first_up_to_64_tokens_where_both_products_are_one_launch(name: str) -> None:
    a100 = Machine.load("a100-80gb")
    for M, first in ((48, "triton_splitk"), (64, "triton_splitk"), (65, "triton_persistent")):
        assert RulesPolicy(a100).rank(WORKLOADS[name].problem(M, "bf16", a100))[0].backend == first, M


@pytest.mark.parametrize("name", ["a100-80gb", "l40s", "h200", "b200"])
@pytest.mark.parametrize("M", [1, 64, 65, 512, 16384])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_every_built_in_backend_is_ranked_once_the_reference_last(name: str, M: int, dtype: DType) -> None:
    machine = Machine.load(name)
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
    ("name", "dtype", "suits"),
    [
        ("qwen3-30b-a3b", "bf16", {1: True, 4: True, 16: False}),
        ("deepseek-v3", "bf16", {1: True, 4: False}),
        ("mixtral-8x7b", "bf16", {1: True, 4: False}),
        ("deepseek-v2-lite", "bf16", {1: True, 2: False}),
        ("gpt-oss-120b", "bf16", {1: False}),
        ("qwen3-235b", "bf16", {1: True, 2: False}),
        ("qwen3-30b-a3b", "fp8", {1: True, 4: True, 8: False}),
        ("kimi-k2-tp8", "fp8", {1: True, 4: True, 8: False}),
        ("deepseek-v3", "fp8", {1: False}),
    ],
)
def test_the_vector_kernels_come_first_where_experts_are_not_shared(
    name: str, dtype: DType, suits: dict[int, bool]
) -> None:
    for M, first in suits.items():
        ranked = [choice.backend for choice in RulesPolicy(H200).rank(WORKLOADS[name].problem(M, dtype, H200))]
        # Else they are the last resort but one: they read an expert's weights again for each of its slots.
        assert ranked.index("triton_vector") == (0 if first else len(ranked) - 2), M
