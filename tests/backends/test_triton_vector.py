"""The vector kernels: interpreted against the fp32 reference, and compiled for devices that are not here."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch

from moe_dispatch.backend import BackendConfig
from moe_dispatch.backends.triton_vector.backend import TritonVectorBackend
from moe_dispatch.backends.triton_vector.config import TritonVectorConfig, shared_memory_bytes
from moe_dispatch.backends.triton_vector.down import vector_down
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine, current_machine
from moe_dispatch.policies.rules import VECTOR_FP8_BYTES, vector_suits
from moe_dispatch.problem import DType
from moe_dispatch.system.libraries import library_version
from moe_dispatch.testing import relative_error, truth
from moe_dispatch.workloads import ROUTINGS, WORKLOADS, Workload, make_experts
from tests.support.decode import GPT_OSS, INTERPRETED, Case, check_against_the_reference
from tests.support.triton_compile import (
    Launch,
    compile_launches,
    described,
    devices,
    unwritten_layer,
)

FEW_SPILLS = 72  # bytes of a thread: gpt-oss's down in FP16 under Triton 3.9
# Rows in chunks: the conformance suite runs whole ones, with all routings and activations.
CHUNKS = TritonVectorConfig(rows=32, down_rows=32, columns=128, down_columns=128, down_experts=2)
CASES = [
    Case("one token", M=1),
    Case("int64", ids=torch.int64, K=300, N=200),
    Case("odd K and N", K=70, N=45, bias=True),
    Case("gelu", activation="gelu", bias=True),
    Case("gelu_tanh", activation="gelu_tanh", bias=True),
    Case("ungated", activation="relu2", bias=True),
    Case("gpt-oss", K=400, N=240, **GPT_OSS),
    Case("fp16", dtype="fp16", bias=True, K=256, N=256, topk=3),
    Case("fp8", M=2, dtype="fp8", K=256, N=256),
    Case("fp8, cut blocks", dtype="fp8", K=200, N=72, bias=True, activation="swiglu_oai", interleaved=True),
    Case("fp8, shifted blocks", M=2, dtype="fp8", K=200, N=77, topk=3),
    Case("fp8, ungated", M=2, dtype="fp8", N=136, activation="relu2"),
    Case("per-channel fp8", dtype="fp8_channel", K=200, N=77, topk=3),
    Case("per-channel fp8, interleaved", dtype="fp8_channel", K=256, N=72, bias=True, interleaved=True),
    Case("per-channel fp8, ungated", M=2, dtype="fp8_channel", N=136, activation="relu2"),
]


@INTERPRETED
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


@INTERPRETED
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case: Case) -> None:
    check_against_the_reference(case, TritonVectorBackend(Machine.inspect("cpu")), CHUNKS)


QWEN3_NEXT = Workload("qwen3-next", E=512, topk=10, K=2048, N=512)


@pytest.mark.parametrize("topk", [1, 2, 3, 6, 8, 10, 16])
@pytest.mark.parametrize("N", [17, 512, 1000, 1025, 2048, 2049])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_the_rules_know_where_down_reads_whole_rows_and_every_lane_has_an_expert(
    dtype: DType, topk: int, N: int
) -> None:
    backend = TritonVectorBackend(described(90))
    problem = Workload("small", 4096, topk, 64, N).problem(1, dtype, backend.machine)
    assert problem.expected_experts * problem.expert_bytes <= VECTOR_FP8_BYTES
    config = backend.default_config(problem)
    assert isinstance(config, TritonVectorConfig)
    assert topk % config.down_experts == 0
    if vector_suits(problem):
        assert config.down_columns >= N or topk == 1
        assert topk % (2 * config.down_experts) or config.down_experts == 8


@pytest.mark.parametrize(("dtype", "M", "rows"), [("bf16", 1, 4), ("bf16", 2, 2), ("fp8", 1, 2)])
def test_one_token_of_16_bit_weights_has_twice_the_rows_of_down_per_cta(dtype: DType, M: int, rows: int) -> None:
    backend = TritonVectorBackend(described(90))
    configs = backend.configs(WORKLOADS["qwen3-30b-a3b"].problem(M, dtype, backend.machine))
    down_rows = [config.down_rows for config in configs if isinstance(config, TritonVectorConfig)]
    assert down_rows[0] == rows
    assert set(down_rows) == {2, 4}  # a calibration decides


def test_another_backends_configuration_is_refused() -> None:
    case = Case("one token", M=1)
    x, weights, ids = case.tokens()
    with pytest.raises(InvalidInputError, match="TritonVectorConfig, got BackendConfig"):
        TritonVectorBackend(Machine.inspect("cpu")).run(x, case.experts(), weights, ids, BackendConfig())


def launch_defaults(capability: int, dtype: DType, *, every: bool) -> Iterator[Launch]:
    """The defaults of the named workloads, with one problem for each; all of them, or the first."""
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
                yield Launch(partial(backend.run, *unwritten_layer(replace(problem, M=1)), config), note)
                if not every:
                    return


# Rows, experts and vectors of down are all divided among its eight warps.
DIVIDED = TritonVectorConfig(columns=2048, down_rows=2, down_columns=512, down_experts=8, down_warps=8)


def launch_divided(capability: int) -> Iterator[Launch]:
    problem = QWEN3_NEXT.problem(1, "bf16", described(capability))
    yield Launch(partial(TritonVectorBackend(described(capability)).run, *unwritten_layer(problem), DIVIDED))


def launch_reshaped_sum(capability: int) -> Iterator[Launch]:
    from tests.support.reshaped_sum_kernel import _moe_reshaped_sum_kernel

    values, out = torch.empty(8, 2, 512, dtype=torch.bfloat16), torch.empty(2)
    yield Launch(partial(_moe_reshaped_sum_kernel[(1,)], values, out, num_warps=8), {"for": capability})


@pytest.mark.slow
def test_no_sum_is_left_to_what_triton_adds_wrongly() -> None:
    """Triton 3.6 divides the first one's tensor so that one sum of a reshaped tensor would be wrong."""
    assert len(compile_launches(launch_divided, 90)) == 2
    if library_version("triton").startswith("3.6."):
        return  # it divides the tensor of the kernel below, which shows that such a sum is refused, in another way
    with pytest.raises(AssertionError, match=r"_moe_reshaped_sum_kernel: axis 1 .* not consecutive"):
        compile_launches(launch_reshaped_sum, 90)


def launch_columns_past_n(capability: int) -> Iterator[Launch]:
    backend = TritonVectorBackend(described(capability))
    problem = WORKLOADS["qwen3-30b-a3b"].problem(1, "fp8_channel", backend.machine)
    yield Launch(partial(backend.run, *unwritten_layer(problem), backend.default_config(problem)))


@pytest.mark.slow
def test_columns_past_n_are_left_out_and_take_no_registers() -> None:
    _, down = compile_launches(launch_columns_past_n, 90)
    assert down.constants["CHUNK"] * down.constants["CHUNKS"] == WORKLOADS["qwen3-30b-a3b"].N
    # Seven CTAs of a multiprocessor with Triton 3.6; later ones take up to 95, which lets five of them in.
    assert down.registers <= (72 if library_version("triton").startswith("3.6.") else 96), down


def launch_evictions(capability: int) -> Iterator[Launch]:
    backend = TritonVectorBackend(described(capability))
    layers: tuple[tuple[str, DType], ...] = (
        ("qwen3-30b-a3b", "bf16"), ("gpt-oss-120b", "bf16"), ("qwen3-30b-a3b", "fp8"),
    )  # fmt: skip
    for name, dtype in layers:
        problem = WORKLOADS[name].problem(1, dtype, backend.machine)
        yield Launch(partial(backend.run, *unwritten_layer(problem), backend.configs(problem)[0]))


def test_16_bit_weights_are_evicted_first_but_by_steps_of_down() -> None:
    evicts = [built.evicts_first for built in compile_launches(launch_evictions, 90)]
    assert evicts == [True, True, True, False, False, False]


@pytest.mark.gpu
def test_warps_that_divide_rows_experts_and_vectors_are_added_up() -> None:
    experts = make_experts(QWEN3_NEXT, "bf16", "cuda")
    weights, ids = ROUTINGS["uniform"].sample(2, QWEN3_NEXT.E, QWEN3_NEXT.topk, "cuda")
    hidden = torch.randn(2, QWEN3_NEXT.K, device="cuda").bfloat16()
    out = TritonVectorBackend(current_machine("cuda")).run(hidden, experts, weights, ids, DIVIDED)
    assert relative_error(out, truth(hidden, experts, weights, ids)) <= 1e-2


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("capability", "dtype", "every"), devices(fp16=True, fp8_forms=True))
def test_defaults_compile(capability: int, dtype: DType, every: bool) -> None:
    kernels = compile_launches(launch_defaults, capability, dtype=dtype, every=every)
    products = [built for built in kernels if built.name.startswith("_moe_vector")]
    assert {built.name for built in products} == {"_moe_vector_gate_up_kernel", "_moe_vector_down_kernel"}
    assert products == kernels
    for built in products:
        assert built.pdl == (capability >= 90), built
        assert built.stack <= FEW_SPILLS, built
        assert built.shared <= built.note["bound"], built
        # Weights go straight into registers, 16 bytes at a time.
        assert not built.wide_copies, built
        assert built.wide_loads, built
