"""What a layer that nobody measured should do: what did well on the measured layers that are like it.

Layers are alike where four numbers are: rows per expert (which decides between reading weights and computing), the
least time of the whole (beside which launches count or do not), and the two sides of an expert (which decide how tiles
fill the device). Each measured point says how far behind the fastest each candidate was; a candidate's expected lag is
the mean of those, nearer points counting more. The least expected lag is chosen, so what is minimised is the regret
itself. Lags count with their squares, so that a candidate that is good everywhere near beats one that is best here and
bad there.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from moe_dispatch.problem import MoEProblem

FEATURES: Final = ("rows", "time", "N", "K")
# Standard deviations of the kernel in octaves of each feature, as they are before a fit; infinite: it does not count.
SCALES: Final = (0.7, 2.0, 2.0, 4.0)
# Any rates of the right order will do: they make times of layers comparable.
_BANDWIDTH: Final = 4e12
_FLOPS: Final[Mapping[str, float]] = {"fp8": 1.3e15}
_OTHER_FLOPS: Final = 7e14
# A candidate that few of the near points measured is taken to be this far behind, with the weight of so much of them.
UNKNOWN_LAG: Final = math.log(1.3)
UNKNOWN_WEIGHT: Final = 0.05
# Beyond this, farther behind is no worse.
MOST_LAG: Final = math.log(3.0)
# How much a squared lag counts beside the lag.
RISK: Final = 2.0

Candidate = TypeVar("Candidate", bound=Hashable)


@dataclass(frozen=True)
class Point(Generic[Candidate]):
    """A measured layer at a token count.

    Attributes:
        x: Its features.
        best: log(least time measured / floor).
        lags: log(time / least time) of each candidate.
    """

    x: tuple[float, ...]
    best: float
    lags: Mapping[Candidate, float]


def floor_us(problem: MoEProblem) -> float:
    """The unit that times of different layers are compared in."""
    return problem.floor_us(_BANDWIDTH, _FLOPS.get(problem.dtype, _OTHER_FLOPS))


def features(problem: MoEProblem) -> tuple[float, ...]:
    """One value, in octaves, for each of `FEATURES`."""
    values = (problem.slots / problem.E, floor_us(problem), problem.N, problem.K)
    return tuple(map(math.log2, values))


def expected_lags(
    points: Sequence[Point[Candidate]], x: Sequence[float], scales: Sequence[float]
) -> tuple[float, dict[Candidate, float]]:
    """Expected log(least time / floor), and each candidate's lag that is as bad as those expected together."""
    weights = _weights(points, x, scales)
    whole = math.fsum(weights)
    sums: dict[Candidate, list[float]] = {}
    for weight, point in zip(weights, points, strict=True):
        for candidate, lag in point.lags.items():
            held = sums.setdefault(candidate, [UNKNOWN_WEIGHT * whole, UNKNOWN_WEIGHT * whole * badness(UNKNOWN_LAG)])
            held[0] += weight
            held[1] += weight * badness(min(lag, MOST_LAG))
    best = math.fsum(weight * point.best for weight, point in zip(weights, points, strict=True)) / whole
    return best, {candidate: _lag(bad / weight) for candidate, (weight, bad) in sums.items()}


def badness(lag: float) -> float:
    """What is averaged."""
    return lag + RISK * lag * lag


def _lag(bad: float) -> float:
    """The lag of this badness."""
    return (math.sqrt(1 + 4 * RISK * bad) - 1) / (2 * RISK)


def _weights(points: Iterable[Point[Candidate]], x: Sequence[float], scales: Sequence[float]) -> list[float]:
    distances = [
        math.fsum(((a - b) / scale) ** 2 for a, b, scale in zip(point.x, x, scales, strict=True)) for point in points
    ]
    nearest = min(distances)  # whatever is far from everything still has its nearest
    return [math.exp((nearest - distance) / 2) for distance in distances]
