"""The decode kernels: interpreted against the fp32 reference, and compiled for devices that are not here."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import pytest
import torch

from moe_dispatch import testing as conformance
from moe_dispatch.backends.reference import ReferenceBackend, ReferenceConfig
from moe_dispatch.backends.triton_splitk.backend import MOST_SLOTS, TritonSplitKBackend
from moe_dispatch.backends.triton_splitk.config import SplitKConfig, shared_memory_bytes
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine
from moe_dispatch.problem import Activation, DType, MoEProblem
from moe_dispatch.workloads import WORKLOADS, make_experts, torch_dtype
from tests.support.triton_compile import SHARED_MEMORY, Launch, compile_launches, described, unwritten_layer

SMALL = {"block_n": 32, "block_k": 32, "num_stages": 2}
FEW_SPILLS = 64  # bytes of a thread
SPREAD = "spread"  # ids from -1 to E: sentinels of both kinds, duplicates within a row


@dataclass(frozen=True, kw_only=True)
class Case(conformance.Case):
    """A layer, a routing (`SPREAD`, or the expert of every slot) and a configuration; `why` names group and test."""

    why: str = field(kw_only=False)
    M: int = 3
    E: int = 4
    K: int = 64
    N: int = 32
    dtype: DType = "fp32"
    routing: str = SPREAD
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def act_dtype(self) -> DType:
        return "fp32" if self.dtype == "fp8" else self.dtype

    def __str__(self) -> str:
        return self.why

    def experts(self) -> ExpertWeights:
        generator = torch.Generator().manual_seed(1)
        return make_experts(self.layer, self.dtype, "cpu", generator, act_dtype=self.act_dtype)

    def tokens(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(self.M, self.K, generator=generator).to(torch_dtype(self.act_dtype))
        weights = torch.rand(self.M, self.topk, generator=generator)
        if self.routing == SPREAD:
            ids = torch.randint(-1, self.E + 1, (self.M, self.topk), generator=generator)
            ids[0, 0] = 0
        else:
            ids = torch.full((self.M, self.topk), int(self.routing))
        weights[(ids < 0) | (ids >= self.E)] = torch.nan
        return x, weights, ids.to(self.ids)

    def splitk(self) -> SplitKConfig:
        block_k = {"block_k": 128} if self.dtype == "fp8" else {}
        return SplitKConfig.model_validate(SMALL | block_k | self.config)


EXPERTS = {"grid": "experts"}
ATOMIC = {"mode": "atomic"}
CHUNKS = {"vector_columns": 128, "vector_down_columns": 128, "vector_down_experts": 2}
VECTOR = {"gate_up": "vector", "down": "vector", "vector_rows": 32, "vector_down_rows": 32}
CASES = [
    # token counts: one, odd, and more than BLOCK_M of one expert, in either grid
    Case("one token", M=1),
    Case("one token, grid of experts", M=1, config=EXPERTS),
    Case("odd count", M=17),
    Case("many slots", M=70, N=16, K=32),
    Case("slots span two scans", M=257, E=2, N=16, K=32, config=EXPERTS | {"block_m": 64}),
    Case("all slots to one expert", M=17, routing="2"),
    Case("all slots to one expert, grid of experts", M=17, routing="2", config=EXPERTS),
    Case("nobody is ours", M=2, routing="-1"),
    Case("nobody is ours, atomic", M=2, routing="4", config=ATOMIC),
    Case("one expert", E=1, topk=1),
    # id dtypes
    Case("int64 ids", ids=torch.int64),
    Case("int64 ids, grid of experts", ids=torch.int64, config=EXPERTS),
    # sizes that no block divides
    Case("odd K and N", K=70, N=45, bias=True),
    Case("odd K and N, partial sums", K=70, N=45, bias=True, config={"splits_gate_up": 2}),
    Case("N below a tile", K=33, N=5),
    # splits, more of them than blocks of K included
    Case("split down", N=96, config={"splits_down": 2}),
    Case("split gate_up", K=96, config={"splits_gate_up": 2}),
    Case("split both, more than blocks", config={"splits_gate_up": 5, "splits_down": 5}),
    Case("split both, atomic", config=ATOMIC | {"splits_gate_up": 2, "splits_down": 2}),
    Case("atomic", M=17, bias=True, config=ATOMIC),
    Case("atomic, grid of experts, int64", M=17, ids=torch.int64, config=ATOMIC | EXPERTS),
    Case("atomic, more splits than blocks, biased", bias=True, config=ATOMIC | {"splits_down": 5}),
    # activations, fused and after partial sums
    *[Case(f"{name}, fused", activation=name) for name in ("gelu", "gelu_tanh", "swiglu_oai", "relu2")],
    *[
        Case(f"{name}, partial sums", activation=name, bias=True, config={"splits_gate_up": 2})
        for name in cast("tuple[Activation, ...]", ("gelu", "gelu_tanh", "swiglu_oai", "relu2"))
    ],
    Case("gpt-oss", K=40, N=24, activation="swiglu_oai", bias=True, interleaved=True),
    Case(
        "gpt-oss, partial sums", K=40, N=24, activation="swiglu_oai", bias=True, interleaved=True,
        config={"splits_gate_up": 2},
    ),
    # dtypes
    Case("fp16", dtype="fp16", bias=True),
    Case("fp16, partial sums", dtype="fp16", config={"splits_gate_up": 2}),
    Case("fp8", dtype="fp8", K=256, N=128),
    Case("fp8, cut blocks", dtype="fp8", K=200, N=72, bias=True, activation="swiglu_oai", interleaved=True),
    Case("fp8, partial sums", dtype="fp8", K=256, N=136, config={"splits_gate_up": 2, "splits_down": 2}),
    Case("fp8, quantised by gate_up", dtype="fp8", K=128, N=136, bias=True, config={"block_n": 256}),
    Case("fp8, ungated, quantised by gate_up", dtype="fp8", N=136, activation="relu2", config={"block_n": 128}),
    Case("fp8, ungated, atomic", dtype="fp8", K=128, N=136, activation="relu2", config=ATOMIC),
    # tensor descriptors in each row order
    Case("tma", dtype="fp16", config={"tma": True}),
    Case("tma, cut tiles", dtype="fp16", K=80, N=40, bias=True, config={"tma": True}),
    Case("tma, interleaved, cut tiles", dtype="fp16", K=80, N=40, interleaved=True, config={"tma": True}),
    Case("tma, ungated", dtype="fp16", activation="relu2", config={"tma": True}),
    # the vector method
    *[replace(case, why=f"vector, {case.why}", config=case.config | VECTOR | tile) for case in (
        Case("one token", M=1),
        Case("odd count", M=5),
        Case("nobody is ours", M=2, routing="-1"),
        Case("int64", ids=torch.int64, K=300, N=200),
        Case("odd K and N", K=70, N=45, bias=True),
        *[Case(f"{name}", activation=name, bias=True) for name in ("gelu", "gelu_tanh", "swiglu_oai", "relu2")],
        Case("gpt-oss", K=400, N=240, activation="swiglu_oai", bias=True, interleaved=True),
        Case("fp16", dtype="fp16", bias=True, K=256, N=256, topk=3),
        Case("fp8", M=2, dtype="fp8", K=256, N=256),
        Case("fp8, cut blocks", dtype="fp8", K=200, N=72, bias=True, activation="swiglu_oai", interleaved=True),
        Case("fp8, shifted blocks", M=2, dtype="fp8", K=200, N=77, topk=3),
    ) for tile in ({}, CHUNKS)],
    # narrow and wide token tiles
    Case("block_m 8", M=17, config={"block_m": 8}),
    Case("block_m 32", M=17, routing="1", config={"block_m": 32}),
]  # fmt: skip


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine.inspect("cpu")


def relative_error(out: torch.Tensor, truth: torch.Tensor) -> float:
    return float((out.float() - truth).norm() / truth.norm().clamp(min=1e-30))


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case: Case, machine: Machine) -> None:
    experts = case.experts()
    x, weights, ids = case.tokens()
    backend, config = TritonSplitKBackend(machine), case.splitk()
    out = backend.run(x, experts, weights, ids, config)
    truth = ReferenceBackend(machine).run(x.float(), experts, weights, ids, ReferenceConfig(compute_fp32=True))
    assert out.dtype == x.dtype
    assert relative_error(out, truth) <= {"fp32": 2e-6, "fp16": 1e-3, "fp8": 2e-3}.get(case.dtype, 0.0)
    if backend.deterministic(config):
        assert torch.equal(out, backend.run(x, experts, weights, ids, config))


def _problem(machine: Machine, M: int, dtype: DType = "fp16", name: str = "qwen3-30b-a3b") -> MoEProblem:
    return WORKLOADS[name].problem(M, dtype, machine)


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_configs_fit_the_device(name: str, capability: int) -> None:
    backend = TritonSplitKBackend(described(capability))
    for M in (1, 4, 16, 64):
        for dtype in cast("tuple[DType, ...]", ("bf16", "fp8") if capability >= 89 else ("bf16",)):
            problem = _problem(backend.machine, M, dtype, name)
            configs = backend.configs(problem)
            assert configs[0] == backend.default_config(problem)
            assert len(set(configs)) == len(configs) <= 16
            for config in configs:
                assert shared_memory_bytes(problem, config) <= backend.machine.shared_memory_per_block
                assert backend.workspace_bytes(problem, config) > 0
                assert capability >= 90 or not (config.tma or config.pdl)
                assert dtype != "fp8" or config.block_k == 128


@pytest.mark.parametrize(("name", "ctas"), [("kimi-k2-tp8", 3), ("qwen3-235b", 2)])
def test_very_short_second_loops_share_a_multiprocessor_by_three(name: str, ctas: int) -> None:
    backend = TritonSplitKBackend(described(90))
    problem = _problem(backend.machine, 32, "fp8", name)
    config = backend.default_config(problem)
    assert isinstance(config, SplitKConfig)
    available = backend.machine.shared_memory_per_block
    assert available // shared_memory_bytes(problem, config) == ctas


def test_atomic_mode_says_that_it_is_not_deterministic(machine: Machine) -> None:
    backend = TritonSplitKBackend(machine)
    assert not backend.deterministic(SplitKConfig(mode="atomic"))
    assert backend.deterministic(SplitKConfig())
    assert backend.deterministic(SplitKConfig(mode="atomic", down="vector"))


def test_workspace_is_what_the_launches_leave_behind(machine: Machine) -> None:
    backend = TritonSplitKBackend(machine)
    bf16, fp8 = _problem(machine, 2, "bf16"), _problem(machine, 2, "fp8")
    S, N, K = 16, bf16.N, bf16.K
    vector = SplitKConfig(gate_up="vector", down="vector")
    assert backend.workspace_bytes(bf16, vector) == S * N * 2
    assert backend.workspace_bytes(bf16, SplitKConfig()) == S * N * 2 + S * K * 4
    assert backend.workspace_bytes(bf16, SplitKConfig(splits_down=2)) == S * N * 2 + 2 * S * K * 4
    assert backend.workspace_bytes(bf16, SplitKConfig(mode="atomic")) == S * N * 2 + 2 * K * 4
    assert backend.workspace_bytes(bf16, SplitKConfig(splits_gate_up=2)) == S * N * 2 + S * K * 4 + 2 * S * 2 * N * 4
    assert backend.workspace_bytes(fp8, vector) == S * N + 2 * K + S * 2 * N * 4
    assert backend.workspace_bytes(fp8, SplitKConfig(block_n=256)) == S * N + 2 * K + S * K * 4


@pytest.mark.parametrize(
    ("name", "dtype", "M", "gate_up", "down", "grid"),
    [
        ("qwen3-30b-a3b", "bf16", 1, "vector", "vector", "slots"),
        ("qwen3-30b-a3b", "bf16", 4, "vector", "vector", "experts"),
        ("qwen3-30b-a3b", "bf16", 16, "tensor", "tensor", "experts"),
        ("deepseek-v3", "bf16", 1, "vector", "vector", "slots"),
        ("deepseek-v3", "bf16", 4, "tensor", "tensor", "experts"),
        ("mixtral-8x7b", "bf16", 1, "vector", "vector", "slots"),
        ("mixtral-8x7b", "bf16", 4, "tensor", "tensor", "experts"),
        ("deepseek-v2-lite", "bf16", 1, "tensor", "tensor", "slots"),
        ("qwen3-235b", "bf16", 1, "vector", "vector", "slots"),
        ("qwen3-235b", "bf16", 2, "tensor", "tensor", "experts"),
        ("qwen3-30b-a3b", "fp8", 1, "vector", "vector", "slots"),
        ("kimi-k2-tp8", "fp8", 1, "vector", "vector", "slots"),
        ("qwen3-30b-a3b", "fp8", 4, "tensor", "tensor", "experts"),
        ("deepseek-v3", "fp8", 1, "tensor", "tensor", "slots"),
    ],
)
def test_method_follows_sharing_and_size(name: str, dtype: DType, M: int, gate_up: str, down: str, grid: str) -> None:
    backend = TritonSplitKBackend(described(90))
    config = backend.default_config(_problem(backend.machine, M, dtype, name))
    assert (config.gate_up, config.down, config.grid) == (gate_up, down, grid)


def test_many_slots_are_declined_with_the_limit() -> None:
    backend = TritonSplitKBackend(described(90))
    fits, exceeds = MOST_SLOTS // 8, MOST_SLOTS // 8 + 1
    assert not [why for why in backend.unsupported_reasons(_problem(backend.machine, fits)) if "M·topk" in why]
    assert f"M·topk ≤ {MOST_SLOTS}, got {exceeds * 8}" in str(
        backend.unsupported_reasons(_problem(backend.machine, exceeds))
    )


def test_fp8_refuses_blocks_that_straddle_scales(machine: Machine) -> None:
    case = Case("fp8", dtype="fp8", K=128, N=128)
    x, weights, ids = case.tokens()
    with pytest.raises(InvalidInputError, match="block_k=128"):
        TritonSplitKBackend(machine).run(x, case.experts(), weights, ids, SplitKConfig(block_k=64))


COMPILED = [(80, "bf16"), (89, "fp8"), (90, "bf16"), (90, "fp8"), (100, "bf16"), (100, "fp8")]


def launch_defaults(capability: int, dtype: DType) -> Iterator[Launch]:
    """Every default of the named workloads at M of 1 to 64, with one problem for each."""
    backend = TritonSplitKBackend(described(capability))
    seen = set()
    for workload in WORKLOADS.values():
        for M in (1, 2, 4, 8, 16, 32, 64):
            problem = workload.problem(M, dtype, backend.machine)
            config = backend.default_config(problem)
            uneven = bool(problem.K % config.block_k or problem.N % config.block_k)
            if (key := (config, problem.activation, uneven)) not in seen:
                seen.add(key)
                # Neither is a matter of the products, and the sum would be compiled for each.
                problem = replace(problem, topk=8, M=1)
                bound = shared_memory_bytes(problem, config)
                note = {"bound": bound, "tma": config.tma, "config": config.label}
                yield Launch(partial(backend.run, *unwritten_layer(problem), config), note)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("capability", "dtype"), COMPILED, ids=str)
def test_defaults_compile(capability: int, dtype: DType) -> None:
    kernels = compile_launches(launch_defaults, capability, dtype=dtype)
    tensor = [built for built in kernels if built.name in {"_moe_splitk_gate_up_kernel", "_moe_splitk_down_kernel"}]
    vector = [built for built in kernels if built.name.startswith("_moe_vector")]
    assert len({built.name for built in tensor}) == 2
    assert {built.name for built in vector} >= {"_moe_vector_down_kernel"}
    for built in kernels:
        assert built.pdl == (capability >= 90), built
        assert built.stack <= FEW_SPILLS, built
    for built in tensor:
        assert built.shared <= built.note["bound"], built
        assert built.wgmma == (capability == 90 and built.constants["ROWS"] >= 64), built
        # Weights arrive 16 bytes at a time, by asynchronous copy or by TMA.
        assert built.tma if built.note["tma"] else built.wide_copies, built
    for built in vector:
        assert built.shared <= built.note["bound"], built
        assert not built.wide_copies, built
        assert built.wide_loads, built
