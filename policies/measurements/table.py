"""Measured candidates as curves over M: looked up where M was measured, interpolated between.

Time is taken as a power of M between two measured token counts (linear in log M and log time), which a layer bound by
bandwidth and one bound by arithmetic both are.
"""

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from moe_dispatch.policies.measurements.schema import CalibrationFile, LayerKey
from moe_dispatch.policy import Choice
from moe_dispatch.problem import Mode

# Times closer than this are one time: quartiles of repeated runs differ by as much.
NOISE: Final = 0.0125
# So far behind the fastest, the winner of the calibration before stays: it may have won at NOISE, and noise adds to it.
STAYS: Final = 0.018
# How far a measured token count speaks for others: as it is, and in proportion to the tokens.
NEAR: Final = 4
FAR: Final = 64
# Between two measured token counts further apart than this, times bend too much to be interpolated: on an H200 the
# choices between M=1 and M=16384 of a layer lost up to 12 % to the rules'.
APART: Final = 16

Identity = tuple[str, tuple[tuple[str, int | str | bool], ...]]


@dataclass(frozen=True)
class Curve:
    """One candidate's times over M.

    Attributes:
        identity: Backend and configuration.
        tokens: Measured token counts, ascending.
        us: The score at each, in µs.
    """

    identity: Identity
    tokens: tuple[int, ...]
    us: tuple[float, ...]

    def at(self, M: int) -> float:
        """Time in µs, interpolated; beyond the ends see `LayerTable.rank`."""
        i = bisect.bisect_left(self.tokens, M)
        if i == len(self.tokens):
            # Above the measured, time grows with the tokens at most; near the end less is known than that.
            return self.us[-1] * M / self.tokens[-1]
        if self.tokens[i] == M or i == 0:
            return self.us[i]
        lower, upper = self.tokens[i - 1], self.tokens[i]
        share = math.log(M / lower) / math.log(upper / lower)
        return math.exp((1 - share) * math.log(self.us[i - 1]) + share * math.log(self.us[i]))


class LayerTable:
    """The measurements of one layer in one mode.

    Args:
        scores: Token count -> candidate -> time in µs; None for a candidate that was disqualified there.
        incumbents: Token count -> winner of the calibration before.
    """

    def __init__(
        self, scores: Mapping[int, Mapping[Identity, float | None]], incumbents: Mapping[int, Identity] | None = None
    ) -> None:
        self.scores = {M: dict(at) for M, at in sorted(scores.items()) if any(us for us in at.values())}
        self.tokens = tuple(self.scores)
        self._curves = tuple(curves(self.scores))
        self.winners = stable_winners(self.scores, incumbents)

    def rank(self, M: int) -> tuple[tuple[Identity, float], ...]:
        """Each backend's best configuration with its time, the fastest first; empty where nothing speaks for M."""
        if not self.tokens or not self.tokens[0] / NEAR <= M <= self.tokens[-1] * FAR:
            return ()
        i = bisect.bisect_left(self.tokens, M)
        around = self.tokens[max(i - 1, 0) : i + 1] if i == len(self.tokens) or self.tokens[i] != M else (M,)
        if len(around) == 2 and around[1] > around[0] * APART:
            return ()
        barred = {identity for near in around for identity, us in self.scores[near].items() if us is None}
        measured = around == (M,)
        # Who left the race at a neighbour was behind there; what it took further away says nothing of here.
        timed = [
            (curve.identity, curve.at(M))
            for curve in self._curves
            if curve.identity not in barred and all(near in curve.tokens for near in around)
        ]
        if not timed:
            return ()
        won = {self.winners[near] for near in around}
        # Where M was measured that is decided; between, what won at a neighbour stays within noise of the fastest.
        limit = math.inf if measured else min(us for _, us in timed) * (1 + NOISE)
        timed.sort(key=lambda pair: (not (pair[0] in won and pair[1] <= limit), pair[1]))
        best: dict[str, tuple[Identity, float]] = {}
        for identity, us in timed:
            best.setdefault(identity[0], (identity, us))
        return tuple(best.values())

    def choices(self, M: int, mode: str) -> tuple[Choice, ...]:
        """The ranking with its reasons."""
        ranked = self.rank(M)
        where = self._where(M, mode)
        return tuple(
            Choice(backend, f"{us:.1f} µs {where}{_lead(ranked, place)}", dict(config), us)
            for place, ((backend, config), us) in enumerate(ranked)
        )

    def _where(self, M: int, mode: str) -> str:
        if M in self.scores:
            return f"at M={M} ({mode})"
        i = bisect.bisect_left(self.tokens, M)
        if i == 0:
            return f"as at M={self.tokens[0]}, the least measured ({mode})"
        if i == len(self.tokens):
            how = "nearest measured" if self.tokens[-1] * NEAR >= M else "largest measured, in proportion to the tokens"
            return f"from M={self.tokens[-1]}, the {how} ({mode})"
        return f"between M={self.tokens[i - 1]} and M={self.tokens[i]} ({mode})"


def stable_winners(
    scores: Mapping[int, Mapping[Identity, float | None]], incumbents: Mapping[int, Identity] | None = None
) -> dict[int, Identity]:
    """The winner at each token count: of those within noise of the fastest, whoever is at many other token counts too.

    Where the incumbent is still near, it stays. Of the others, the candidate that is within noise at most token counts,
    and by most, wins them all, then the one of most in what is left, and so on: few different ones, and what noise does
    at one token count is outvoted by the others, so that two calibrations agree. Each vote is worth what it lacks to
    noise: were all equal, one at the border of noise would decide for all of them.
    """
    found: dict[int, Identity] = {}
    near: dict[int, dict[Identity, float]] = {}
    for M, at in scores.items():
        timed = {identity: us for identity, us in at.items() if us is not None}
        fastest = min(timed.values())
        incumbent = (incumbents or {}).get(M)
        if incumbent in timed and timed[incumbent] <= fastest * (1 + STAYS):
            found[M] = incumbent
        else:
            near[M] = {one: us / fastest - 1 for one, us in timed.items() if us <= fastest * (1 + NOISE)}
    while near:
        votes: dict[Identity, list[float]] = {}
        for at in near.values():
            for identity, lag in at.items():
                votes.setdefault(identity, []).append(NOISE - lag)
        most = max(votes, key=lambda one: math.fsum(votes[one]))
        found |= {M: most for M, at in near.items() if most in at}
        near = {M: at for M, at in near.items() if most not in at}
    return {M: found[M] for M in scores}


def tables(file: CalibrationFile) -> dict[tuple[LayerKey, Mode], LayerTable]:
    """Every layer and mode of a file, whether its candidates can still run or not."""
    scores: dict[tuple[LayerKey, Mode], dict[int, dict[Identity, float | None]]] = {}
    incumbents: dict[tuple[LayerKey, Mode], dict[int, Identity]] = {}
    for point in file.points:
        key = file.layers[point.layer].key, point.mode
        at = scores.setdefault(key, {}).setdefault(point.M, {})
        for one in point.measurements:
            identity = file.candidates[one.candidate].identity
            at[identity] = one.score
            if one.incumbent:
                incumbents.setdefault(key, {})[point.M] = identity
    return {key: LayerTable(by_tokens, incumbents.get(key)) for key, by_tokens in scores.items()}


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive values."""
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def curves(scores: Mapping[int, Mapping[Identity, float | None]]) -> Iterable[Curve]:
    """Each candidate's times over the token counts, in ascending order of them."""
    times: dict[Identity, list[tuple[int, float]]] = {}
    for M, at in sorted(scores.items()):
        for identity, us in at.items():
            if us is not None:
                times.setdefault(identity, []).append((M, us))
    for identity, measured in times.items():
        yield Curve(identity, tuple(M for M, _ in measured), tuple(us for _, us in measured))


def _lead(ranked: Sequence[tuple[Identity, float]], place: int) -> str:
    if len(ranked) == 1:
        return ""
    (_, us), (winner, winner_us), (second, second_us) = ranked[place], ranked[0], ranked[1]
    if place:
        return f", {us / winner_us - 1:.0%} behind {winner[0]}".replace("%", " %")
    if second_us <= us * (1 + NOISE):
        return f", within noise of {second[0]} and fastest at more token counts"
    return f", {second_us / us - 1:.0%} ahead of {second[0]}".replace("%", " %")
