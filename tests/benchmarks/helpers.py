"""Layers, backends and rows that the tests of benchmarks share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typer.testing import CliRunner

from moe_dispatch.backend import Backend, Requirements
from moe_dispatch.benchmarks.__main__ import app
from moe_dispatch.benchmarks.baselines import Baseline
from moe_dispatch.benchmarks.plan import BenchPlan
from moe_dispatch.benchmarks.provenance import Provenance
from moe_dispatch.benchmarks.rows import BenchRow
from moe_dispatch.benchmarks.suites import MODELS, TOKENS
from moe_dispatch.machine import Machine, current_machine
from moe_dispatch.measure import H200_CEILINGS, Ceilings
from moe_dispatch.policies.measurements.merge import merge
from moe_dispatch.policies.measurements.schema import CalibrationFile, Candidate, LayerShape, Measurement
from moe_dispatch.problem import DType, Mode
from moe_dispatch.registry import BACKENDS
from moe_dispatch.workloads import ROUTINGS, WORKLOADS, Workload

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "nvidia_h200"
H200 = Machine.load("h200")
LAYER = Workload("4,2,64,32", E=4, topk=2, K=64, N=32)
MEASURED = Ceilings(bandwidth=1e10, fp32_flops=1e11)


def run(*arguments: str | Path, status: int = 0) -> str:
    """Output of a command of ``python -m moe_dispatch.benchmarks``, both streams."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result.output


def reference() -> Backend:
    return BACKENDS.load("reference")(current_machine("cpu"))


class Faulty(Backend):
    """The reference backend with a fault added to its output."""

    name = "faulty"
    requirements: ClassVar = Requirements(dtypes={"fp32": (0, 0)}, act_dtypes=frozenset({"fp32"}), cpu=True)

    def __init__(self, fault: Callable[[Tensor], Tensor]) -> None:
        super().__init__(current_machine("cpu"))
        self.fault = fault
        self.calls = 0

    def run(self, *arguments: Any) -> Tensor:
        self.calls += 1
        correct: Any = reference()
        return self.fault(correct.run(*arguments[:4], correct.config_type()))


def plan(
    *backends: Backend,
    workload: Workload = LAYER,
    tokens: tuple[int, ...] = (1, 3),
    dtypes: tuple[DType, ...] = ("fp32",),
    routings: tuple[str, ...] = ("uniform",),
    modes: tuple[Mode, ...] = ("eager",),
    baselines: tuple[Baseline, ...] = (),
) -> BenchPlan:
    return BenchPlan(
        workloads=(workload,), dtypes=dtypes, tokens=tokens, routings=tuple(ROUTINGS[name] for name in routings),
        modes=modes, backends=backends, baselines=baselines, inputs=2, point_s=0.0,
    )  # fmt: skip


def provenance(machine: Machine | None = None) -> Provenance:
    return Provenance(machine or current_machine("cpu"), {"torch": torch.__version__}, "", MEASURED)


def out_of_memory_at(tokens: int) -> Callable[[Tensor], Tensor]:
    def fault(out: Tensor) -> Tensor:
        if out.shape[0] == tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 900 GiB")
        return out

    return fault


def bench_row(
    backend: str,
    model: str,
    dtype: DType,
    M: int,
    us: float | None,
    *,
    mode: Mode = "graph",
    routing: str = "uniform",
    config: dict[str, int | str | bool] | None = None,
) -> BenchRow:
    """A row of an H200; without a time it was wrong."""
    problem = WORKLOADS[model].problem(M, dtype, H200)
    roofline = H200_CEILINGS.roofline_us(problem)
    assert roofline is not None
    return BenchRow(
        workload=model, E=problem.E, topk=problem.topk, K=problem.K, N=problem.N, dtype=dtype, M=M, backend=backend,
        config=config or {}, mode=mode, routing=routing, us=us, us_q1=us, us_q3=us, samples=5 if us else 0, inputs=8,
        hit_experts=problem.expected_experts, roofline_us=roofline, roofline_from="device",
        fraction=roofline / us if us else None, error=4e-3, deterministic=True if us else None,
        reason="" if us else "wrong result: by far", machine=H200.name, fingerprint=H200.fingerprint,
        versions={"torch": "2.11"}, commit="c0ffee", ceilings=H200_CEILINGS,
    )  # fmt: skip


def full_board(fraction: float, vllm: float, skew: float = 1.1) -> list[BenchRow]:
    """Rows at every point of the scoreboard.

    Args:
        fraction: Fraction of the roofline that our backend reaches.
        vllm: Factor by which vLLM is slower.
        skew: Factor by which skewed routing is slower.
    """
    rows = []
    for dtype in ("bf16", "fp8"):
        for model in MODELS:
            for M in TOKENS:
                us = (bench_row("triton_splitk", model, dtype, M, 1.0).roofline_us or 0.0) / fraction
                rows.append(bench_row("triton_splitk", model, dtype, M, us))
                rows.append(bench_row("reference", model, dtype, M, 10 * us))
                rows.append(bench_row("vllm", model, dtype, M, us * vllm))
                rows.append(bench_row("triton_splitk", model, dtype, M, us * skew, routing="dirichlet-4"))
            rows.append(bench_row("triton_splitk", model, dtype, 1, 40.0, mode="eager"))
            rows.append(bench_row("vllm", model, dtype, 1, 200.0, mode="eager"))
    return rows


def calibration(tokens: tuple[int, ...] = (1, 64)) -> CalibrationFile:
    """Three candidates at each token count: the winner, one far behind, and one that is wrong."""
    layer = LayerShape.of(WORKLOADS["deepseek-v3"].problem(1, "fp8", H200))
    measurements = []
    for M in tokens:
        for block, us in ((64, 100.0 * M), (128, 300.0 * M)):
            times = {"uniform": (us - 1, us, us + 1)} | ({"dirichlet-4": (us, us, us)} if block == 64 else {})
            candidate = Candidate(backend="triton_persistent", config={"block_m": block}, commit="c0ffee")
            measurements.append(Measurement(layer, M, "graph", candidate, us=times, score=us, error=1e-3))
        wrong = Candidate(backend="deep_gemm", config={"layout": "psum"})
        times = {"uniform": (1.0, 1.0, 1.0)}
        measurements.append(Measurement(layer, M, "graph", wrong, us=times, disqualified="wrong on uniform routing"))
    return merge(CalibrationFile(machine=H200), measurements, H200)
