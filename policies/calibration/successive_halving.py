"""Selects the fastest candidate of a point by successive halving; no candidate wins without a check against fp32.

Successive halving (Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization",
AISTATS 2016): all candidates are timed for a little, taking turns; the faster half stays and is timed for twice as
long; and so on until a few finalists are left. Those are timed for long on every routing distribution, and longer while
it is in doubt which of them are level. Candidates that take turns are compared pair by pair: a drifting clock slows
both of a pair. The score of a candidate is the leader's time times the median ratio of its pairs with the leader. Both
are geometric means over the distributions, so that no slow distribution outvotes the others.

Before the first round every candidate runs twice, alone. One that takes so long that its launches do not count, and
twice the leader's time, is out already: each further run of such a loser costs as much as the winner's whole timing.
"""

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from moe_dispatch.measure import quartiles
from moe_dispatch.policies.calibration.worker_process import CandidateFailedError, PointSetup, Worker, WorkerDiedError
from moe_dispatch.policies.measurements.schema import Candidate, Identity, LayerShape, Measurement, Quartiles
from moe_dispatch.policies.measurements.table import NOISE, geometric_mean
from moe_dispatch.problem import Mode

logger = logging.getLogger(__name__)

# Seconds of sampling per candidate, and the smallest number of samples, in the first round and in the final; with fewer
# samples where a run is long, since long runs differ less from each other.
SCREEN: Final = (0.004, 3)
SCREEN_LONG: Final = (0.004, 2)
FINAL: Final = (0.016, 7)
FINAL_LONG: Final = (0.03, 4)
FINALISTS: Final = 4
# Candidates within this fraction of the leader go on too, up to twice the number: noise must not eliminate an equal.
CONTENDER: Final = 0.03
# The final is extended, EXTRA times at most, while a candidate is within DOUBT standard errors of the noise limit.
DOUBT: Final = 2.0
EXTRA: Final = 2
# From this many µs on a single run is timed well by the wall clock. A candidate whose run is that long and takes
# HOPELESS times as long as the leader's cannot be within noise of the leader.
LONG_US: Final = 1500.0
HOPELESS: Final = 2.0
# A backend whose best candidate is more than this factor behind the leader is not timed further, only checked.
CLOSE: Final = 1.5
# Beyond this factor a backend is not kept as a fallback: the rules know it, and its check may outlast everything else.
FALLBACK: Final = 4.0


@dataclass(frozen=True)
class MeasurementContext:
    """What all points of a calibration share.

    Attributes:
        routings: Names of the routing distributions; the first one screens.
        tolerance: Gives the relative error that a backend promises for a layer.
        on_death: Called with backend, layer, M, mode and error when a candidate took its worker down.
        energy_s: Seconds for which each finalist's energy is measured; 0 not to measure it.
    """

    worker: Worker
    routings: tuple[str, ...]
    tolerance: Callable[[str, LayerShape], float]
    on_death: Callable[[str, LayerShape, int, Mode, WorkerDiedError], None]
    energy_s: float = 0.0


class SuccessiveHalving:
    """Selects among candidates at one layer, token count and mode. Candidates are named by their index.

    `checked` has relative errors of candidates that a stricter check, in another mode, has found right.

    Attributes:
        finalists: Relative errors of the candidates that were timed on every distribution; empty before `run`.
    """

    def __init__(
        self,
        context: MeasurementContext,
        layer: LayerShape,
        M: int,
        mode: Mode,
        candidates: Sequence[Candidate],
        checked: Mapping[Identity, float] | None = None,
    ) -> None:
        self._context, self._layer, self._M, self._mode = context, layer, M, mode
        self._candidates = tuple(candidates)
        # µs by distribution: of a candidate's last round, or of all finals. Of candidates that were timed together,
        # samples at the same place of the list lie side by side in time.
        self._samples: list[dict[str, list[float]]] = [{} for _ in candidates]
        self._rounds: list[dict[int, float]] = []  # medians in µs of each round's candidates
        self._alone: dict[int, float] = {}  # µs of each candidate's run before the first round
        self._errors: dict[int, float] = {
            index: checked[candidate.identity]
            for index, candidate in enumerate(candidates)
            if checked and candidate.identity in checked
        }
        self._disqualified: dict[int, str] = {}
        self._dropped: set[str] = set()  # backends that are too far behind to be a fallback
        self._finalists: list[int] = []
        self._joules: dict[int, float] = {}  # of one call

    @property
    def finalists(self) -> dict[Identity, float]:
        """See the class."""
        return {self._candidates[index].identity: self._errors[index] for index in self._finalists}

    def run(self) -> list[Measurement]:
        """Select, and return what is known of every candidate that ran.

        Raises:
            NotPreparedError: The inputs or their fp32 reference could not be made.
        """
        if not self._candidates:
            return []
        self._context.worker.point(PointSetup(self._M, self._mode, self._context.routings, self._candidates))
        for candidate in range(len(self._candidates)):
            self._launch(candidate)
        alive = self._starters()
        long = min(self._alone.values(), default=0.0) >= LONG_US
        (budget_s, samples), keep = SCREEN_LONG if long else SCREEN, len(alive)
        while keep > FINALISTS and len(alive) > FINALISTS:
            self._time(alive, self._context.routings[0], budget_s, samples)
            self._rounds.append({index: self._quartiles(index)[1] for index in alive if self._may_win(index)})
            keep, budget_s = max(FINALISTS, math.ceil(keep / 2)), 2 * budget_s
            alive = self._kept(keep)
        self._final([index for index in alive if self._right(index)], *(FINAL_LONG if long else FINAL))
        self._measure_energy()
        self._check_fallbacks()
        return self._measurements()

    def _may_win(self, candidate: int) -> bool:
        return candidate not in self._disqualified

    def _launch(self, candidate: int) -> None:
        """Run a candidate alone, so that a hang or a crash shows before it takes turns with others."""
        if self._may_win(candidate):
            us = self._attempt(candidate, lambda: self._context.worker.launch(candidate))
            if us is not None:
                self._alone[candidate] = us

    def _starters(self) -> list[int]:
        """Candidates of the first round: all but those whose run is long and far behind the fastest that is right."""
        alone = {index: us for index, us in self._alone.items() if self._may_win(index)}
        ordered = sorted(alone, key=lambda index: alone[index])
        if not ordered or alone[ordered[-1]] < max(LONG_US, HOPELESS * alone[ordered[0]]):
            return list(alone)
        leader = next((index for index in ordered if self._right(index)), None)
        alone = {index: us for index, us in alone.items() if self._may_win(index)}
        if leader is None:
            return []
        self._rounds.append(alone)
        hopeless = {index for index, us in alone.items() if us > max(LONG_US, HOPELESS * alone[leader])}
        for index in hopeless:
            self._samples[index] = {self._context.routings[0]: [alone[index]]}
        return [index for index in alone if index not in hopeless]

    def _kept(self, count: int) -> list[int]:
        """Of the last round: the `count` fastest that are right, contenders, and the best of each close backend.

        Only candidates that would be kept are checked; where one is wrong, the next one takes its place.
        """
        last = self._rounds[-1]
        kept: list[int] = []
        backends: set[str] = set()
        cut = math.inf
        for index in sorted(last, key=lambda index: last[index]):
            low, median, high = self._quartiles(index)
            backend = self._candidates[index].backend
            contends = not kept or median <= last[kept[0]] * (1 + CONTENDER)
            # At most as many again are kept for noise, or equals would never be parted.
            close = len(kept) < 2 * count and (contends or min(low, median / (1 + NOISE)) <= cut)
            best_of_backend = backend not in backends and (not kept or median <= CLOSE * last[kept[0]])
            if (close or best_of_backend) and self._right(index):
                kept.append(index)
                backends.add(backend)
                if len(kept) == count:
                    cut = high
        return kept

    def _final(self, alive: Sequence[int], budget_s: float, samples: int) -> None:
        """Time finalists on every distribution, and contenders again while it is in doubt which are level."""
        for index in alive:
            self._samples[index] = {}
        timed = list(alive)
        for _ in range(1 + EXTRA):
            for routing in self._context.routings:
                self._time([index for index in timed if self._may_win(index)], routing, budget_s, samples)
            self._finalists = [index for index in alive if self._may_win(index)]
            lags = self._lags()
            if all(abs(lag - NOISE) > DOUBT * error for lag, error in lags.values()):
                break
            # A candidate that drops out stays out, so that the samples of all that are left begin beside the leader's.
            timed = [index for index in timed if lags.get(index, (math.inf,))[0] <= CONTENDER]

    def _lags(self) -> dict[int, tuple[float, float]]:
        """How far behind the leader each finalist is, as a fraction, and the standard error of that."""
        if not self._finalists:
            return {}
        leader = self._leader()
        lags = {}
        for index in self._finalists:
            logs = [
                [math.log(mine / best) for mine, best in zip(samples, self._samples[leader][routing], strict=False)]
                for routing, samples in self._samples[index].items()
            ]
            # A median's standard error is 1.25 times a mean's.
            errors = [1.25 * statistics.pstdev(pairs) / math.sqrt(len(pairs)) for pairs in logs]
            lags[index] = statistics.fmean(map(statistics.median, logs)), math.hypot(*errors) / len(errors)
        least = min(lag for lag, _ in lags.values())
        return {index: (math.expm1(lag - least), error) for index, (lag, error) in lags.items()}

    def _leader(self) -> int:
        return min(self._finalists, key=self._median)

    def _median(self, candidate: int) -> float:
        """Geometric mean of a candidate's medians over the distributions, in µs."""
        return geometric_mean([statistics.median(samples) for samples in self._samples[candidate].values()])

    def _quartiles(self, candidate: int, routing: str | None = None) -> Quartiles:
        """Quartiles of a candidate's samples, on the first distribution if none is named."""
        return quartiles(self._samples[candidate][routing or self._context.routings[0]])

    def _measure_energy(self) -> None:
        """Measure each finalist's energy, if it is asked for; the time of one that raises meanwhile stands."""
        for index in self._finalists if self._context.energy_s else ():
            try:
                self._joules[index] = self._context.worker.energy(index, self._context.energy_s)
            except CandidateFailedError as error:
                logger.warning("no energy of %s at M=%d: %s", self._candidates[index].backend, self._M, error.cause)
            except WorkerDiedError as error:
                self._died(index, error)
        self._finalists = [index for index in self._finalists if self._may_win(index)]

    def _check_fallbacks(self) -> None:
        """Check one candidate of each backend that has no finalist, as a fallback, or drop the backend."""
        if not self._finalists:
            return
        leader = self._leader()
        last: dict[int, float] = {}
        for medians in reversed(self._rounds):
            last = medians | last
        by_backend: dict[str, list[int]] = {}
        for index in sorted(last, key=lambda index: last[index]):
            by_backend.setdefault(self._candidates[index].backend, []).append(index)
        with_finalist = {self._candidates[index].backend for index in self._finalists}
        for backend, indices in by_backend.items():
            if backend in with_finalist:
                continue
            if last[indices[0]] <= FALLBACK * last[leader]:
                next((index for index in indices if self._right(index, briefly=True)), None)
            else:
                self._dropped.add(backend)

    def _right(self, candidate: int, *, briefly: bool = False) -> bool:
        """Whether a candidate agrees with fp32, checked once; briefly: eagerly and on one distribution."""
        if self._may_win(candidate) and candidate not in self._errors:
            tolerance = self._context.tolerance(self._candidates[candidate].backend, self._layer)
            error = self._attempt(candidate, lambda: self._context.worker.check(candidate, tolerance, briefly=briefly))
            if error is not None:
                self._errors[candidate] = error
        return self._may_win(candidate)

    def _attempt(self, candidate: int, run: Callable[[], float]) -> float | None:
        """Ask the worker about one candidate; None after it failed, which disqualifies it."""
        try:
            return run()
        except CandidateFailedError as error:
            self._disqualified[candidate] = error.cause
        except WorkerDiedError as error:
            self._died(candidate, error)
        return None

    def _time(self, candidates: Sequence[int], routing: str, budget_s: float, rounds: int) -> None:
        """Time candidates together; if the worker fails meanwhile, each alone, which names the culprit."""
        if not candidates:
            return
        try:
            timed = self._context.worker.time(candidates, routing, budget_s, rounds)
        except (WorkerDiedError, CandidateFailedError) as error:
            if len(candidates) > 1:
                for candidate in candidates:
                    self._time([candidate], routing, budget_s, rounds)
            elif isinstance(error, WorkerDiedError):
                self._died(candidates[0], error)
            else:
                self._disqualified[candidates[0]] = error.cause
            return
        for candidate, samples in zip(candidates, timed, strict=True):
            if samples.failed:
                self._disqualified[candidate] = samples.failed
            else:
                self._samples[candidate].setdefault(routing, []).extend(samples.us)

    def _died(self, candidate: int, error: WorkerDiedError) -> None:
        self._disqualified[candidate] = error.cause
        backend = self._candidates[candidate].backend
        self._context.on_death(backend, self._layer, self._M, self._mode, error)
        # The other configurations of the backend would most likely die the same way.
        for other, description in enumerate(self._candidates):
            if description.backend == backend and self._may_win(other) and other not in self._alone:
                self._disqualified[other] = f"not tried after {error.cause}"

    def _measurements(self) -> list[Measurement]:
        scores = self._scores()
        measurements = []
        for index, candidate in enumerate(self._candidates):
            reason = self._disqualified.get(index)
            score = None if reason else scores.get(index)
            if reason is None and (score is None or candidate.backend in self._dropped):
                continue  # eliminated without a finalist to compare it with, or too far behind to be of use
            measurements.append(
                Measurement(
                    self._layer,
                    self._M,
                    self._mode,
                    candidate,
                    us={routing: self._quartiles(index, routing) for routing in self._samples[index]},
                    score=score,
                    error=self._errors.get(index),
                    disqualified=reason[:1000] if reason else None,
                    joules=self._joules.get(index),
                )
            )
        return measurements

    def _scores(self) -> dict[int, float]:
        lags = self._lags()
        if not lags:
            return {}
        leader = min(lags, key=lambda index: lags[index][0])
        us = self._median(leader)
        scores = {index: us * (1 + lag) for index, (lag, _) in lags.items()}
        # Candidates that were eliminated early may be unchecked; they must not win, not even within noise.
        least = us * (1 + 2 * NOISE)
        for medians in reversed(self._rounds):
            for index, median in medians.items():
                if index not in scores:
                    scores[index] = max(least, median / medians[leader] * us)
        return scores
