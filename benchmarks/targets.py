"""Performance targets of the project as data, and the verdict on each.

A target passes only on complete evidence: points that were not measured leave it open.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from moe_dispatch.benchmarks.suites import REGIONS, SKEWED, SKEWED_TOKENS, TOKENS
from moe_dispatch.problem import DType

Metric = Literal["roofline fraction", "speed-up, worst", "speed-up, mean", "time", "eager speed-up", "skew"]
Side = Literal["all backends", "Triton backends", "all baselines", "vllm"]

# The model of the targets at M=1. In a larger layer, reading the weights alone is most of an eager call.
SMALL_MODEL: Final = "qwen3-30b-a3b"


@dataclass(frozen=True)
class Target:
    """One quantity that benchmark rows decide (`reports.scoreboard`), with the limit that it has to reach.

    Attributes:
        what: The quantity, for a reader.
        limit: Least value, or greatest if `at_least` is False.
        at_least: Whether more is better.
        metric: How the quantity is computed; see `reports.scoreboard.METRICS`.
        ours: Backends whose fastest row counts at each point.
        theirs: Baselines that it is compared with, where it is a comparison.
    """

    what: str
    limit: float
    at_least: bool = True
    metric: Metric = "roofline fraction"
    dtype: DType = "bf16"
    tokens: tuple[int, ...] = TOKENS
    ours: Side = "all backends"
    theirs: Side = "all baselines"


@dataclass(frozen=True)
class TargetResult:
    """A target with what was reached.

    Attributes:
        value: What was reached; None without any evidence.
        where: The point that decides, or other particulars.
        missing: Number of points that the target needs and that have no time.
    """

    target: Target
    value: float | None
    where: str = ""
    missing: int = 0

    @property
    def verdict(self) -> str:
        """``pass``, ``FAIL``, or ``open`` if evidence is missing and nothing measured fails."""
        if self.value is None:
            return "open"
        reached = self.value >= self.target.limit if self.target.at_least else self.value <= self.target.limit
        if not reached:
            return "FAIL"
        return "open" if self.missing else "pass"


def markdown(results: Iterable[TargetResult]) -> str:
    """Results as a Markdown table."""
    lines = ["| target | reached | limit | verdict | where |", "|---|---|---|---|---|"]
    for result in results:
        target = result.target
        value = "–" if result.value is None else f"{result.value:.3g}"
        missing = f"{result.missing} points without a time" if result.missing else ""
        where = "; ".join(filter(None, (result.where, missing)))
        limit = f"{'≥' if target.at_least else '≤'} {target.limit:g}"
        lines.append(f"| {target.what} | {value} | {limit} | {result.verdict} | {where} |")
    return "\n".join(lines)


def _targets(dtype: DType, *, regions: dict[str, float], triton_mean: float, small_us: float) -> tuple[Target, ...]:
    return (
        *(
            Target(
                f"{dtype} {region}: fraction of the roofline, geometric mean", limit, dtype=dtype,
                metric="roofline fraction", tokens=REGIONS[region],
            )
            for region, limit in regions.items()
        ),
        Target(
            f"{dtype}: fastest backend against the fastest baseline, worst point", 0.985, dtype=dtype,
            metric="speed-up, worst",
        ),
        Target(
            f"{dtype}: Triton backends against vLLM, worst point", 0.98, dtype=dtype,
            metric="speed-up, worst", ours="Triton backends", theirs="vllm",
        ),
        Target(
            f"{dtype}: Triton backends against vLLM, geometric mean", triton_mean, dtype=dtype,
            metric="speed-up, mean", ours="Triton backends", theirs="vllm",
        ),
        Target(
            f"{dtype}: {SMALL_MODEL} at M=1, µs", small_us, at_least=False, dtype=dtype, metric="time", tokens=(1,),
        ),
        Target(
            f"{dtype}: {SMALL_MODEL} eager at M=1 against vLLM's eager call", 2.0, dtype=dtype,
            metric="eager speed-up", tokens=(1,), theirs="vllm",
        ),
        Target(
            f"{dtype}: time at {SKEWED} over uniform, M ≥ 1024, worst point", 1.15, at_least=False, dtype=dtype,
            metric="skew", tokens=SKEWED_TOKENS,
        ),
    )  # fmt: skip


SCOREBOARD: Final[tuple[Target, ...]] = (
    *_targets("bf16", regions={"decode": 1.00, "middle": 0.94, "prefill": 0.92}, triton_mean=1.10, small_us=20.0),
    *_targets("fp8", regions={"decode": 0.91, "middle": 0.88, "prefill": 0.82}, triton_mean=1.30, small_us=14.0),
)
