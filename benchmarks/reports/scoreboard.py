"""Compare recorded rows with the targets of `moe_dispatch.benchmarks.targets`."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from moe_dispatch.benchmarks.baselines import BASELINES
from moe_dispatch.benchmarks.rows import BenchRow
from moe_dispatch.benchmarks.suites import MODELS, SKEWED, UNIFORM
from moe_dispatch.benchmarks.targets import SCOREBOARD, SMALL_MODEL, Metric, Side, Target, TargetResult
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.policies.measurements.table import geometric_mean
from moe_dispatch.problem import Mode

# This package's own kernels, without those of DeepGEMM and vLLM.
TRITON_BACKENDS: Final = ("triton_persistent", "triton_splitk", "triton_vector", "gluon_hopper")

SIDES: Final[dict[Side, Callable[[str], bool]]] = {
    "all backends": lambda name: name not in BASELINES,
    "Triton backends": lambda name: name in TRITON_BACKENDS,
    "all baselines": lambda name: name in BASELINES,
    "vllm": lambda name: name == "vllm",
}

Point = tuple[str, int]


class Scores:
    """Times by point: the fastest configuration of each backend and baseline.

    Attributes:
        best: Its row by workload, dtype, M, mode, routing and name.

    Raises:
        InvalidInputError: The rows are of several machines.
    """

    def __init__(self, rows: Iterable[BenchRow]) -> None:
        rows = list(rows)
        machines = sorted({row.machine for row in rows})
        if len(machines) > 1:
            raise InvalidInputError(f"the rows must be of one machine, got {', '.join(machines)}")
        self.best: dict[tuple[str, str, int, str, str, str], BenchRow] = {}
        for row in rows:
            if row.us is None:
                continue
            key = row.workload, row.dtype, row.M, row.mode, row.routing, row.backend
            if key not in self.best or row.us < (self.best[key].us or math.inf):
                self.best[key] = row

    def fastest(
        self, point: Point, dtype: str, side: Side, *, mode: Mode = "graph", routing: str = UNIFORM
    ) -> BenchRow | None:
        """The fastest row of one side at a point (model, M); None if that side has no time there."""
        model, M = point
        where = (model, dtype, M, mode, routing)
        rows = [row for key, row in self.best.items() if key[:5] == where and SIDES[side](key[5])]
        return min(rows, key=lambda row: row.us or math.inf, default=None)

    def row(self, point: Point, dtype: str, name: str) -> BenchRow | None:
        """The fastest row of one backend or baseline in graphs at a point (model, M); None if it has no time there."""
        model, M = point
        return self.best.get((model, dtype, M, "graph", UNIFORM, name))

    def winners(self, dtype: str) -> dict[Point, BenchRow]:
        """The fastest backend in graphs at every point (workload, M) of a dtype."""
        points = {(key[0], key[2]) for key in self.best if key[1] == dtype}
        return {point: row for point in points if (row := self.fastest(point, dtype, "all backends"))}


def scoreboard(rows: Iterable[BenchRow]) -> list[TargetResult]:
    """The result of every target by the rows of one machine.

    Raises:
        InvalidInputError: The rows are of several machines.
    """
    scores = Scores(rows)
    return [METRICS[target.metric](scores, target) for target in SCOREBOARD]


def _points(target: Target) -> list[Point]:
    return [(model, M) for model in MODELS for M in target.tokens]


def _roofline_fraction(scores: Scores, target: Target) -> TargetResult:
    points = _points(target)
    fastest = {point: row for point in points if (row := scores.fastest(point, target.dtype, target.ours))}
    fractions = {point: row.fraction for point, row in fastest.items() if row.fraction}
    worst = min(fractions, key=lambda point: fractions[point], default=None)
    where = f"least {fractions[worst]:.2f}: {_name(worst)}, {fastest[worst].backend}" if worst else ""
    return TargetResult(target, _mean(list(fractions.values())), where, len(points) - len(fractions))


def _speed_ups(scores: Scores, target: Target, mode: Mode = "graph") -> dict[Point, float]:
    """Time of the fastest baseline over that of the fastest backend, at the points where both have one."""
    ratios: dict[Point, float] = {}
    for point in _points(target):
        ours = scores.fastest(point, target.dtype, target.ours, mode=mode)
        theirs = scores.fastest(point, target.dtype, target.theirs, mode=mode)
        if ours and theirs and ours.us and theirs.us:
            ratios[point] = theirs.us / ours.us
    return ratios


def _worst_speed_up(scores: Scores, target: Target) -> TargetResult:
    ratios = _speed_ups(scores, target)
    return _worst(target, ratios, min(ratios, key=lambda point: ratios[point], default=None))


def _mean_speed_up(scores: Scores, target: Target) -> TargetResult:
    ratios = _speed_ups(scores, target)
    mean = _mean(list(ratios.values()))
    return TargetResult(target, mean, missing=len(_points(target)) - len(ratios))


def _small_time(scores: Scores, target: Target) -> TargetResult:
    row = scores.fastest((SMALL_MODEL, 1), target.dtype, target.ours)
    return TargetResult(target, row.us, row.backend) if row else TargetResult(target, None, missing=1)


def _small_eager_speed_up(scores: Scores, target: Target) -> TargetResult:
    ratios = {model: ratio for (model, _), ratio in _speed_ups(scores, target, mode="eager").items()}
    others = ", ".join(f"{model} {ratio:.3g}" for model, ratio in ratios.items() if model != SMALL_MODEL)
    return TargetResult(target, ratios.get(SMALL_MODEL), others, missing=0 if SMALL_MODEL in ratios else 1)


def _skew(scores: Scores, target: Target) -> TargetResult:
    """Time under skewed routing over that under uniform routing, at the worst point."""
    ratios: dict[Point, float] = {}
    for point in _points(target):
        uniform = scores.fastest(point, target.dtype, target.ours)
        skewed = scores.fastest(point, target.dtype, target.ours, routing=SKEWED)
        if uniform and skewed and uniform.us and skewed.us:
            ratios[point] = skewed.us / uniform.us
    return _worst(target, ratios, max(ratios, key=lambda point: ratios[point], default=None))


def _worst(target: Target, ratios: dict[Point, float], worst: Point | None) -> TargetResult:
    return TargetResult(target, ratios[worst] if worst else None, _name(worst), len(_points(target)) - len(ratios))


METRICS: Final[dict[Metric, Callable[[Scores, Target], TargetResult]]] = {
    "roofline fraction": _roofline_fraction,
    "speed-up, worst": _worst_speed_up,
    "speed-up, mean": _mean_speed_up,
    "time": _small_time,
    "eager speed-up": _small_eager_speed_up,
    "skew": _skew,
}


def _mean(values: Sequence[float]) -> float | None:
    return geometric_mean(values) if values else None


def _name(point: Point | None) -> str:
    return f"{point[0]} M={point[1]}" if point else ""
