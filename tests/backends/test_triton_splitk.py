"""The split-K kernels: interpreted against the fp32 reference, and compiled for devices that are not here."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from moe_dispatch import testing
from moe_dispatch.activations import Activation
from moe_dispatch.backends.reference import ReferenceBackend, ReferenceConfig
from moe_dispatch.backends.triton_common.quantization import quantization
from moe_dispatch.backends.triton_splitk import backend as backend_module
from moe_dispatch.backends.triton_splitk import gate_up
from moe_dispatch.backends.triton_splitk.backend import TritonSplitKBackend
from moe_dispatch.backends.triton_splitk.config import SplitKConfig, shared_memory_bytes
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.machine import Machine
from moe_dispatch.numerics import QuantizedRows, quantize_rows_torch
from moe_dispatch.problem import DType, MoEProblem
from moe_dispatch.system.libraries import library_version
from moe_dispatch.testing import Precision, make_inputs
from moe_dispatch.workloads import WORKLOADS
from tests.support.decode import GPT_OSS, INTERPRETED, Case, check_against_the_reference
from tests.support.triton_compile import (
    SHARED_MEMORY,
    Launch,
    compile_launches,
    described,
    devices,
    unwritten_layer,
)

GELUS: tuple[Activation, ...] = ("gelu", "gelu_tanh")
SMALL = {"block_n": 32, "block_k": 32, "num_stages": 2}
MX = {"block_k": 64, "block_m": 8}
FEW_SPILLS = 80  # bytes of a thread; most are 72, FP8 beside 64 tokens on sm_89 with Triton 3.9
EXPERTS = {"grid": "experts"}
ONE = {"one_launch": True}
CASES = [
    # Beyond what the conformance suite runs in the default configuration: tokens that one block or scan does not hold,
    # and the grid of experts
    Case("one token, grid of experts", M=1, config=EXPERTS),
    Case("many slots", M=70, N=16, K=32),
    Case("slots span two scans", M=257, E=2, N=16, K=32, config=EXPERTS | {"block_m": 64}),
    Case("all slots to one expert, grid of experts", M=17, routing="2", config=EXPERTS),
    Case("int64 ids, grid of experts", ids=torch.int64, config=EXPERTS),
    # sizes that no block divides
    Case("odd K and N", K=70, N=45, bias=True),
    Case("odd K and N, partial sums", K=70, N=45, bias=True, config={"splits_gate_up": 2}),
    Case("N below a tile", K=33, N=5),
    # splits, more of them than blocks of K included
    Case("split down", N=96, config={"splits_down": 2}),
    Case("split gate_up", K=96, config={"splits_gate_up": 2}),
    Case("split both, more than blocks", config={"splits_gate_up": 5, "splits_down": 5}),
    # activations after partial sums; the others are the conformance suite's in FP8, which leaves partial sums, too, but
    # whose tolerance does not tell the forms of GELU apart
    *[Case(f"{name}, partial sums", activation=name, bias=True, config={"splits_gate_up": 2}) for name in GELUS],
    Case("gpt-oss, partial sums", K=40, N=24, **GPT_OSS, config={"splits_gate_up": 2}),
    # dtypes
    Case("fp16, partial sums", dtype="fp16", config={"splits_gate_up": 2}),
    Case("fp8, cut blocks", dtype="fp8", K=200, N=72, bias=True, activation="swiglu_oai", interleaved=True),
    Case("fp8, partial sums", dtype="fp8", K=256, N=136, config={"splits_gate_up": 2, "splits_down": 2}),
    Case("fp8, quantised by gate_up", dtype="fp8", K=128, N=136, bias=True, config={"block_n": 256}),
    Case("fp8, ungated, quantised by gate_up", dtype="fp8", N=136, activation="relu2", config={"block_n": 128}),
    Case("fp8_channel", dtype="fp8_channel", K=200, N=72, bias=True),
    Case("fp8_channel, interleaved", dtype="fp8_channel", activation="swiglu_oai", interleaved=True),
    Case("fp8_channel, splits", dtype="fp8_channel", K=256, N=272, config={"splits_gate_up": 2, "splits_down": 2}),
    Case("fp8_channel, wide tiles, ungated", dtype="fp8_channel", activation="relu2", config={"block_n": 128}),
    # a scale for every 32 columns, which no block of columns need hold
    Case("mxfp4", dtype="mxfp4", K=288, N=96, **GPT_OSS, config=MX),
    Case("mxfp4, splits", dtype="mxfp4", K=256, N=160, config=MX | {"splits_gate_up": 2, "splits_down": 2}),
    Case("mxfp4, tma", dtype="mxfp4", K=160, N=96, interleaved=True, config=MX | {"tma": True, "block_k": 128}),
    # tensor descriptors in each row order
    Case("tma", dtype="fp16", config={"tma": True}),
    Case("tma, cut tiles", dtype="fp16", K=80, N=40, bias=True, config={"tma": True}),
    Case("tma, interleaved, cut tiles", dtype="fp16", K=80, N=40, interleaved=True, config={"tma": True}),
    Case("tma, ungated", dtype="fp16", activation="relu2", config={"tma": True}),
    # weights stored by columns, whose tiles reach past the last row and column
    Case("by columns, gpt-oss", K=40, N=24, **GPT_OSS, transposed=True),
    Case("by columns, odd K and N", K=70, N=45, transposed=True, config={"splits_gate_up": 2, "splits_down": 2}),
    Case("by columns, ungated", K=70, N=45, activation="relu2", transposed=True, config=EXPERTS),
    Case("by columns, tma", dtype="fp16", K=80, N=40, interleaved=True, transposed=True, config={"tma": True}),
    Case("by columns, tma of down only", dtype="fp16", K=80, N=40, transposed=True, config={"tma": True}),
    # both products in one launch, with the groups and the lists of either grid
    Case("one launch", M=17, K=70, N=45, bias=True, ids=torch.int64, config=ONE),
    Case("one launch, slots of one expert", M=21, routing="1", config=ONE | {"block_m": 8}),
    Case("one launch, grid of experts", M=17, K=70, N=45, config=ONE | EXPERTS | {"block_m": 8}),
    Case("one launch, slots span two scans", M=257, E=2, N=16, K=32, config=ONE | EXPERTS | {"block_m": 64}),
    Case("one launch, no slot of this rank", routing="-1", config=ONE | EXPERTS),
    Case("one launch, split down, ungated", K=64, N=96, activation="relu2", config=ONE | {"splits_down": 2}),
    Case("one launch, tma", dtype="fp16", config=ONE | EXPERTS | {"tma": True}),
    Case("one launch, by columns", K=70, N=45, transposed=True, config=ONE | EXPERTS),
    Case("one launch, mxfp4", dtype="mxfp4", K=288, N=96, **GPT_OSS, config=MX | ONE | EXPERTS | {"splits_down": 2}),
    # narrow and wide token tiles
    Case("block_m 8", M=17, config={"block_m": 8}),
    Case("block_m 32", M=17, routing="1", config={"block_m": 32}),
]  # fmt: skip


# On a device without products of e4m3 the kernels dequantise.
DEQUANTIZED = [
    Case("blocks", dtype="fp8", K=256, N=128),
    Case("fp16", dtype="fp8", act="fp16", K=256, N=128, config={"splits_down": 2}),
    Case("sixteen tokens and fewer", M=21, dtype="fp8", act="fp16", K=256, N=128, routing="1"),
    Case("thirty-two and fewer", M=21, dtype="fp8", act="fp16", K=256, N=128, routing="1", config={"block_m": 32}),
    Case("cut blocks", dtype="fp8", K=200, N=72, bias=True, activation="swiglu_oai", interleaved=True),
    Case("partial sums, a scale for each row", dtype="fp8", K=256, N=136, config={"splits_gate_up": 2, "block_n": 256}),
    Case("rows", dtype="fp8_channel", act="fp16", K=72, N=40, bias=True),
    Case("one launch", M=21, dtype="fp8", act="fp16", K=200, N=72, bias=True, config=ONE | EXPERTS),
    Case("one launch, rows, CTAs for slots", M=9, dtype="fp8_channel", act="fp16", K=72, N=40, config=ONE),
]


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine.inspect("cpu")


@INTERPRETED
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case: Case, machine: Machine) -> None:
    block_k = {"block_k": 128} if case.dtype.startswith("fp8") else {}
    config = SplitKConfig.model_validate(SMALL | block_k | case.config)
    check_against_the_reference(case, TritonSplitKBackend(machine), config)


@INTERPRETED
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", DEQUANTIZED, ids=str)
def test_dequantised_weights_meet_activations_as_they_are(case: Case) -> None:
    backend = TritonSplitKBackend(described(80))
    check_against_the_reference(case, backend, SplitKConfig.model_validate(SMALL | {"block_k": 128} | case.config))


@INTERPRETED
@pytest.mark.parametrize("launches", [{}, ONE], ids=["two launches", "one launch"])
@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_nan_among_dequantised_weights_reaches_the_tokens_of_its_expert(name: str, launches: dict[str, Any]) -> None:
    case = DEQUANTIZED[0]
    experts, (x, weights, ids) = case.experts("cpu"), case.tokens()
    getattr(experts, name).view(torch.uint8)[ids[0, 0], 3, 5] = 0xFF
    config = SplitKConfig.model_validate(SMALL | {"block_k": 128} | EXPERTS | launches)
    nan = TritonSplitKBackend(described(80)).run(x, experts, weights, ids, config).isnan()
    plain = ReferenceConfig(quantize_activations=False)
    expected = ReferenceBackend(Machine.inspect("cpu")).run(x.float(), experts, weights, ids, plain).isnan()
    assert torch.equal(nan, expected)
    assert 0 < int(nan.sum()) < nan.numel()


@INTERPRETED
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("grid", ["slots", "experts"])
def test_one_launch_multiplies_as_two(grid: str) -> None:
    """The same tiles of the same sums, so that not a bit differs."""
    case = Case("one launch", M=19, E=5, dtype="fp8", act="fp16", K=256, N=136, bias=True)
    x, weights, ids = case.tokens()
    config = SplitKConfig.model_validate(SMALL | {"block_k": 128, "block_m": 8, "grid": grid})
    backend, experts = TritonSplitKBackend(described(80)), case.experts()
    two = backend.run(x, experts, weights, ids, config)
    one = backend.run(x, experts, weights, ids, config.model_copy(update=ONE))
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("dtype", "capability", "splits", "given"),
    [("fp8", 90, 1, "quantised activations"), ("fp8", 80, 2, "splits_gate_up=2")],
)
def test_one_launch_refuses_what_needs_another_between(dtype: DType, capability: int, splits: int, given: str) -> None:
    case = Case("fp8", dtype=dtype, K=128, N=128)
    x, weights, ids = case.tokens()
    config = SplitKConfig(one_launch=True, splits_gate_up=splits)
    with pytest.raises(InvalidInputError, match=f"one_launch=False.*got {given}"):
        TritonSplitKBackend(described(capability)).run(x, case.experts(), weights, ids, config)


def _problem(machine: Machine, M: int, dtype: DType = "fp16", name: str = "qwen3-30b-a3b") -> MoEProblem:
    return WORKLOADS[name].problem(M, dtype, machine)


def test_ids_are_waited_for_unless_this_layer_quantises(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next kernel reads them before it waits; rows that come quantised have no launch before them that waited."""
    seen = []

    def noted(*arguments: Any, ids_ready: bool) -> None:
        seen.append(ids_ready)
        gate_up.splitk_gate_up(*arguments, ids_ready=ids_ready)

    monkeypatch.setattr(backend_module, "splitk_gate_up", noted)
    backend: Any = TritonSplitKBackend(machine)
    for precision in (Precision("fp16", "fp16"), Precision("fp8", "fp16")):
        hidden, *others = arguments = make_inputs(testing.Case(M=1, E=2, N=32), precision, "cpu").arguments
        config = backend.default_config(arguments[1].problem(1, 2, hidden.dtype, machine.capability))
        config = config.model_copy(update={"one_launch": False})
        backend.run(hidden, *others, config)
        if precision.dtype == "fp8":
            rows = QuantizedRows(*quantize_rows_torch(hidden), hidden.dtype)
            backend.run_into(rows, *others, config, torch.empty_like(hidden))
    assert seen == [False, True, False]


# What a default must be: the capability of the device, the layer, and options of the configuration.
DEFAULTS: list[tuple[Any, ...]] = [
    # The grid follows how many experts are hit.
    (90, "qwen3-30b-a3b", "bf16", 1, {"grid": "slots"}),
    (90, "qwen3-30b-a3b", "bf16", 4, {"grid": "experts"}),
    (90, "mixtral-8x7b", "bf16", 4, {"grid": "experts"}),
    (90, "kimi-k2-tp8", "fp8", 32, {"grid": "slots"}),  # 256 slots of 384 experts; a very short second loop
    (90, "kimi-k2-tp8", "fp8", 64, {"grid": "experts"}),
    # Tiles follow what the device holds at once.
    *((90, name, dtype, M, {"block_n": block_n, "num_stages": stages, "tma": tma})
      for name, dtype, M, block_n, stages, tma in (
        ("qwen3-235b", "fp8", 1, 128, 4, True),  # 192 and 256 CTAs take one turn by three on 132 multiprocessors
        ("deepseek-v3", "fp8", 1, 128, 6, False),  # 256 and 448 do not; long loops
        ("qwen3-30b-a3b", "fp8", 1, 64, 6, True),  # 96 would not fill the device
        ("qwen3-30b-a3b", "fp8", 4, 128, 3, True),  # short loops
        ("deepseek-v2-lite", "fp8", 4, 64, 6, True),  # 458 would leave 62 for another turn
        ("kimi-k2-tp8", "fp8", 32, 128, 3, True),  # a very short second loop
        ("gpt-oss-120b", "fp8", 8, 64, 6, True),  # 2880 rows are not whole tiles of 128
        ("gpt-oss-120b", "fp8", 256, 128, 5, True),  # tiles of 32 tokens
        ("deepseek-v2-lite", "bf16", 32, 64, 5, True),
        ("mixtral-8x7b", "bf16", 32, 128, 5, True),
        ("kimi-k2-tp8", "bf16", 16, 128, 3, True),
    )),
    # One launch in FP8 follows how many CTAs there are.
    *((80, name, "fp8", M, {"one_launch": True, "grid": grid, "crowded": crowded}) for name, M, grid, crowded in (
        ("qwen3-30b-a3b", 4, "slots", False),
        ("qwen3-30b-a3b", 8, "slots", True),
        ("qwen3-30b-a3b", 16, "experts", True),
        ("qwen3-30b-a3b", 64, "experts", False),
        ("mixtral-8x7b", 8, "experts", False),
        ("deepseek-v3", 8, "slots", True),
    )),
    # CTAs share a tile of down where few would wait.
    *((80, name, dtype, M, {"one_launch": True, "splits_down": splits}) for name, dtype, M, splits in (
        ("mixtral-8x7b", "fp8", 1, 8),  # 128 tiles of 112 blocks, for 108 multiprocessors
        ("mixtral-8x7b", "bf16", 2, 4),
        ("mixtral-8x7b", "fp8", 8, 2),
        ("deepseek-v3", "fp8", 1, 1),  # 896 tiles
        ("qwen3-30b-a3b", "fp8", 2, 1),  # 496 tiles, but of 6 blocks
    )),
    # One launch is left out where it lost.
    (80, "qwen3-30b-a3b", "fp8", 1, {"one_launch": False}),
    (80, "kimi-k2-tp8", "fp8", 2, {"one_launch": False}),  # tiles of down, whose loop is very short, crowd out others
    (80, "gpt-oss-120b", "mxfp4", 2, {"one_launch": False}),
    (80, "gpt-oss-120b", "mxfp4", 4, {"one_launch": True}),
]  # fmt: skip


@pytest.mark.parametrize(("capability", "name", "dtype", "M", "options"), DEFAULTS)
def test_defaults(capability: int, name: str, dtype: DType, M: int, options: dict[str, Any]) -> None:
    backend = TritonSplitKBackend(described(capability))
    config = backend.default_config(_problem(backend.machine, M, dtype, name))
    assert {option: getattr(config, option) for option in options} == options


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "fp8", "fp8_channel", "mxfp4"])
def test_products_share_a_launch_where_kernels_do_not_overlap(dtype: DType, capability: int) -> None:
    """By default from two tokens on, or one of a large layer; for few tokens in MXFP4 it is a candidate everywhere."""
    backend = TritonSplitKBackend(described(capability))
    able = dtype in {"fp16", "bf16", "mxfp4"} or (dtype.startswith("fp8") and capability < 89)
    for name, M in itertools.product(("qwen3-30b-a3b", "mixtral-8x7b"), (1, 8, 64, 512)):
        default, *others = backend.configs(_problem(backend.machine, M, dtype, name))
        few = default.block_m <= 16
        enough = (M > 1 and few) if dtype == "mxfp4" else M > 1 or name == "mixtral-8x7b"
        assert default.one_launch == (able and capability < 90 and enough)
        either = default.one_launch or (dtype == "mxfp4" and few)
        assert {config.one_launch for config in (default, *others)} == ({False, True} if either else {False})


@pytest.mark.parametrize("tokens", [8, 16, 32])
def test_tiles_that_dequantise_for_few_tokens_have_their_registers_limited(tokens: Any) -> None:
    config = SplitKConfig(block_m=tokens, block_n=64, block_k=128, one_launch=True)
    dequantises = quantization("fp8", fp8=False)
    assert config.launch(dequantises)["maxnreg"] == 128
    apart = config.model_copy(update={"one_launch": False}).launch(dequantises)
    assert ("maxnreg" in apart) == (tokens < 32)  # there it would spill
    assert "maxnreg" not in config.launch(quantization("fp8", fp8=True))


@pytest.mark.parametrize("capability", [89, 100, 120])
def test_what_was_measured_on_hopper_decides_there_alone(capability: int) -> None:
    backend = TritonSplitKBackend(described(capability))
    copies = backend.default_config(_problem(backend.machine, 8, "fp8", "deepseek-v3"))
    three = backend.default_config(_problem(backend.machine, 1, "fp8", "qwen3-235b"))
    assert isinstance(copies, SplitKConfig)
    assert isinstance(three, SplitKConfig)
    assert copies.tma == (capability >= 90)
    # Three CTAs of such tiles do not fit on a multiprocessor with 100 KiB of shared memory.
    assert three.block_n == (128 if capability == 100 else 64)


def test_fp8_refuses_blocks_that_straddle_scales(machine: Machine) -> None:
    case = Case("fp8", dtype="fp8", K=128, N=128)
    x, weights, ids = case.tokens()
    with pytest.raises(InvalidInputError, match="block_k=128"):
        TritonSplitKBackend(machine).run(x, case.experts(), weights, ids, SplitKConfig(block_k=64))


def launch_defaults(capability: int, dtype: DType, *, every: bool) -> Iterator[Launch]:
    """The defaults of the named workloads at M of 1 to 512, with one problem for each; every one, or the first."""
    backend = TritonSplitKBackend(described(capability))
    seen = set()
    for workload in WORKLOADS.values():
        for M in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
            problem = workload.problem(M, dtype, backend.machine)
            if backend.unsupported_reasons(problem):
                continue
            config = backend.default_config(problem)
            uneven = bool(problem.K % config.block_k or problem.N % config.block_k)
            if (key := (config, problem.activation, uneven)) not in seen:
                seen.add(key)
                # Neither is a matter of the products, and the sum would be compiled for each.
                problem = replace(problem, topk=8, M=1)
                bound = shared_memory_bytes(problem, config)
                note = {"bound": bound, "tma": config.tma, "one": config.one_launch, "config": config.label}
                yield Launch(partial(backend.run, *unwritten_layer(problem), config), note)
                if dtype == "mxfp4" and config.block_m <= 16:  # then the other way is a candidate
                    other = not config.one_launch
                    changed = config.model_copy(update={"one_launch": other})
                    yield Launch(partial(backend.run, *unwritten_layer(problem), changed), note | {"one": other})
                if dtype == "bf16":
                    by_columns = replace(problem, transposed=True, interleaved=problem.gated)
                    yield Launch(partial(backend.run, *unwritten_layer(by_columns), config), note)
                if not every:
                    return


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("capability", "dtype", "every"), devices(fp16=True, fp8_forms=True, mxfp4=True))
def test_defaults_compile(capability: int, dtype: DType, every: bool) -> None:
    kernels = compile_launches(launch_defaults, capability, dtype=dtype, every=every)
    together, apart = {"_moe_splitk_layer_kernel"}, {"_moe_splitk_gate_up_kernel", "_moe_splitk_down_kernel"}
    products = [built for built in kernels if built.name in together | apart]
    for one in {built.note["one"] for built in kernels}:
        assert {built.name for built in products if built.note["one"] == one} == (together if one else apart)
    # wgmma has products of 8 columns and more, of which Triton 3.6 and 3.7 use those of 16 and more.
    narrowest = 16 if re.match(r"3\.[67]\.", library_version("triton")) else 8
    for built in kernels:
        assert built.pdl == (capability >= 90), built
        assert built.stack <= FEW_SPILLS, built
    for built in products:
        assert built.shared <= built.note["bound"] <= SHARED_MEMORY[capability], built
        rows, tokens, warps = (built.constants[name] for name in ("ROWS", "BLOCK_M", "num_warps"))
        wide = rows >= 64 and tokens >= narrowest and warps >= 4
        assert built.wgmma == (capability == 90 and wide), built
        # Weights arrive 16 bytes at a time, by asynchronous copy or by TMA.
        assert built.tma if built.note["tma"] else built.wide_copies, built
        # Exponents come two at a time, which has them read by lanes side by side.
        assert not built.byte_loads, built
