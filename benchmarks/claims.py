"""Reproduce or refute what has been published about fast MoE kernels, with the kernels that are here.

    python benchmarks/claims.py --out claims.jsonl            # needs a GPU and, with kernels compiled, 90 seconds
    python benchmarks/claims.py --smoke                       # tiny shapes, wherever the backends run

Each claim is a function that says what it compares; both sides are checked against fp32 and timed in turns. A claim
counts as reproduced where the best ratio over its points reaches the published one (the lower end of a range).
"""

import argparse
import importlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pydantic
import torch

from moe_dispatch.benchmarks import rows as records
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.errors import BackendUnavailableError
from moe_dispatch.experts import ExpertWeights, quantize_blocks
from moe_dispatch.measure import (
    Call,
    LayerInputs,
    backend_call,
    make_inputs,
    reference_outputs,
    time_interleaved,
    verify,
)
from moe_dispatch.problem import DType, Mode, MoEProblem
from moe_dispatch.system.failures import lost_device, summary
from moe_dispatch.workloads import ROUTINGS, RoutingDistribution, Workload, make_experts, workload

if TYPE_CHECKING:
    from moe_dispatch.backend import Backend
    from moe_dispatch.machine import Machine

# Below this many tokens a timing runs over 8 inputs, else over 2; and so many tokens are held against fp32.
FEW_TOKENS: Final = 256
CHECKED_TOKENS: Final = 1024
Drawn = tuple[tuple[LayerInputs, ...], tuple[torch.Tensor, ...]]

SMOKE: Final = Workload("smoke", E=4, topk=2, K=128, N=64)
MODELS: Final = ("deepseek-v3", "qwen3-30b-a3b", "mixtral-8x7b")


class ClaimRow(pydantic.BaseModel):
    """One comparison, or one rate.

    Attributes:
        claim: Which.
        published: The least figure that would reproduce it.
        workload: Layer, or the product's shape.
        dtype: Of the weights.
        M: Tokens.
        mode: ``"graph"`` or ``"eager"``.
        routing: Name of the distribution.
        baseline: What is compared with; empty for a rate.
        variant: What is claimed to be faster, or what has the rate.
        baseline_us: Its median.
        variant_us: The other's.
        value: baseline_us / variant_us, or TFLOP/s.
        reason: Why there is no value.
        machine: Device name.
        versions: Of the software.
        commit: Of the checkout.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    claim: str
    published: float
    workload: str
    dtype: str
    M: int
    mode: Mode
    routing: str = "uniform"
    baseline: str
    variant: str
    baseline_us: float | None = None
    variant_us: float | None = None
    value: float | None = None
    reason: str = ""
    machine: str
    versions: dict[str, str]
    commit: str


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        label: For the table.
        backend: Registered name.
        changes: To the backend's default configuration.
        padded: Whether every expert is given as many rows as the fullest.
    """

    label: str
    backend: str
    changes: tuple[tuple[str, Any], ...] = ()
    padded: bool = False


class Bench:
    """Where claims run, and how two sides are compared there.

    Args:
        smoke: Tiny shapes and short timing.
    """

    def __init__(self, *, smoke: bool) -> None:
        self.smoke = smoke
        self.dispatcher = get_dispatcher()
        self.machine: Machine = self.dispatcher.machine
        self.device = torch.device(self.machine.device)
        self.timing: dict[str, Any] = {"budget_s": 0.0 if smoke else 0.06, "min_rounds": 1 if smoke else 4}
        self._versions = records.versions(self.machine)
        self._commit = records.commit(Path.cwd())
        self._experts: dict[tuple[str, DType], ExpertWeights] = {}
        self._drawn: tuple[object, Drawn] | None = None
        self._times: dict[object, list[float]] = {}

    def layers(self, *names: str) -> tuple[Workload, ...]:
        """The named workloads, or the tiny one."""
        return (SMOKE,) if self.smoke else tuple(workload(name) for name in names)

    def tokens(self, *counts: int) -> tuple[int, ...]:
        """The token counts, or tiny ones."""
        return (4,) if self.smoke else counts

    def dtypes(self, *names: DType) -> tuple[DType, ...]:
        """Those given; FP32 on a CPU, where the interpreter computes BF16 wrongly."""
        return names if self.device.type == "cuda" else ("fp32",)

    def mode(self, *sides: Side) -> Mode:
        """Graph replays where both sides can be captured."""
        if self.device.type != "cuda":
            return "eager"
        return "eager" if any(side.backend == "reference" for side in sides) else "graph"

    def row(self, claim: "Claim", layer: str, dtype: str, M: int, mode: Mode, **found: Any) -> ClaimRow:
        """A row with this run's provenance."""
        return ClaimRow(
            claim=claim.name, published=claim.published, workload=layer, dtype=dtype, M=M, mode=mode,
            machine=self.machine.name, versions=self._versions, commit=self._commit, **found,
        )  # fmt: skip

    def compare(
        self,
        claim: "Claim",
        layer: Workload,
        dtype: DType,
        M: int,
        baseline: Side,
        variant: Side,
        routing: RoutingDistribution = ROUTINGS["uniform"],
    ) -> ClaimRow:
        """Check and time both sides on the same tokens and experts."""
        mode = self.mode(baseline, variant)
        found: dict[str, Any] = {"baseline": baseline.label, "variant": variant.label, "routing": routing.name}
        compared = layer, dtype, M, mode, routing, baseline, variant
        try:
            if compared not in self._times:
                self._times[compared] = (
                    [self._time(layer, dtype, M, mode, routing, side) for side in (baseline, variant)]
                    if (baseline.padded != variant.padded)
                    else self._time_both(layer, dtype, M, mode, routing, baseline, variant)
                )
            times = self._times[compared]
        except (_NotComparableError, BackendUnavailableError) as error:
            return self.row(claim, layer.name, dtype, M, mode, reason=str(error), **found)
        except Exception as error:
            if lost_device(error):
                raise
            return self.row(claim, layer.name, dtype, M, mode, reason=summary(error), **found)
        found |= {"baseline_us": times[0], "variant_us": times[1], "value": times[0] / times[1]}
        return self.row(claim, layer.name, dtype, M, mode, **found)

    def _time_both(
        self, layer: Workload, dtype: DType, M: int, mode: Mode, routing: RoutingDistribution, *sides: Side
    ) -> list[float]:
        problem = layer.problem(M, dtype, self.machine, mode)
        experts = self.experts(layer, dtype)
        key = layer, dtype, M, routing
        if self._drawn is None or self._drawn[0] != key:
            self._drawn = None
            self._drawn = key, self._draw(problem, routing, experts)
        inputs, truths = self._drawn[1]
        calls = {index: self._checked(side, problem, experts, inputs, truths) for index, side in enumerate(sides)}
        timings = time_interleaved(calls, inputs, mode=mode, **self.timing)
        return [timings[index].us for index in calls]

    def _time(
        self, layer: Workload, dtype: DType, M: int, mode: Mode, routing: RoutingDistribution, side: Side
    ) -> float:
        """One side on single-expert rows, padded to the fullest expert's or as they come; the sides' inputs differ."""
        problem = layer.problem(M, dtype, self.machine, mode)
        inputs = tuple(
            one_row_per_slot(given, layer.E, padded=side.padded)
            for given in make_inputs(problem, routing, self.device, self._count(M))
        )
        rows = max(given.hidden_states.shape[0] for given in inputs)
        flat = Workload(layer.name, layer.E, 1, layer.K, layer.N).problem(rows, dtype, self.machine, mode)
        experts = self.experts(layer, dtype)
        truths = reference_outputs(experts, inputs[:1], tokens=CHECKED_TOKENS)
        call = self._checked(side, flat, experts, inputs, truths)
        return time_interleaved({"": call}, inputs, mode=mode, **self.timing)[""].us

    def _draw(self, problem: MoEProblem, routing: RoutingDistribution, experts: ExpertWeights) -> Drawn:
        inputs = make_inputs(problem, routing, self.device, self._count(problem.M))
        return inputs, reference_outputs(experts, inputs[:1], tokens=CHECKED_TOKENS)

    def _count(self, M: int) -> int:
        """Distinct inputs: many tokens hit every expert, whose weights no cache holds."""
        return 1 if self.smoke else 8 if M < FEW_TOKENS else 2

    def _checked(
        self,
        side: Side,
        problem: MoEProblem,
        experts: ExpertWeights,
        inputs: Sequence[LayerInputs],
        truths: Sequence[torch.Tensor],
    ) -> Call:
        backend: Backend = self.dispatcher.planner.backend(side.backend)
        if reasons := backend.unsupported_reasons(problem):
            raise _NotComparableError(f"{side.backend}: {'; '.join(reasons)}")
        data = backend.default_config(problem).model_dump()
        if unknown := [name for name, _ in side.changes if name not in data]:
            raise _NotComparableError(f"{side.backend} has no option {', '.join(unknown)}")
        config = backend.config_type.model_validate(data | dict(side.changes))
        call = backend_call(backend, experts, config)
        verdict = verify(call, inputs, truths, tolerance=backend.tolerance[problem.dtype], mode=problem.mode)
        if not verdict.ok:
            raise _NotComparableError(f"{side.label} is wrong: {verdict.reason}")
        return call

    def experts(self, layer: Workload, dtype: DType) -> ExpertWeights:
        """The layer's weights, kept for the next claim while there is room."""
        key = (layer.name, dtype)
        if key not in self._experts:
            if self.device.type == "cuda" and torch.cuda.mem_get_info()[0] < torch.cuda.mem_get_info()[1] / 2:
                self.forget()
            made = make_experts(layer, dtype, self.device, torch.Generator(self.device).manual_seed(0))
            self._experts[key] = made
        return self._experts[key]

    def forget(self) -> None:
        """Give back the weights' memory."""
        self._experts.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class _NotComparableError(Exception):
    """One side cannot run here, or is wrong."""


def one_row_per_slot(given: LayerInputs, E: int, *, padded: bool) -> LayerInputs:
    """The same work as single-expert rows sorted by expert, optionally padded to the fullest expert's count.

    Args:
        given: A routing ``[M, topk]`` of ids in 0…E-1.
        E: Experts.
        padded: Give every expert as many rows as the fullest has; rows of padding weigh nothing.

    Returns:
        ``[S, K]`` states, ``[S, 1]`` weights and ids, S = M·topk, or E times the fullest expert's rows.
    """
    topk = given.topk_ids.shape[1]
    ids, order = given.topk_ids.flatten().sort(stable=True)
    hidden, weights = given.hidden_states[order // topk], given.topk_weights.flatten()[order]
    if padded:
        counts = torch.bincount(ids, minlength=E)
        fullest = int(counts.max())
        position = torch.arange(ids.numel(), device=ids.device) - (counts.cumsum(0) - counts)[ids]
        target = ids * fullest + position
        hidden = hidden.new_zeros(E * fullest, hidden.shape[1]).index_copy_(0, target, hidden)
        weights = weights.new_zeros(E * fullest).index_copy_(0, target, weights)
        ids = torch.arange(E, device=ids.device, dtype=ids.dtype).repeat_interleave(fullest)
    return LayerInputs(hidden.contiguous(), weights[:, None].contiguous(), ids[:, None].contiguous())


def column_major_order(bench: Bench, claim: "Claim") -> Iterator[ClaimRow]:
    """The persistent kernel walking tiles column by column, against row by row and against groups."""
    for layer in bench.layers(*MODELS):
        for dtype in bench.dtypes("bf16", "fp8"):
            for M in bench.tokens(256, 1024, 4096, 16384):
                column = Side("column-major", "triton_persistent", (("order", "column_major"),))
                for order in ("row_major", "grouped"):
                    other = Side(order.replace("_", "-"), "triton_persistent", (("order", order),))
                    yield bench.compare(claim, layer, dtype, M, other, column)


def split_k(bench: Bench, claim: "Claim") -> Iterator[ClaimRow]:
    """The decode kernels with their default splits, and with 4, against no split at all."""
    tensor = (("gate_up", "tensor"), ("down", "tensor"))  # the other method does not split
    whole = Side("no split", "triton_splitk", (*tensor, ("splits_gate_up", 1), ("splits_down", 1)))
    for layer in bench.layers(*MODELS):
        for dtype in bench.dtypes("bf16", "fp8"):
            for M in bench.tokens(1, 4, 16):
                yield bench.compare(claim, layer, dtype, M, whole, Side("default splits", "triton_splitk", tensor))
                four = Side("4 splits", "triton_splitk", (*tensor, ("splits_gate_up", 4), ("splits_down", 4)))
                yield bench.compare(claim, layer, dtype, M, whole, four)


def padding_free(bench: Bench, claim: "Claim") -> Iterator[ClaimRow]:
    """The same kernel on the rows there are, against every expert padded to the fullest one's rows."""
    free, padded = Side("padding-free", "triton_persistent"), Side("padded", "triton_persistent", padded=True)
    for layer in bench.layers(*MODELS):
        for dtype in bench.dtypes("bf16", "fp8"):
            for M in bench.tokens(256, 4096):
                for name in ("uniform", "dirichlet-4"):
                    yield bench.compare(claim, layer, dtype, M, padded, free, ROUTINGS[name])


def persistent(bench: Bench, claim: "Claim") -> Iterator[ClaimRow]:
    """The persistent kernels against the naive per-expert loop of torch products, eager both."""
    yield from _against_the_loop(bench, claim, (256, 1024, 4096), ("triton_persistent",))


def all_combined(bench: Bench, claim: "Claim") -> Iterator[ClaimRow]:
    """Every one of our Triton backends against the naive loop, eager: the best at each point is the combination."""
    yield from _against_the_loop(bench, claim, (1, 16, 256, 4096), ("triton_splitk", "triton_persistent"))


def _against_the_loop(
    bench: Bench, claim: "Claim", tokens: tuple[int, ...], names: tuple[str, ...]
) -> Iterator[ClaimRow]:
    for layer in bench.layers(*MODELS):
        for M in bench.tokens(*tokens):
            for dtype in bench.dtypes("bf16"):
                for name in names:
                    yield bench.compare(claim, layer, dtype, M, Side("naive loop", "reference"), Side(name, name))


def fp8_rate(bench: Bench, claim: "Claim") -> Iterator[ClaimRow]:
    """DeepGEMM's contiguous grouped FP8 product alone, 4 experts of 8192 rows, [7168 → 4096] and back, in TFLOP/s."""
    for out_columns, depth in ((4096, 7168), (7168, 2048)):
        groups, rows = 4, 8192
        what = f"{groups}×{rows} rows, {depth} → {out_columns}"
        found: dict[str, Any] = {"baseline": "", "variant": "deep_gemm grouped product"}
        try:
            us = _grouped_product_us(bench, groups, rows, out_columns, depth)
        except (_NotComparableError, BackendUnavailableError) as error:
            yield bench.row(claim, what, "fp8", groups * rows, "eager", reason=str(error), **found)
            continue
        rate = 2 * groups * rows * out_columns * depth / us / 1e6
        yield bench.row(claim, what, "fp8", groups * rows, "graph", variant_us=us, value=rate, **found)


def _grouped_product_us(bench: Bench, groups: int, rows: int, out_columns: int, depth: int) -> float:
    if bench.device.type != "cuda" or bench.smoke:
        raise _NotComparableError("needs a Hopper GPU and no --smoke")
    bench.dispatcher.planner.backend("deep_gemm")  # raises with its reasons where it is absent
    try:
        library = importlib.import_module("deep_gemm")
    except ImportError:
        library = importlib.import_module("vllm.third_party.deep_gemm")
    bench.forget()
    from moe_dispatch.backends.stages.quantize import quantize_rows_torch

    codes, scale = quantize_rows_torch(torch.randn(groups * rows, depth, device=bench.device))
    scale = library.get_mn_major_tma_aligned_tensor(scale)
    weights, weight_scale = quantize_blocks(torch.randn(groups, out_columns, depth, device=bench.device))
    layout = torch.arange(groups, device=bench.device, dtype=torch.int32).repeat_interleave(rows)
    out = torch.empty(groups * rows, out_columns, dtype=torch.bfloat16, device=bench.device)

    def product(_: LayerInputs) -> torch.Tensor:
        library.m_grouped_fp8_gemm_nt_contiguous(
            (codes, scale), (weights, weight_scale), out, layout, disable_ue8m0_cast=True
        )
        return out

    unused = LayerInputs(out[:1], out[:1].float(), layout[:1])
    return time_interleaved({"": product}, (unused,), mode="graph", **bench.timing)[""].us


@dataclass(frozen=True)
class Claim:
    """Something published.

    Attributes:
        name: Short.
        published: The least ratio (or TFLOP/s) that would reproduce it.
        said: As published.
        run: Measures it; its docstring says what it compares.
    """

    name: str
    published: float
    said: str
    run: Callable[[Bench, "Claim"], Iterator[ClaimRow]]


CLAIMS: Final = (
    Claim("column-major", 4.4, "up to 4.4× over row-major", column_major_order),
    Claim("split-k", 1.18, "18–20 % at decode", split_k),
    Claim("padding-free", 1.3, "1.3–5.15× over padding to the fullest", padding_free),
    Claim("persistent", 2.62, "2.62× over the naive loop", persistent),
    Claim("all-combined", 2.0, "2–4× over the naive loop", all_combined),
    Claim("fp8-rate", 1550.0, "1550 TFLOP/s on an H800", fp8_rate),
)


def markdown(found: Sequence[ClaimRow], *, smoke: bool = False) -> str:
    """A table of verdicts, one line a claim; the best variant counts where several meet one baseline at a point.

    Args:
        found: Rows.
        smoke: Whether they come from tiny shapes, which decide nothing.
    """
    lines = ["| claim | published | best | worst | geometric mean | points | verdict | what is compared |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for claim in CLAIMS:
        rows = [row for row in found if row.claim == claim.name]
        points: dict[tuple[str, str, int, str, str], float] = {}
        for row in rows:
            if row.value is not None:
                point = row.workload, row.dtype, row.M, row.routing, row.baseline
                points[point] = max(row.value, points.get(point, 0.0))
        values = sorted(points.values())
        said = (claim.run.__doc__ or "").splitlines()[0]
        if not values:
            why = rows[0].reason if rows else "not run"
            lines.append(f"| {claim.name} | {claim.said} | – | – | – | 0 | not measured: {why} | {said} |")
            continue
        mean = math.exp(sum(map(math.log, values)) / len(values))
        verdict = "smoke only" if smoke else "reproduced" if values[-1] >= claim.published else "refuted here"
        lines.append(
            f"| {claim.name} | {claim.said} | {values[-1]:.4g} | {values[0]:.4g} | {mean:.4g} "
            f"| {len(values)} | {verdict} | {said} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run claims, keep their rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claim", action="append", choices=[claim.name for claim in CLAIMS], help="only these")
    parser.add_argument("--out", type=Path, help="JSON Lines file that rows are added to")
    parser.add_argument("--budget", type=float, help="seconds in all, shared by the claims; the rest is left out")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: shows that it runs, proves nothing")
    given = parser.parse_args(arguments)
    bench = Bench(smoke=given.smoke)
    found: list[ClaimRow] = []
    asked = [claim for claim in CLAIMS if not given.claim or claim.name in given.claim]
    begin = time.monotonic()
    for place, claim in enumerate(asked, start=1):
        for row in claim.run(bench, claim):
            found.append(row)
            shown = row.reason or f"{row.value:.4g}"
            print(f"{row.claim}: {row.workload} {row.dtype} M={row.M}, {row.variant}: {shown}", file=sys.stderr)
            if given.out:
                records.append(given.out, row)
            if given.budget is not None and time.monotonic() - begin > given.budget * place / len(asked):
                break
    print(markdown(found, smoke=given.smoke))
    return 0


if __name__ == "__main__":
    sys.exit(main())
