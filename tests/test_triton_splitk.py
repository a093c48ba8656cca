"""The decode kernels: interpreted against the fp32 reference, and compiled for devices that are not here."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from moe_dispatch.backends.reference import ReferenceBackend, ReferenceConfig
from moe_dispatch.backends.triton_splitk.backend import MOST_SLOTS, TritonSplitKBackend
from moe_dispatch.backends.triton_splitk.config import SplitKConfig, shared_memory_bytes
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine
from moe_dispatch.problem import Activation, DType, MoEProblem
from moe_dispatch.workloads import WORKLOADS, Workload, make_experts, torch_dtype

SMALL = {"block_n": 32, "block_k": 32, "num_stages": 2}
SPREAD = "spread"  # ids from -1 to E: sentinels of both kinds, duplicates within a row


@dataclass(frozen=True)
class Case:
    """A layer, a routing and a configuration; `why` names the group and the test."""

    why: str
    M: int = 3
    E: int = 4
    topk: int = 2
    K: int = 64
    N: int = 32
    dtype: DType = "fp32"
    activation: Activation = "silu"
    bias: bool = False
    interleaved: bool = False
    ids: torch.dtype = torch.int32
    routing: str = SPREAD
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def act_dtype(self) -> DType:
        return "fp32" if self.dtype == "fp8" else self.dtype

    def __str__(self) -> str:
        return self.why

    def experts(self) -> ExpertWeights:
        layer = Workload(
            "case", self.E, self.topk, self.K, self.N, self.activation, bias=self.bias, interleaved=self.interleaved
        )
        return make_experts(layer, self.dtype, "cpu", torch.Generator().manual_seed(1), act_dtype=self.act_dtype)

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
CASES = [
    # token counts: one, odd, and more than BLOCK_M of one expert, in either grid
    Case("one token", M=1),
    Case("one token, grid of experts", M=1, config=EXPERTS),
    Case("odd count", M=17),
    Case("slots span two scans", M=70, N=16, K=32),
    Case("slots span two scans, grid of experts", M=70, N=16, K=32, config=EXPERTS),
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
    Case("fp8, ungated, atomic", dtype="fp8", K=128, N=136, activation="relu2", config=ATOMIC),
    # tensor descriptors in each row order
    Case("tma", dtype="fp16", config={"tma": True}),
    Case("tma, cut tiles", dtype="fp16", K=80, N=40, bias=True, config={"tma": True}),
    Case("tma, interleaved, cut tiles", dtype="fp16", K=80, N=40, interleaved=True, config={"tma": True}),
    Case("tma, ungated", dtype="fp16", activation="relu2", config={"tma": True}),
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


def device(capability: tuple[int, int]) -> Machine:
    """A device that is not here, by its capability: A100, L40S, H200 and B200."""
    name, sms, shared = {
        (8, 0): ("NVIDIA A100", 108, 166912),
        (8, 9): ("NVIDIA L40S", 142, 101376),
        (9, 0): ("NVIDIA H200", 132, 232448),
        (10, 0): ("NVIDIA B200", 148, 232448),
    }[capability]
    return Machine(
        device="cuda", name=name, capability=capability, sms=sms, memory_bytes=80 << 30,
        shared_memory_per_block=shared, torch=torch.__version__, triton="3.6.0",
    )  # fmt: skip


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)], ids=str)
def test_configs_fit_the_device(name: str, capability: tuple[int, int]) -> None:
    backend = TritonSplitKBackend(device(capability))
    for M in (1, 4, 16, 64):
        for dtype in cast("tuple[DType, ...]", ("bf16", "fp8") if capability >= (8, 9) else ("bf16",)):
            problem = _problem(backend.machine, M, dtype, name)
            configs = backend.configs(problem)
            assert configs[0] == backend.default_config(problem)
            assert len(set(configs)) == len(configs) <= 24
            for config in configs:
                assert shared_memory_bytes(problem, config) <= backend.machine.shared_memory_per_block
                assert backend.workspace_bytes(problem, config) > 0
                assert capability >= (9, 0) or not (config.tma or config.pdl)
                assert dtype != "fp8" or config.block_k == 128


def test_atomic_mode_says_that_it_is_not_deterministic(machine: Machine) -> None:
    backend = TritonSplitKBackend(machine)
    assert not backend.deterministic(SplitKConfig(mode="atomic"))
    assert backend.deterministic(SplitKConfig())


def test_many_slots_are_declined_with_the_limit() -> None:
    backend = TritonSplitKBackend(device((9, 0)))
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


COMPILED = [
    ((8, 0), "bf16", False),
    ((8, 9), "fp8", False),
    ((9, 0), "bf16", False),
    ((9, 0), "fp8", False),
    ((10, 0), "bf16", False),
    ((10, 0), "fp8", False),
    ((9, 0), "bf16", True),
    ((9, 0), "fp8", True),
]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("capability", "dtype", "tma"), COMPILED, ids=str)
def test_defaults_compile(capability: tuple[int, int], dtype: str, tma: bool) -> None:
    """Every default of the named workloads at M of 1 to 64, through the real launchers, for a device not here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(capability[0]), str(capability[1]), dtype, str(int(tma))]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = json.loads(done.stdout)
    assert {kernel["name"] for kernel in kernels} >= {
        "_moe_splitk_gate_up_kernel", "_moe_splitk_down_kernel", "_moe_splitk_reduce_kernel"
    }  # fmt: skip
    for kernel in kernels:
        assert kernel["shared"] <= kernel["shared_bound"], kernel
        assert kernel["pdl"] == (capability >= (9, 0)), kernel
        if "reduce" in kernel["name"]:
            continue
        assert kernel["wgmma"] == (capability == (9, 0) and kernel["block_n"] >= 64), kernel
        # Weights arrive 16 bytes at a time, by asynchronous copy or by TMA.
        assert kernel["tma_loads"] if tma else kernel["wide_copies"], kernel


def _compile_defaults(major: int, minor: int, dtype: DType, *, tma: bool) -> list[dict[str, Any]]:
    """Run the launchers with Triton told that the device is there, and its launch left out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Absent:
        """What Triton asks of a driver before it compiles."""

        get_current_target = staticmethod(lambda: GPUTarget("cuda", 10 * major + minor, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda _device=None: 0)

    triton.runtime.driver.set_active(Absent())
    found: dict[str, dict[str, Any]] = {}
    run = JITFunction.run
    current: dict[str, Any] = {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        ptx = kernel.asm["ptx"]
        bound = current["bound"]
        entry = found.setdefault(
            kernel.hash,
            {
                "name": kernel.metadata.name, "hash": kernel.hash, "shared": kernel.metadata.shared,
                "shared_bound": bound, "block_n": current["block_n"], "config": current["config"],
                "wgmma": "wgmma.mma_async" in ptx, "pdl": "griddepcontrol.wait" in ptx,
                "tma_loads": "cp.async.bulk.tensor" in ptx, "wide_copies": "cp.async.cg.shared.global" in ptx,
            },
        )  # fmt: skip
        entry["shared_bound"] = min(entry["shared_bound"], bound)
        return kernel

    JITFunction.run = compile_only
    backend = TritonSplitKBackend(device((major, minor)))
    seen = set()
    for workload in WORKLOADS.values():
        for M in (1, 2, 4, 8, 16, 32, 64):
            problem = workload.problem(M, dtype, backend.machine)
            config = backend.default_config(problem)
            if tma:
                config = config.model_copy(update={"tma": True})
            if (key := (workload.name, config)) in seen:
                continue
            seen.add(key)
            # What E changes is the grid: the weights themselves need not fit here.
            experts = _unwritten_experts(problem, E=16 if workload.E % 16 == 0 else workload.E)
            current.update(
                bound=shared_memory_bytes(problem, config), block_n=config.block_n, config=config.label
            )  # fmt: skip
            x = torch.empty(M, problem.K, dtype=torch.bfloat16)
            weights, ids = torch.empty(M, problem.topk), torch.empty(M, problem.topk, dtype=torch.int32)
            backend.run(x, experts, weights, ids, config)
    return list(found.values())


def _unwritten_experts(problem: MoEProblem, E: int) -> ExpertWeights:
    dtype = torch_dtype(problem.dtype)
    rows, K, N = problem.gate_up_rows, problem.K, problem.N
    scales = {}
    if problem.dtype == "fp8":
        gate_up, down = problem.quant_blocks
        scales = {"gate_up_scale": torch.empty(E, *gate_up), "down_scale": torch.empty(E, *down)}
    biases = {}
    if problem.bias:
        biases = {
            "gate_up_bias": torch.empty(E, rows, dtype=torch.bfloat16),
            "down_bias": torch.empty(E, K, dtype=torch.bfloat16),
        }
    return ExpertWeights(
        torch.empty(E, rows, K, dtype=dtype), torch.empty(E, K, N, dtype=dtype), **scales, **biases,
        activation=problem.activation, interleaved=problem.interleaved,
    )  # fmt: skip


if __name__ == "__main__":
    kernels = _compile_defaults(int(sys.argv[1]), int(sys.argv[2]), cast("DType", sys.argv[3]), tma=sys.argv[4] == "1")
    sys.stdout.write(json.dumps(kernels))
