"""Hold recorded rows against the bars that the kernels have to reach.

    python -m moe_dispatch.benchmarks.reports.scoreboard benchmarks/results/nvidia_h200

A bar passes only on complete evidence: points that were not measured leave it open, and say which they are.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moe_dispatch.benchmarks.baselines import BASELINES
from moe_dispatch.benchmarks.command import mistakes_exit
from moe_dispatch.benchmarks.rows import BenchRow, load

MODELS: Final = ("deepseek-v3", "qwen3-30b-a3b", "mixtral-8x7b")
REGIONS: Final[dict[str, tuple[int, ...]]] = {
    "decode": (1, 4, 16, 64), "middle": (256, 1024), "prefill": (4096, 16384),
}  # fmt: skip
TOKENS: Final = tuple(M for region in REGIONS.values() for M in region)
FLOOR_BARS: Final[dict[str, dict[str, float]]] = {
    "bf16": {"decode": 0.93, "middle": 0.86, "prefill": 0.76},
    "fp8": {"decode": 0.85, "middle": 0.77, "prefill": 0.70},
}
PEER_RATIO: Final = 0.97
TRITON: Final = ("triton_persistent", "gluon_hopper", "triton_splitk", "triton_vector")
TRITON_WORST: Final = 0.98
TRITON_MEAN: Final = {"bf16": 1.10, "fp8": 1.30}
# The model of the bars at M=1: of a larger layer, reading the weights alone is most of an eager call.
SMALL: Final = "qwen3-30b-a3b"
SMALL_US: Final = {"bf16": 25.0, "fp8": 20.0}
EAGER_RATIO: Final = 2.0
SKEW_RATIO: Final = 1.15
SKEWED: Final = "dirichlet-4"
VLLM: Final = "vllm"


@dataclass(frozen=True)
class Bar:
    """One line of the scoreboard.

    Attributes:
        what: Which bar.
        value: What was reached; None without any evidence.
        limit: The bar.
        at_least: Whether more is better.
        where: The point that decides, or what is missing.
        missing: Points that it needs and that have no time.
    """

    what: str
    value: float | None
    limit: float
    at_least: bool = True
    where: str = ""
    missing: int = 0

    @property
    def verdict(self) -> str:
        """``pass``, ``FAIL``, or ``open`` where evidence is missing and nothing measured fails."""
        if self.value is None:
            return "open"
        reached = self.value >= self.limit if self.at_least else self.value <= self.limit
        if not reached:
            return "FAIL"
        return "open" if self.missing else "pass"


class Scores:
    """Times by point, the best configuration of each backend.

    Args:
        rows: Of one machine.
    """

    def __init__(self, rows: Iterable[BenchRow]) -> None:
        self._best: dict[tuple[str, str, int, str, str, str], BenchRow] = {}
        for row in rows:
            if row.us is None:
                continue
            key = row.workload, row.dtype, row.M, row.mode, row.routing, row.backend
            if key not in self._best or row.us < (self._best[key].us or math.inf):
                self._best[key] = row

    def fastest(
        self,
        model: str,
        dtype: str,
        M: int,
        among: Callable[[str], bool],
        mode: str = "graph",
        routing: str = "uniform",
    ) -> BenchRow | None:
        """The fastest row of a point among the backends that a test admits."""
        point = (model, dtype, M, mode, routing)
        found = [row for key, row in self._best.items() if key[:5] == point and among(key[5])]
        return min(found, key=lambda row: row.us or math.inf, default=None)


def ours(backend: str) -> bool:
    """Whether it is one of this package's backends."""
    return backend not in BASELINES


def theirs(backend: str) -> bool:
    """Whether it is a baseline."""
    return backend in BASELINES


def in_house(backend: str) -> bool:
    """Whether it is our Triton, without DeepGEMM and vLLM."""
    return backend in TRITON


def scoreboard(rows: Iterable[BenchRow]) -> list[Bar]:
    """Every bar of issue 3's acceptance that rows can show."""
    scores = Scores(rows)
    bars = []
    for dtype in FLOOR_BARS:
        bars += [_floor_bar(scores, dtype, region) for region in REGIONS]
        bars.append(_worst_ratio(scores, dtype, "best of ours against the best baseline", PEER_RATIO, ours, theirs))
        bars.append(
            _worst_ratio(
                scores, dtype, "in-house Triton against vLLM", TRITON_WORST, in_house, lambda name: name == VLLM
            )
        )
        bars.append(_mean_ratio(scores, dtype))
        bars.append(_small(scores, dtype))
        bars.append(_eager(scores, dtype))
        bars.append(_skew(scores, dtype))
    return bars


def _points(tokens: Sequence[int] = TOKENS) -> list[tuple[str, int]]:
    return [(model, M) for model in MODELS for M in tokens]


def _floor_bar(scores: Scores, dtype: str, region: str) -> Bar:
    points = _points(REGIONS[region])
    rows = [scores.fastest(model, dtype, M, ours) for model, M in points]
    fractions = [row.fraction for row in rows if row and row.fraction]
    worst = min((row for row in rows if row and row.fraction), key=lambda row: row.fraction or 0.0, default=None)
    return Bar(
        f"{dtype} {region}: fraction of the floor, geometric mean", _mean(fractions), FLOOR_BARS[dtype][region],
        where=f"least {worst.fraction:.2f}: {_at(worst)}, {worst.backend}" if worst else "",
        missing=len(points) - len(fractions),
    )  # fmt: skip


def _ratios(
    scores: Scores, dtype: str, one: Callable[[str], bool], other: Callable[[str], bool]
) -> dict[tuple[str, int], float]:
    """How many times faster `one` is than `other`, at the points where both have a time."""
    found = {}
    for model, M in _points():
        mine, baseline = scores.fastest(model, dtype, M, one), scores.fastest(model, dtype, M, other)
        if mine and baseline and mine.us and baseline.us:
            found[model, M] = baseline.us / mine.us
    return found


def _worst_ratio(
    scores: Scores, dtype: str, what: str, limit: float, one: Callable[[str], bool], other: Callable[[str], bool]
) -> Bar:
    ratios = _ratios(scores, dtype, one, other)
    worst = min(ratios, key=lambda point: ratios[point], default=None)
    return Bar(
        f"{dtype}: {what}, worst point", ratios[worst] if worst else None, limit,
        where=f"{worst[0]} M={worst[1]}" if worst else "", missing=len(_points()) - len(ratios),
    )  # fmt: skip


def _mean_ratio(scores: Scores, dtype: str) -> Bar:
    ratios = _ratios(scores, dtype, in_house, lambda name: name == VLLM)
    return Bar(
        f"{dtype}: in-house Triton against vLLM, geometric mean", _mean(list(ratios.values())), TRITON_MEAN[dtype],
        missing=len(_points()) - len(ratios),
    )  # fmt: skip


def _small(scores: Scores, dtype: str) -> Bar:
    row = scores.fastest(SMALL, dtype, 1, ours)
    return Bar(
        f"{dtype}: {SMALL} at M=1, µs", row.us if row else None, SMALL_US[dtype], at_least=False,
        where=row.backend if row else "", missing=0 if row else 1,
    )  # fmt: skip


def _eager(scores: Scores, dtype: str) -> Bar:
    ratios = {}
    for model in MODELS:
        mine = scores.fastest(model, dtype, 1, ours, "eager")
        baseline = scores.fastest(model, dtype, 1, lambda name: name == VLLM, "eager")
        if mine and baseline and mine.us and baseline.us:
            ratios[model] = baseline.us / mine.us
    others = ", ".join(f"{model} {ratio:.3g}" for model, ratio in ratios.items() if model != SMALL)
    return Bar(
        f"{dtype}: {SMALL} eager at M=1 against vLLM's eager call", ratios.get(SMALL), EAGER_RATIO, where=others,
        missing=0 if SMALL in ratios else 1,
    )  # fmt: skip


def _skew(scores: Scores, dtype: str) -> Bar:
    tokens = [M for M in TOKENS if M >= 1024]
    ratios = {}
    for model, M in _points(tokens):
        even, skewed = scores.fastest(model, dtype, M, ours), scores.fastest(model, dtype, M, ours, routing=SKEWED)
        if even and skewed and even.us and skewed.us:
            ratios[model, M] = skewed.us / even.us
    worst = max(ratios, key=lambda point: ratios[point], default=None)
    return Bar(
        f"{dtype}: time at {SKEWED} over uniform, M ≥ 1024, worst point", ratios[worst] if worst else None, SKEW_RATIO,
        at_least=False, where=f"{worst[0]} M={worst[1]}" if worst else "", missing=len(_points(tokens)) - len(ratios),
    )  # fmt: skip


def _mean(values: Sequence[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def _at(row: BenchRow) -> str:
    return f"{row.workload} M={row.M}"


def markdown(bars: Iterable[Bar]) -> str:
    """The scoreboard as a table."""
    lines = ["| bar | reached | limit | verdict | where |", "|---|---|---|---|---|"]
    for bar in bars:
        value = "–" if bar.value is None else f"{bar.value:.3g}"
        where = "; ".join(filter(None, (bar.where, f"{bar.missing} points without a time" if bar.missing else "")))
        lines.append(
            f"| {bar.what} | {value} | {'≥' if bar.at_least else '≤'} {bar.limit:g} | {bar.verdict} | {where} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the scoreboard; 1 if a bar fails or is open."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", help="files or folders of rows, of one machine")
    with mistakes_exit(parser):
        rows = load(parser.parse_args(arguments).rows)
    machines = sorted({row.machine for row in rows})
    if len(machines) != 1:
        print(f"the rows must be of one machine, got {', '.join(machines) or 'none'}", file=sys.stderr)
        return 2
    bars = scoreboard(rows)
    print(f"{machines[0]}, {len(rows)} rows\n\n{markdown(bars)}")
    return 0 if all(bar.verdict == "pass" for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
