"""The persistent backend beyond the conformance suite: its configurations, shapes that straddle, and its plans."""

from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch

from moe_dispatch.backends.stages.order_columns import order_columns, order_columns_torch
from moe_dispatch.backends.stages.route import route
from moe_dispatch.backends.triton_common.features import features, interpreting, on_triton
from moe_dispatch.backends.triton_persistent.backend import TritonPersistentBackend
from moe_dispatch.backends.triton_persistent.config import TritonPersistentConfig, persistent_configs, tma_fits
from moe_dispatch.machine import Machine
from moe_dispatch.problem import DType
from moe_dispatch.workloads import WORKLOADS
from tests.support import decode
from tests.support.described import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"block_m": 16, "block_n": 32, "block_k": 32, "down_block_n": 32}


@dataclass(frozen=True, kw_only=True)
class Case(decode.Case):
    """A layer and a configuration, with weights of several dtypes."""

    M: int = 7
    E: int = 3
    K: int = 72
    N: int = 40
    act: DType = "fp16"
    dtypes: tuple[DType, ...] = ("fp16",)


BOTH: tuple[DType, ...] = ("fp16", "fp8")
ALL: tuple[DType, ...] = (*BOTH, "fp8_channel")
MX: tuple[DType, ...] = ("mxfp4",)
CASES = (
    # How tiles are walked and shaped.
    Case("row major", M=40, config=SMALL | {"order": "row_major"}),
    Case("groups shorter than an expert", M=90, E=2, config=SMALL | {"group_m": 2}),
    Case("one loop over tiles and depth", M=45, config=SMALL | {"flatten_steps": 8}),
    Case("more than one program a multiprocessor", M=20, config=SMALL | {"ctas_per_sm": 2}),
    # Where blocks of 128 and tiles do not meet.
    Case("up rows straddle blocks of scales", K=130, N=200, dtypes=("fp8",)),
    Case("alternating rows and scales", K=136, N=136, interleaved=True, dtypes=("fp8",)),
    Case("a group of columns in two tiles", M=45, K=136, N=320, dtypes=("fp8",), config={"block_n": 64, "block_m": 32}),
    Case("a group of columns in one tile", M=45, K=136, N=320, dtypes=("fp8",), config={"block_n": 128, "block_m": 32}),
    Case("a wide second tile", K=300, N=136, dtypes=BOTH, config={"down_block_n": 256}),
    Case("a scale for each row", M=45, K=136, N=72, dtypes=("fp8_channel",), config={"block_m": 32}),
    Case("gpt-oss", topk=3, **decode.GPT_OSS, dtypes=ALL),
    Case("no gate", activation="relu2", bias=True, N=130, dtypes=ALL),
    Case("by columns", transposed=True, config=SMALL),
    Case("by columns, gpt-oss", **decode.GPT_OSS, transposed=True, config=SMALL),
    Case("codes of four bits", K=288, N=96, bias=True, dtypes=MX, config={"block_k": 64, "block_m": 16}),
    Case("codes of four bits, no gate", K=96, N=160, activation="relu2", dtypes=MX, config={"block_k": 256}),
)

TMA = {"block_m": 16, "block_n": 64, "tma": True}

# Rows that are whole multiples of 16 bytes, and of no tile: boxes reach into the next expert and past the last.
TMA_CASES = (
    Case("tma", M=20, K=144, N=96, dtypes=ALL, config=TMA),
    Case(
        "tma, gpt-oss", M=20, K=144, N=96, **decode.GPT_OSS, dtypes=BOTH,
        config=TMA,
    ),
    Case("tma, codes of four bits", M=20, K=160, N=96, bias=True, dtypes=MX, config=TMA),
    Case("tma, codes of alternating rows", M=20, K=160, N=96, interleaved=True, dtypes=MX, config=TMA),
    Case("tma, no gate", M=20, K=144, N=96, activation="relu2", bias=True, dtypes=BOTH, config=TMA),
    Case("tma, by columns", M=20, K=144, N=96, interleaved=True, transposed=True, config=TMA),
    Case("tma, by columns, no gate", M=20, K=136, N=72, activation="relu2", transposed=True, config=TMA),
)  # fmt: skip


def _with_dtypes(cases: tuple[Case, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("case", "dtype"), [pytest.param(c, d, id=f"{c}-{d}") for c in cases for d in c.dtypes]
    )


@pytest.mark.usefixtures("poisoned_memory")
@_with_dtypes(CASES)
def test_against_the_reference(case: Case, dtype: DType) -> None:
    _equals_the_reference(TritonPersistentBackend(Machine.inspect(DEVICE)), case, dtype)


@decode.INTERPRETED
def test_the_next_experts_scales_are_not_read() -> None:
    """Of two tiles of a quantised group the second may begin past N, where a NaN would reach both."""
    case = Case("", E=2, K=136, N=136, dtype="fp8", interleaved=True, routing="0")
    experts = case.experts()
    assert experts.gate_up_scale is not None
    experts.gate_up_scale[1] = torch.nan
    out = TritonPersistentBackend(Machine.inspect("cpu")).run(
        case.tokens()[0], experts, *case.tokens()[1:], TritonPersistentConfig()
    )
    assert out.isfinite().all()


DEQUANTIZED = (
    Case("a scale for each half of a tile", M=20, K=136, N=128, dtypes=("fp8",), config={"block_m": 16}),
    Case("a scale for each row", K=130, N=136, bias=True, interleaved=True, dtypes=("fp8", "fp8_channel")),
)


@pytest.mark.skipif(not interpreting(), reason="needs a device without products of e4m3, or the interpreter")
@pytest.mark.usefixtures("poisoned_memory")
@_with_dtypes(DEQUANTIZED)
def test_dequantised_weights_meet_activations_as_they_are(case: Case, dtype: DType) -> None:
    backend = TritonPersistentBackend(_machine((8, 0), 166912, sms=3))
    _equals_the_reference(backend, case, dtype)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@_with_dtypes(TMA_CASES)
def test_weights_through_descriptors(case: Case, dtype: DType) -> None:
    machine = Machine.inspect(DEVICE)
    if interpreting():
        pytest.importorskip("triton", "3.7", reason="Triton interprets tensor descriptors from version 3.7 on")
        machine = _machine((9, 0), 232448, sms=3)
    elif machine.capability is None or machine.capability < (9, 0):
        pytest.skip("needs sm_90 or newer")
    backend = TritonPersistentBackend(machine)
    with mock.patch.object(backend, "_descriptor", wraps=backend._descriptor) as descriptor:
        _equals_the_reference(backend, case, dtype)
    assert {call.args[1] for call in descriptor.call_args_list} == {"gate_up", "down"}


def _equals_the_reference(backend: TritonPersistentBackend, case: Case, dtype: DType) -> None:
    case = replace(case, dtype=dtype)
    config = TritonPersistentConfig.model_validate(case.config)
    decode.check_against_the_reference(case, backend, config, backend.tolerance[dtype], DEVICE)
    if DEVICE == "cuda":  # the interpreter runs programs one after another
        x, weights, ids = (tensor.cuda() for tensor in case.tokens())
        first, again = (backend.run(x, case.experts(DEVICE), weights, ids, config) for _ in range(2))
        assert torch.equal(first, again), "does not repeat bit for bit"


@pytest.mark.skipif(not on_triton(torch.empty(0, device=DEVICE)), reason="a kernel")
@pytest.mark.parametrize("by_threads", [False, True])
def test_columns_are_ordered_as_products_read_them(by_threads: bool) -> None:
    x = torch.randn(3, 2880, device=DEVICE).half()
    ordered = order_columns(x, 128, by_threads=by_threads)
    assert torch.equal(ordered, order_columns_torch(x, 128, by_threads=by_threads))
    assert ordered.shape == (3, 2944)
    if by_threads:  # of every eight places a thread has two, and a thread's columns share an exponent
        held = ordered[0, :128].view(16, 4, 2).transpose(0, 1).reshape(4, 32)
        assert torch.equal(held.sort().values, x[0, :128].view(4, 32).sort().values)
    else:
        assert torch.equal(ordered[0, :32], x[0, :128:4])
    routing = route(torch.tensor([[0, 2], [1, -1], [2, 5]], dtype=torch.int32, device=DEVICE), 3)
    rows = order_columns(x, 128, by_threads=by_threads, routing=routing, topk=2)
    slots = routing.slot_of_row
    assert torch.equal(rows[slots >= 0], ordered[slots[slots >= 0].long() // 2])


@pytest.mark.skipif(not interpreting(), reason="about the interpreter")
def test_the_interpreter_refuses_bf16_with_its_reason() -> None:
    machine = Machine.inspect("cpu")
    problem = WORKLOADS["qwen3-30b-a3b"].problem(64, "bf16", machine)
    assert any("bf16" in reason for reason in TritonPersistentBackend(machine).unsupported_reasons(problem))


def _machine(capability: tuple[int, int], shared_memory: int, sms: int = 108) -> Machine:
    return gpu(capability, sms=sms, shared_memory_per_block=shared_memory)


def test_tiles_grow_with_the_load() -> None:
    machine = _machine((9, 0), 232448)
    workload = WORKLOADS["deepseek-v3"]
    heights = [
        persistent_configs(workload.problem(M, "bf16", machine), features(machine))[0].block_m for M in (1, 512, 16384)
    ]
    assert heights == sorted(heights)
    assert heights[0] < heights[-1]


def test_descriptors_need_rows_of_16_bytes() -> None:
    assert tma_fits(72, 2)
    assert not tma_fits(39, 2)
    assert not tma_fits(72, 1)


def test_a_tile_side_that_is_no_power_of_two_is_refused() -> None:
    with pytest.raises(ValueError, match="power of two"):
        TritonPersistentConfig(block_m=48)
