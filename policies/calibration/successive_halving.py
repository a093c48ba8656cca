"""The race of all candidates at one point: successive halving, and nobody wins unchecked.

Successive halving (Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization",
AISTATS 2016): all are timed for a little, taking turns; the faster half stays and is timed for twice as long; and so on
until a few are left, which are timed for long on every routing distribution, and longer while it is in doubt who wins.
Candidates that take turns are compared pair by pair: a clock that drifts slows both of a pair. The score is the
leader's time, times the median pair of a candidate and the leader, both as geometric means over the distributions: they
do not change when one distribution is slower as a whole, and none outvotes the others.

Before the first round every candidate runs twice, alone. Who takes so long that its launches do not count, and twice
the leader's time, is out already: every further run of such a loser would cost what the winner's whole timing does.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from moe_dispatch.measure import quartiles
from moe_dispatch.policies.calibration.worker_process import CandidateFailedError, WorkerDiedError, WorkerProcess
from moe_dispatch.policies.measurements.merge import Measured
from moe_dispatch.policies.measurements.schema import Candidate, Layer, Measurement, Quartiles
from moe_dispatch.policies.measurements.table import NOISE, Identity, geometric_mean
from moe_dispatch.problem import Mode

# Seconds of sampling per candidate in the first round and in the final, and samples at least; fewer of them where a
# run is long and so differs less from the next.
SCREEN: Final = (0.004, 3)
SCREEN_LONG: Final = (0.004, 2)
FINAL: Final = (0.016, 7)
FINAL_LONG: Final = (0.03, 4)
FINALISTS: Final = 4
# Whoever may turn out level with the leader goes on too, up to as many again: nobody of them is lost to noise.
CONTENDER: Final = 0.03
# A final goes on, so many times at most, while somebody is within so many standard errors of being within noise or not.
DOUBT: Final = 2.0
EXTRA: Final = 2
# A single run of so many µs is timed rightly by the wall clock, and so late is nobody within noise of the leader.
LONG_US: Final = 1500.0
HOPELESS: Final = 2.0
# A backend whose best is farther behind the leader than this is a fallback: checked, and not timed any further.
CLOSE: Final = 1.5
# So far behind it is none: the rules know of it, and checking it may take longer than all the others.
FALLBACK: Final = 4.0


@dataclass(frozen=True)
class MeasurementContext:
    """What all races of a calibration share.

    Attributes:
        worker: Where candidates run.
        routings: Names of the routing distributions; the first one screens.
        tolerance: Relative error that a backend promises for a layer.
        bar: Told of a backend that killed its worker, and how.
    """

    worker: WorkerProcess
    routings: tuple[str, ...]
    tolerance: Callable[[str, Layer], float]
    bar: Callable[[str, Layer, int, Mode, str], None]


class SuccessiveHalving:
    """Candidates at one layer, token count and mode.

    Args:
        arena: Where.
        layer: Of what.
        M: Tokens.
        mode: How.
        candidates: Who starts.
        checked: Errors of those that were found right already, in a mode whose check says more.

    Attributes:
        finalists: Who was timed on every distribution, with its error; empty before `run`.
    """

    def __init__(
        self,
        arena: MeasurementContext,
        layer: Layer,
        M: int,
        mode: Mode,
        candidates: Sequence[Candidate],
        checked: Mapping[Identity, float] | None = None,
    ) -> None:
        self._context, self._layer, self._M, self._mode = arena, layer, M, mode
        self._candidates = {candidate.identity: candidate for candidate in candidates}
        # In µs, by distribution: of the last round that a candidate was in, or of all finals. Of candidates that were
        # timed together, those at the same place lie side by side in time.
        self._samples: dict[Identity, dict[str, list[float]]] = {identity: {} for identity in self._candidates}
        self._rounds: list[dict[Identity, float]] = []
        self._alone: dict[Identity, float] = {}
        self._errors: dict[Identity, float] = dict(checked or {})
        self._barred: dict[Identity, str] = {}
        self._far: set[str] = set()
        self.finalists: dict[Identity, float] = {}

    def run(self) -> list[Measured]:
        """SuccessiveHalving, and return what is known of every candidate that ran.

        Raises:
            NotPreparedError: The inputs or their fp32 reference could not be made, which is nobody's fault.
        """
        if not self._candidates:
            return []
        first, *_ = self._context.routings
        self._context.worker.point(self._M, self._context.routings)
        for identity in self._candidates:
            self._launch(identity)
        alive = self._hopeful()
        long = min(self._alone.values(), default=0.0) >= LONG_US
        (budget_s, samples), keep = SCREEN_LONG if long else SCREEN, len(alive)
        while keep > FINALISTS and len(alive) > FINALISTS:
            self._time(alive, first, budget_s, samples)
            self._rounds.append({one: self._quartiles(one)[1] for one in alive if one not in self._barred})
            keep, budget_s = max(FINALISTS, math.ceil(keep / 2)), 2 * budget_s
            alive = self._kept(keep)
        self._final([identity for identity in alive if self._right(identity)], *(FINAL_LONG if long else FINAL))
        self._check_fallbacks()
        return self._measured()

    def _launch(self, identity: Identity) -> None:
        """Run a candidate alone: one that hangs or kills is known before the others wait for it."""
        if identity in self._barred:
            return
        answer = self._ask_about(identity, "launch", routing=self._context.routings[0])
        if answer is not None:
            self._alone[identity] = answer["us"]

    def _hopeful(self) -> list[Identity]:
        """Who may start the first round: all but those whose run is long, and far behind the fastest that is right."""
        alone = {one: us for one, us in self._alone.items() if one not in self._barred}
        ordered = sorted(alone, key=lambda one: alone[one])
        if not ordered or alone[ordered[-1]] < max(LONG_US, HOPELESS * alone[ordered[0]]):
            return [one for one in self._candidates if one in alone]
        leader = next((one for one in ordered if self._right(one)), None)
        alone = {one: us for one, us in alone.items() if one not in self._barred}
        if leader is None:
            return []
        self._rounds.append(alone)
        hopeless = {one for one, us in alone.items() if us > max(LONG_US, HOPELESS * alone[leader])}
        for one in hopeless:
            self._samples[one] = {self._context.routings[0]: [alone[one]]}
        return [one for one in self._candidates if one in alone and one not in hopeless]

    def _kept(self, count: int) -> list[Identity]:
        """The fastest of the last round that are right: `count`, contenders, who is within noise, and near bests.

        Only who would be kept is checked; where one is wrong, the next takes its place.
        """
        last = self._rounds[-1]
        kept: list[Identity] = []
        cut = math.inf
        for one in sorted(last, key=lambda one: last[one]):
            low, median, high = self._quartiles(one)
            contends = not kept or median <= last[kept[0]] * (1 + CONTENDER)
            # Noise may keep as many again, no more: else equals would never be parted.
            close = len(kept) < 2 * count and (contends or min(low, median / (1 + NOISE)) <= cut)
            best = all(one[0] != other[0] for other in kept) and (not kept or median <= CLOSE * last[kept[0]])
            if (close or best) and self._right(one):
                kept.append(one)
                if len(kept) == count:
                    cut = high
        return kept

    def _final(self, alive: Sequence[Identity], budget_s: float, samples: int) -> None:
        """Time who is left on every distribution, and contenders again while it is in doubt who is level."""
        for one in alive:
            self._samples[one] = {}
        timed = list(alive)
        for _ in range(1 + EXTRA):
            for routing in self._context.routings:
                self._time([one for one in timed if one not in self._barred], routing, budget_s, samples)
            self.finalists = {one: self._errors[one] for one in alive if one not in self._barred}
            lags = self._lags()
            if all(abs(lag - NOISE) > DOUBT * error for lag, error in lags.values()):
                break
            # Who drops out stays out: everybody's samples begin beside the leader's, whoever that becomes.
            timed = [one for one in timed if lags.get(one, (math.inf,))[0] <= CONTENDER]

    def _lags(self) -> dict[Identity, tuple[float, float]]:
        """How far behind the leader each finalist is, and the standard error of that."""
        if not self.finalists:
            return {}
        leader = min(self.finalists, key=self._median)
        found = {}
        for one in self.finalists:
            logs = [
                [math.log(mine / best) for mine, best in zip(samples, self._samples[leader][routing], strict=False)]
                for routing, samples in self._samples[one].items()
            ]
            # A median's standard error is 1.25 times a mean's.
            errors = [1.25 * statistics.pstdev(pairs) / math.sqrt(len(pairs)) for pairs in logs]
            found[one] = statistics.fmean(map(statistics.median, logs)), math.hypot(*errors) / len(errors)
        least = min(lag for lag, _ in found.values())
        return {one: (math.expm1(lag - least), error) for one, (lag, error) in found.items()}

    def _median(self, identity: Identity) -> float:
        """Geometric mean of a candidate's medians over the distributions, in µs."""
        return geometric_mean([statistics.median(samples) for samples in self._samples[identity].values()])

    def _quartiles(self, identity: Identity, routing: str | None = None) -> Quartiles:
        """Of a candidate's samples; on the first distribution if none is named."""
        return quartiles(self._samples[identity][routing or self._context.routings[0]])

    def _check_fallbacks(self) -> None:
        """Each backend that left the race has a right candidate to fall back on, or is not heard of again."""
        if not self.finalists:
            return
        leader = min(self.finalists, key=self._median)
        raced: dict[Identity, float] = {}
        for timed in reversed(self._rounds):
            raced = timed | raced
        for backend in {one[0] for one in raced} - {one[0] for one in self.finalists}:
            mine = sorted((one for one in raced if one[0] == backend), key=lambda one: raced[one])
            if raced[mine[0]] <= FALLBACK * raced[leader]:
                next((one for one in mine if self._right(one, briefly=True)), None)
            else:
                self._far.add(backend)

    def _right(self, identity: Identity, *, briefly: bool = False) -> bool:
        """Hold a candidate against fp32, once; briefly: eagerly and on one distribution."""
        if identity in self._errors or identity in self._barred:
            return identity not in self._barred
        routings = self._context.routings[: 1 if briefly else None]
        answer = self._ask_about(
            identity, "check", mode="eager" if briefly else self._mode, routings=list(routings),
            tolerance=self._context.tolerance(identity[0], self._layer),
        )  # fmt: skip
        if answer is None:
            return False
        if "wrong" in answer:
            self._barred[identity] = answer["wrong"]
            return False
        self._errors[identity] = answer["error"]
        return True

    def _ask_about(self, identity: Identity, op: str, **request: Any) -> dict[str, Any] | None:
        """Ask about one candidate; None after it failed, and why is noted."""
        candidate = self._candidates[identity]
        try:
            return self._context.worker.ask(
                op, M=self._M, backend=candidate.backend, config=candidate.config, **request
            )
        except CandidateFailedError as error:
            self._barred[identity] = f"out of memory: {error.cause}" if error.memory else f"raised {error.cause}"
        except WorkerDiedError as error:
            self._kill(identity, error.cause)
        return None

    def _time(self, identities: Sequence[Identity], routing: str, budget_s: float, samples: int) -> None:
        """Time candidates together; if that kills the worker, each alone, which names the culprit."""
        if not identities:
            return
        requested = [(self._candidates[one].backend, self._candidates[one].config) for one in identities]
        try:
            answer = self._context.worker.ask(
                "time", work=len(identities), M=self._M, mode=self._mode, routing=routing, candidates=requested,
                budget_s=budget_s, rounds=samples,
            )  # fmt: skip
        except (WorkerDiedError, CandidateFailedError) as error:
            if len(identities) > 1:
                for identity in identities:
                    self._time([identity], routing, budget_s, samples)
            elif isinstance(error, WorkerDiedError):
                self._kill(identities[0], error.cause)
            else:
                self._barred[identities[0]] = f"raised {error.cause}"
            return
        for index, identity in enumerate(identities):
            if times := answer["us"].get(str(index)):
                self._samples[identity].setdefault(routing, []).extend(times)
            else:
                self._barred[identity] = f"raised {answer['failed'].get(str(index), 'nothing, and was not timed')}"

    def _kill(self, identity: Identity, cause: str) -> None:
        self._barred[identity] = cause
        self._context.bar(identity[0], self._layer, self._M, self._mode, cause)
        # The backend is barred from such problems now; its other configurations would only die again.
        for other in self._candidates:
            if other[0] == identity[0] and other not in self._barred and other not in self._alone:
                self._barred[other] = f"not tried after {cause}"

    def _measured(self) -> list[Measured]:
        scores = self._scores()
        found = []
        for identity, candidate in self._candidates.items():
            why = self._barred.get(identity)
            score = None if why else scores.get(identity)
            if why is None and (score is None or identity[0] in self._far):
                continue  # it left the race, and nobody finished it to compare with, or that was long before
            measurement = Measurement(
                candidate=0,
                us={routing: self._quartiles(identity, routing) for routing in self._samples[identity]},
                score=score,
                error=self._errors.get(identity),
                disqualified=why[:1000] if why else None,
            )
            found.append(Measured(self._layer, self._M, self._mode, candidate, measurement))
        return found

    def _scores(self) -> dict[Identity, float]:
        lags = self._lags()
        if not lags:
            return {}
        leader = min(lags, key=lambda one: lags[one][0])
        us = self._median(leader)
        scores = {one: us * (1 + lag) for one, (lag, _) in lags.items()}
        # Who left early was timed for a moment and maybe never checked: it may not win, not even within noise.
        least = us * (1 + 2 * NOISE)
        for timed in reversed(self._rounds):
            for one, raced in timed.items():
                if one not in scores:
                    scores[one] = max(least, raced / timed[leader] * us)
        return scores
