"""How near a layer must be to count: chosen so that what each layer is told by the others loses least."""

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from .neighbours import MOST_LAG, RISK, SCALES, UNKNOWN_LAG, UNKNOWN_WEIGHT, Point, badness

CHOICES: Final = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 8.0, math.inf)
_ROUNDS: Final = 3
# Regret counts, and so that none is very bad, this much of its square.
_SQUARE: Final = 3.0


class LeaveOneOut:
    """Points by layer, each to be asked about with its layer left out.

    Args:
        groups: Points by layer.
    """

    def __init__(self, groups: Mapping[Hashable, Sequence[Point[int]]]) -> None:
        points = [point for held in groups.values() for point in held]
        layers = torch.tensor([place for place, held in enumerate(groups.values()) for _ in held])
        self.layers = len(groups)
        self._x = torch.tensor([point.x for point in points], dtype=torch.float64)  # [P, F]
        columns = {index: place for place, index in enumerate(sorted({i for point in points for i in point.lags}))}
        self._lags = torch.full((len(points), len(columns)), math.nan, dtype=torch.float64)  # [P, C]
        for row, point in enumerate(points):
            for index, lag in point.lags.items():
                self._lags[row, columns[index]] = lag
        self._same = layers[:, None] == layers[None, :]  # [P, P]

    def regrets(self, scales: Sequence[float]) -> Tensor:
        """What each choice loses, ``[P]``; see `neighbours.expected_lags`."""
        x = self._x / torch.tensor(scales, dtype=torch.float64)
        distances = (x[:, None] - x[None, :]).square().sum(-1).masked_fill(self._same, math.inf)
        weights = torch.exp((distances.amin(1, keepdim=True) - distances) / 2)
        measured = ~self._lags.isnan()
        unknown = UNKNOWN_WEIGHT * weights.sum(1, keepdim=True)
        near = weights @ measured.double()
        lags = self._lags.nan_to_num().clamp(max=MOST_LAG)
        expected = (weights @ (lags + RISK * lags.square()) + unknown * badness(UNKNOWN_LAG)) / (near + unknown)
        # Only what was measured here can be judged here, and only what was measured elsewhere is known.
        chosen = expected.masked_fill(~measured | (near == 0), math.inf).argmin(1, keepdim=True)
        return self._lags.gather(1, chosen)[:, 0].expm1()

    def loss(self, scales: Sequence[float]) -> float:
        """What is minimised."""
        lost = self.regrets(scales)
        return float((lost + _SQUARE * lost.square()).mean())


def fit_scales(groups: Mapping[Hashable, Sequence[Point[int]]], start: Sequence[float] = SCALES) -> list[float]:
    """The scales that lose least, one feature after another; `start` with fewer than three layers.

    Args:
        groups: Points by layer.
        start: Where to begin.
    """
    scales = list(start)
    if len(groups) < 3:
        return scales
    asked = LeaveOneOut(groups)
    least = asked.loss(scales)
    for _, place in itertools.product(range(_ROUNDS), range(len(scales))):
        for value in CHOICES:
            tried = [*scales[:place], value, *scales[place + 1 :]]
            if (loss := asked.loss(tried)) < least - 1e-9:
                least, scales = loss, tried
    return scales
