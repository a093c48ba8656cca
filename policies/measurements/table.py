"""Measured times of candidates over M: looked up where M was measured, interpolated between.

Between two measured token counts time is taken as a power of M, that is linear in log M and log time. This holds for
layers bound by bandwidth and for layers bound by arithmetic.
"""

import bisect
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, Literal, NamedTuple

from moe_dispatch.policies.measurements.schema import CalibrationFile, Identity, LayerKey, Point
from moe_dispatch.policy import Choice
from moe_dispatch.problem import Mode

# Relative difference below which two times count as equal: quartiles of repeated runs differ by as much.
NOISE: Final = 0.0125
# The incumbent keeps winning up to this far behind the fastest: it may have won at NOISE, and this run's noise adds.
STAYS: Final = 0.018
# Extrapolation limits, as factors of M: below the smallest measured M down to 1/NEAR of it, with its time unchanged;
# above the largest up to NEAR times it, with time in proportion to the tokens, or up to FAR times it where the fastest
# times at the two largest grew by at least this power of M. Where they grew less, reading weights bounds the layer,
# and what is ahead there says little of prefill: of an H200's shipped layers as measured up to M=64, the backends that
# won were 11, 20 and 9 % behind the fastest at M=512, 1024 and 4096 (geometric means; at worst 3.3 times as slow).
NEAR: Final = 4
FAR: Final = 64
GROWS: Final = 0.8
# Above this ratio of two neighbouring measured token counts nothing is interpolated, because times bend too much: on an
# H200 the choices between M=1 and M=16384 of a layer were up to 12 % slower than those of the rules.
APART: Final = 16
# What was eliminated at a token count was about as far behind there, or farther.
ELIMINATED: Final = 1.25


class _Span(NamedTuple):
    """A candidate's times at one or two successive token counts.

    Attributes:
        won: Whether it won at one of them.
    """

    identity: Identity
    us: tuple[float, ...]
    logs: tuple[float, ...]
    won: bool


class _Interval(NamedTuple):
    """What is known of all token counts between two measured ones, or of a measured one.

    Attributes:
        spans: The candidates that can be a backend's best there.
        first: The one that ranks first wherever between; None where that depends on the token count.
    """

    spans: list[_Span]
    first: Identity | None


def _always_first(spans: Sequence[_Span]) -> Identity | None:
    """The only winner at the ends of an interval, where it is within noise of the fastest at both and so in between.

    The logarithms of two candidates' times differ by a linear function of log M, which is largest at an end.
    """
    winners = [span for span in spans if span.won]
    if len(winners) != 1:
        return None
    limit = math.log1p(NOISE) - 1e-9  # less than rounding may take
    behind = (ours - other for span in spans for ours, other in zip(winners[0].logs, span.logs, strict=True))
    return winners[0].identity if max(behind) < limit else None


def _times(spans: Sequence[_Span], around: tuple[int, ...], M: int) -> list[float]:
    """Times in µs at M, with what all candidates share computed once."""
    if len(around) == 1:
        # Above the largest measured M time grows with the tokens, an upper bound. Below the least it stays.
        beyond = max(M / around[0], 1.0)
        return [us * beyond for _, (us,), _, _ in spans]
    lower, upper = around
    share = share_between(lower, M, upper)
    return [math.exp((1 - share) * low + share * up) for _, _, (low, up), _ in spans]


def share_between(lower: int, M: int, upper: int) -> float:
    """How far M is from one token count to another in log M, and so the logarithm of a time between theirs."""
    return math.log(M / lower) / math.log(upper / lower)


class LayerTable:
    """The measurements of one layer in one mode.

    Args:
        scores: Token count -> candidate -> time in µs; None for a candidate that was disqualified there.
        incumbents: Token count -> winner of the calibration before.

    Attributes:
        scores: As given, without token counts at which every candidate was disqualified, in ascending order.
        winners: Token count -> winner there (see `stable_winners`).
    """

    def __init__(
        self, scores: Mapping[int, Mapping[Identity, float | None]], incumbents: Mapping[int, Identity] | None = None
    ) -> None:
        self.scores = {M: dict(at) for M, at in sorted(scores.items()) if any(us for us in at.values())}
        self.tokens = tuple(self.scores)
        timed = (identity for at in self.scores.values() for identity, us in at.items() if us is not None)
        self._candidates = tuple(dict.fromkeys(timed))
        self._intervals: dict[tuple[int, ...], _Interval] = {}
        self.winners = stable_winners(self.scores, incumbents)
        self._most = self._most_tokens()

    def _most_tokens(self) -> int:
        """Up to how many tokens there is a ranking."""
        if not self.tokens:
            return 0
        times = [min(filter(None, self.scores[M].values())) for M in self.tokens[-2:]]
        grows = len(times) == 2 and times[1] >= times[0] * (self.tokens[-1] / self.tokens[-2]) ** GROWS
        return self.tokens[-1] * (FAR if grows else NEAR)

    def rank(self, M: int) -> tuple[tuple[Identity, float], ...]:
        """Each backend's best configuration with its time in µs, the fastest first; empty if M is out of range."""
        around = self.around(M)
        return self._rank(around, M) if around else ()

    def _rank(self, around: tuple[int, ...], M: int) -> tuple[tuple[Identity, float], ...]:
        """`rank`, given `around(M)`, which is not empty."""
        if not (spans := self._interval(around).spans):
            return ()
        times = _times(spans, around, M)
        order = sorted(range(len(spans)), key=times.__getitem__)
        # At a measured M the winner is decided; between two, a neighbour's winner comes first within noise of the best.
        limit = math.inf if around == (M,) else times[order[0]] * (1 + NOISE)
        preferred = [place for place in order if times[place] <= limit and spans[place].won]
        best: dict[str, tuple[Identity, float]] = {}
        for place in (*preferred, *order):
            identity = spans[place].identity
            if identity[0] not in best:
                best[identity[0]] = identity, times[place]
        return tuple(best.values())

    def around(self, M: int) -> tuple[int, ...]:
        """The measured token counts that decide about M: M itself, or its neighbours; none if M is out of range."""
        if not self.tokens or not self.tokens[0] / NEAR <= M <= self._most:
            return ()
        i = bisect.bisect_left(self.tokens, M)
        around = self.tokens[max(i - 1, 0) : i + 1] if i == len(self.tokens) or self.tokens[i] != M else (M,)
        return () if len(around) == 2 and around[1] > around[0] * APART else around

    def us(self, identity: Identity, M: int) -> float:
        """The time in µs at M of a candidate that is ranked there, by time or by the energies of the same points."""
        around = self.around(M)
        us = tuple(self._us_at(near, identity) or math.nan for near in around)
        return _times([_Span(identity, us, tuple(map(math.log, us)), won=False)], around, M)[0]

    def _us_at(self, near: int, identity: Identity) -> float | None:
        """The time in µs of a candidate at a measured token count, also if it was eliminated there; None if wrong."""
        at = self.scores[near]
        return at[identity] if identity in at else ELIMINATED * (at[self.winners[near]] or math.nan)

    def _interval(self, around: tuple[int, ...]) -> _Interval:
        if (interval := self._intervals.get(around)) is None:
            spans = self._spans(around)
            interval = self._intervals[around] = _Interval(spans, _always_first(spans) if len(around) == 2 else None)
        return interval

    def _spans(self, around: tuple[int, ...]) -> list["_Span"]:
        """The candidates that can be a backend's best between the token counts `around`, or at the only one.

        They are the same for every M between, so that a new token count is not planned from scratch. A candidate that
        was eliminated at a neighbour was behind there; its times further away say nothing of M. But a backend that wins
        at both in different configurations is not passed over between them for want of one that was timed at both.
        """
        won = {self.winners[near] for near in around}
        spans: list[_Span] = []
        for identity in self._candidates:
            times = [self.scores[near].get(identity) for near in around]
            if None not in times:
                us = tuple(filter(None, times))
                spans.append(_Span(identity, us, tuple(map(math.log, us)), won=identity in won))
        (first, _), (second, _) = self.winners[around[0]], self.winners[around[-1]]
        if first == second and first not in [span.identity[0] for span in spans]:
            for identity in map(self.winners.__getitem__, around):
                us = tuple(filter(None, (self._us_at(near, identity) for near in around)))
                if len(us) == len(around):  # its result was wrong at neither
                    spans.append(_Span(identity, us, tuple(map(math.log, us)), won=True))
        # One that did not win and is behind another candidate of its backend everywhere is never the backend's best.
        least: dict[str, float] = {}
        kept: set[int] = set()
        for i in sorted(range(len(spans)), key=lambda i: spans[i].us):
            backend, last = spans[i].identity[0], spans[i].us[-1]
            if last <= least.get(backend, math.inf):
                least[backend] = last
                kept.add(i)
        return [span for i, span in enumerate(spans) if span.won or i in kept]

    def choices(self, M: int, mode: str, policy: str) -> Iterator[Choice]:
        """The ranking as choices of a policy; `mode` is the part of their reasons that names the mode."""
        if not (around := self.around(M)):
            return
        first = self._interval(around).first
        if first is not None:  # most calls run this choice, and its reason is not told
            backend, config = first
            tell = functools.partial(self._told, around, mode)
            yield Choice.between((around[0], around[1]), M, backend, dict(config), policy, tell)
        for place, ((backend, config), us) in enumerate(ranked := self._rank(around, M)):
            if place or first is None:
                yield Choice(backend, _reason(ranked, place, around, M, mode), dict(config), us, policy)

    def _told(self, around: tuple[int, ...], mode: str, M: int) -> tuple[str, float]:
        """Reason and time of the first choice."""
        ranked = self._rank(around, M)
        return _reason(ranked, 0, around, M, mode), ranked[0][1]


class EnergyTable(NamedTuple):
    """The measurements of one layer in one mode, ranked by energy.

    Attributes:
        times: Its times in µs.
        joules: Its energies of a call in joules, of the candidates that have one.
    """

    times: LayerTable
    joules: LayerTable

    def choices(self, M: int, mode: str, policy: str) -> Iterator[Choice]:
        """Candidates with an energy, the least first, then backends without, by time; see `LayerTable.choices`.

        Energies decide only where all token counts that decide about M have them: none is extrapolated over a token
        count that was timed, where its candidate may have been wrong.
        """
        around = self.times.around(M)
        ranked = self.joules.rank(M) if self.joules.around(M) == around else ()
        times = [self.times.us(identity, M) for identity, _ in ranked]
        for place, ((backend, config), joules) in enumerate(ranked):
            reason = f"{1e3 * joules / M:.3g} mJ a token and {times[place]:.1f} µs {_where(around, M, mode)}"
            reason += _lead(ranked, place, "least")
            if len(times) > 1:
                slower = times[place] / times[0 if place else 1] - 1
                reason += f", {abs(slower):.0%} {'slower' if slower > 0 else 'faster'}".replace("%", " %")
            yield Choice(backend, reason, dict(config), times[place], policy)
        with_energy = {backend for (backend, _), _ in ranked}
        yield from (choice for choice in self.times.choices(M, mode, policy) if choice.backend not in with_energy)


Table = LayerTable | EnergyTable


def stable_winners(
    scores: Mapping[int, Mapping[Identity, float | None]], incumbents: Mapping[int, Identity] | None = None
) -> dict[int, Identity]:
    """The winner at each token count: of the candidates within noise of the fastest, one that is so at many others too.

    An incumbent that is still near the fastest stays. At the other token counts each candidate within noise of the
    fastest has a vote, worth its distance to the noise limit (with equal votes, a candidate at the limit could decide).
    The candidate with the largest sum of votes wins all its token counts, then the one with the largest sum at those
    that are left, and so on. So few different candidates win, and noise at one token count is outvoted by the others,
    which makes two calibrations agree.
    """
    winners: dict[int, Identity] = {}
    near: dict[int, dict[Identity, float]] = {}
    for M, at in scores.items():
        timed = {identity: us for identity, us in at.items() if us is not None}
        fastest = min(timed.values())
        incumbent = (incumbents or {}).get(M)
        if incumbent in timed and timed[incumbent] <= fastest * (1 + STAYS):
            winners[M] = incumbent
        else:
            near[M] = {identity: us / fastest - 1 for identity, us in timed.items() if us <= fastest * (1 + NOISE)}
    while near:
        votes: dict[Identity, list[float]] = {}
        for at in near.values():
            for identity, lag in at.items():
                votes.setdefault(identity, []).append(NOISE - lag)
        most = max(votes, key=lambda identity: math.fsum(votes[identity]))
        winners |= {M: most for M, at in near.items() if most in at}
        near = {M: at for M, at in near.items() if most not in at}
    return {M: winners[M] for M in scores}


def points_of_layers(file: CalibrationFile) -> dict[tuple[LayerKey, Mode], list[Point]]:
    """The points of a file by layer and mode."""
    keys = [layer.key for layer in file.layers]
    points: dict[tuple[LayerKey, Mode], list[Point]] = {}
    for point in file.points:
        points.setdefault((keys[point.layer], point.mode), []).append(point)
    return points


def tabulated(
    points: Iterable[Point], identities: Sequence[Identity | None], of: Literal["score", "joules"] = "score"
) -> LayerTable:
    """The table of one layer in one mode, of times or of energies where they were measured.

    Candidates whose identity is None are left out.
    """
    scores: dict[int, dict[Identity, float | None]] = {}
    incumbents: dict[int, Identity] = {}
    for point in points:
        at = scores.setdefault(point.M, {})
        for stored in point.measurements:
            if (identity := identities[stored.candidate]) is not None:
                at[identity] = stored.score and getattr(stored, of)
                if stored.incumbent and of == "score":  # by time it won
                    incumbents[point.M] = identity
    return LayerTable(scores, incumbents)


def tables(file: CalibrationFile) -> dict[tuple[LayerKey, Mode], LayerTable]:
    """The tables of a file by layer and mode; its candidates are not asked whether they can still run."""
    identities = [candidate.identity for candidate in file.candidates]
    return {key: tabulated(points, identities) for key, points in points_of_layers(file).items()}


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of positive values."""
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def rough_us(us: float) -> str:
    """An estimated time in µs: three significant digits, without an exponent."""
    return f"{us:.3g}" if us < 1000 else f"{us:.0f}"


def _reason(ranked: Sequence[tuple[Identity, float]], place: int, around: tuple[int, ...], M: int, mode: str) -> str:
    return f"{ranked[place][1]:.1f} µs {_where(around, M, mode)}{_lead(ranked, place)}"


def _where(around: tuple[int, ...], M: int, mode: str) -> str:
    """The part of a reason that names the token counts it rests on, which are `LayerTable.around(M)`."""
    if len(around) == 2:
        return f"between M={around[0]} and M={around[1]} ({mode})"
    near = around[0]
    if near == M:
        return f"at M={M} ({mode})"
    if near > M:
        return f"as at M={near}, the least measured ({mode})"
    how = "nearest measured" if near * NEAR >= M else "largest measured, in proportion to the tokens"
    return f"from M={near}, the {how} ({mode})"


def _lead(ranked: Sequence[tuple[Identity, float]], place: int, best: str = "fastest") -> str:
    if len(ranked) == 1:
        return ""
    (_, us), (winner, winner_us), (second, second_us) = ranked[place], ranked[0], ranked[1]
    if place:
        return f", {us / winner_us - 1:.0%} behind {winner[0]}".replace("%", " %")
    if second_us <= us * (1 + NOISE):
        return f", within noise of {second[0]} and {best} at more token counts"
    return f", {second_us / us - 1:.0%} ahead of {second[0]}".replace("%", " %")
