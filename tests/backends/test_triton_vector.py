"""The vector kernels: interpreted against the fp32 reference, and compiled for devices that are not here."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import cast

import pytest
import torch

from moe_dispatch.backend import BackendConfig
from moe_dispatch.backends.triton_vector.backend import MOST_SLOTS, TritonVectorBackend
from moe_dispatch.backends.triton_vector.config import TritonVectorConfig, shared_memory_bytes
from moe_dispatch.backends.triton_vector.down import vector_down
from moe_dispatch.backends.triton_vector.layer import ARRIVAL_BYTES, vector_layer
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine
from moe_dispatch.policies.rules import VECTOR_FP8_BYTES, vector_suits
from moe_dispatch.problem import DType
from moe_dispatch.workloads import WORKLOADS, Workload
from tests.support.decode import Case, check_against_the_reference
from tests.support.triton_compile import (
    SHARED_MEMORY,
    Launch,
    compile_launches,
    described,
    devices,
    unwritten_layer,
)

FEW_SPILLS = 64  # bytes of a thread
SMALL = {"rows": 32, "down_rows": 32}
CHUNKS = SMALL | {"columns": 128, "down_columns": 128, "down_experts": 2}
CASES = [
    replace(case, why=f"{case.why}, {name}", config=tiles)
    for name, tiles in (("whole rows", SMALL), ("chunks", CHUNKS))
    for case in (
        Case("one token", M=1),
        Case("odd count", M=5),
        Case("no slot has a valid id", M=2, routing="-1"),
        Case("all slots to one expert", M=5, routing="2"),
        Case("int64", ids=torch.int64, K=300, N=200),
        Case("odd K and N", K=70, N=45, bias=True),
        Case("gelu", activation="gelu", bias=True),
        Case("gelu_tanh", activation="gelu_tanh", bias=True),
        Case("swiglu_oai", activation="swiglu_oai", bias=True),
        Case("relu2", activation="relu2", bias=True),
        Case("gpt-oss", K=400, N=240, activation="swiglu_oai", bias=True, interleaved=True),
        Case("fp16", dtype="fp16", bias=True, K=256, N=256, topk=3),
        Case("fp8", M=2, dtype="fp8", K=256, N=256),
        Case("fp8, cut blocks", dtype="fp8", K=200, N=72, bias=True, activation="swiglu_oai", interleaved=True),
        Case("fp8, shifted blocks", M=2, dtype="fp8", K=200, N=77, topk=3),
        Case("fp8, ungated", M=2, dtype="fp8", N=136, activation="relu2"),
    )
]


# In one launch: what each of a token's tiles adds to its counter, in cases that are quickly interpreted.
JOINED = {
    "one token, chunks", "odd count, chunks", "no slot has a valid id, chunks", "all slots to one expert, chunks",
    "odd K and N, chunks", "relu2, chunks", "fp8, ungated, chunks",
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", [case for case in CASES if str(case) in JOINED], ids=str)
def test_one_launch_gives_the_same_bits_and_leaves_its_counters_at_zero(case: Case) -> None:
    backend, experts, (x, weights, ids) = TritonVectorBackend(Machine.inspect("cpu")), case.experts(), case.tokens()
    two = TritonVectorConfig.model_validate(case.config)
    one = two.model_copy(update={"one_launch": True})
    expected = backend.run(x, experts, weights, ids, two)
    assert torch.equal(backend.run(x, experts, weights, ids, one), expected)
    inner, out = x.new_empty(ids.numel(), experts.N), torch.empty_like(x)
    arrivals = torch.zeros(case.M, ARRIVAL_BYTES // 4, dtype=torch.int32)
    for _ in range(2):
        vector_layer(x, experts, weights, ids, inner, arrivals, out, one, cleared_before=False)
        assert torch.equal(out, expected)
        assert not arrivals.any()
        out.fill_(torch.nan)


def test_the_cases_in_one_launch_exist() -> None:
    assert {str(case) for case in CASES} >= JOINED


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
def test_every_e4m3_code_is_converted_exactly() -> None:
    """Each is a weight of a down projection with one column, so that the output is its value."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    experts = ExpertWeights(
        torch.ones(1, 1, 256).to(torch.float8_e4m3fn), codes.view(1, 256, 1), activation="relu2",
        gate_up_scale=torch.ones(1, 1, 2), down_scale=torch.ones(1, 2, 1),
    )  # fmt: skip
    out, ids = torch.empty(1, 256), torch.zeros(1, 1, dtype=torch.int32)
    vector_down(torch.ones(1, 1), experts, torch.ones(1, 1), ids, out, TritonVectorConfig(down_rows=32))
    torch.testing.assert_close(out[0], codes.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case: Case) -> None:
    config = TritonVectorConfig.model_validate(case.config)
    check_against_the_reference(case, TritonVectorBackend(Machine.inspect("cpu")), config)


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_configs_fit_the_device(name: str, capability: int) -> None:
    backend = TritonVectorBackend(described(capability))
    for M in (1, 4, 16, 64):
        for dtype in cast("tuple[DType, ...]", ("bf16", "fp8") if capability >= 89 else ("bf16",)):
            problem = WORKLOADS[name].problem(M, dtype, backend.machine)
            configs = backend.configs(problem)
            assert configs[0] == backend.default_config(problem)
            assert len(set(configs)) == len(configs)
            for config in configs:
                assert shared_memory_bytes(config) <= backend.machine.shared_memory_per_block
                assert capability >= 90 or not config.pdl


@pytest.mark.parametrize("topk", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("N", [17, 128, 1000, 1024, 1025, 2048, 2049])
def test_the_rules_know_where_down_reads_all_experts_at_once(topk: int, N: int) -> None:
    """In FP8 the rules prefer these kernels only there, if a layer is small and its experts are not shared."""
    backend = TritonVectorBackend(described(90))
    layer = Workload("small", 4096, topk, 64, N)
    problem = layer.problem(1, "fp8", backend.machine)
    assert problem.expected_experts * problem.expert_bytes <= VECTOR_FP8_BYTES
    config = backend.default_config(problem)
    assert isinstance(config, TritonVectorConfig)
    assert vector_suits(problem) == (config.down_experts >= topk)


def test_workspace_is_what_the_launches_leave_behind() -> None:
    backend = TritonVectorBackend(described(90))
    bf16, fp8 = (WORKLOADS["qwen3-30b-a3b"].problem(2, dtype, backend.machine) for dtype in ("bf16", "fp8"))
    S, N = 16, bf16.N
    for problem in (bf16, fp8):
        assert backend.workspace_bytes(problem, TritonVectorConfig()) == S * N * 2
        assert backend.workspace_bytes(problem, TritonVectorConfig(one_launch=True)) == S * N * 2 + 2 * ARRIVAL_BYTES


def test_many_slots_are_declined_with_the_limit() -> None:
    backend = TritonVectorBackend(described(90))
    layer = WORKLOADS["qwen3-30b-a3b"]
    fits, exceeds = MOST_SLOTS // layer.topk, MOST_SLOTS // layer.topk + 1
    assert backend.further_reasons(layer.problem(fits, "fp16", backend.machine)) == ()
    (reason,) = backend.further_reasons(layer.problem(exceeds, "fp16", backend.machine))
    assert f"M·topk ≤ {MOST_SLOTS}, got {exceeds * layer.topk}" in reason


def test_another_backends_configuration_is_refused() -> None:
    case = Case("one token", M=1)
    x, weights, ids = case.tokens()
    with pytest.raises(InvalidInputError, match="TritonVectorConfig, got BackendConfig"):
        TritonVectorBackend(Machine.inspect("cpu")).run(x, case.experts(), weights, ids, BackendConfig())


def launch_defaults(capability: int, dtype: DType, *, every: bool) -> Iterator[Launch]:
    """The defaults of the named workloads, with one problem for each, in two launches and in one; all, or the first."""
    backend = TritonVectorBackend(described(capability))
    seen = set()
    for workload in WORKLOADS.values():
        for M in (1, 2, 4, 8, 16, 32, 64):
            problem = workload.problem(M, dtype, backend.machine)
            config = backend.configs(problem)[0]
            key = (config, problem.activation, problem.K, problem.N)
            if key not in seen:
                seen.add(key)
                note = {"bound": shared_memory_bytes(config)}
                for tiles in (config, config.model_copy(update={"one_launch": True})):
                    yield Launch(partial(backend.run, *unwritten_layer(replace(problem, M=1)), tiles), note)
                if not every:
                    return


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("capability", "dtype", "every"), devices(fp16=True))
def test_defaults_compile(capability: int, dtype: DType, every: bool) -> None:
    kernels = compile_launches(launch_defaults, capability, dtype=dtype, every=every)
    products = [built for built in kernels if built.name.startswith("_moe_vector")]
    names = {"_moe_vector_gate_up_kernel", "_moe_vector_down_kernel", "_moe_vector_layer_kernel"}
    assert {built.name for built in products} == names
    for built in kernels:
        assert built.pdl == (capability >= 90), built
        assert built.stack <= FEW_SPILLS, built
    for built in products:
        assert built.shared <= built.note["bound"], built
        # Weights go straight into registers, 16 bytes at a time.
        assert not built.wide_copies, built
        assert built.wide_loads, built
