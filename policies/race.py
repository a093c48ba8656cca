"""The race of all candidates at one point: successive halving, and nobody wins unchecked.

Successive halving (Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization",
AISTATS 2016): all are timed for a little, taking turns; the faster half stays and is timed for twice as long; and so on
until a few are left, which are timed for long on every routing distribution. The score is the geometric mean of the
medians over the distributions: it does not change when one distribution is slower as a whole, and none outvotes the
others.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from moe_dispatch.problem import Mode

from .merge import Measured
from .schema import Candidate, Layer, Measurement, Quartiles
from .supervisor import CandidateFailedError, Supervisor, WorkerDiedError
from .table import NOISE, Identity, geometric_mean

# Seconds of sampling per candidate in the first round and in the final, and samples at least.
SCREEN: Final = (0.004, 3)
FINAL: Final = (0.04, 7)
FINALISTS: Final = 4


@dataclass(frozen=True)
class Arena:
    """What all races of a calibration share.

    Attributes:
        worker: Where candidates run.
        routings: Names of the routing distributions; the first one screens.
        tolerance: Relative error that a backend promises for a layer.
        bar: Told of a backend that killed its worker, and how.
    """

    worker: Supervisor
    routings: tuple[str, ...]
    tolerance: Callable[[str, Layer], float]
    bar: Callable[[str, Layer, int, Mode, str], None]


class Race:
    """Candidates at one layer, token count and mode.

    Attributes:
        finalists: Who was timed on every distribution; empty before `run`.
    """

    def __init__(self, arena: Arena, layer: Layer, M: int, mode: Mode, candidates: Sequence[Candidate]) -> None:
        self._arena, self._layer, self._M, self._mode = arena, layer, M, mode
        self._candidates = {candidate.identity: candidate for candidate in candidates}
        self._us: dict[Identity, dict[str, Quartiles]] = {identity: {} for identity in self._candidates}
        self._rounds: list[dict[Identity, float]] = []
        self._launched: set[Identity] = set()
        self._errors: dict[Identity, float] = {}
        self._barred: dict[Identity, str] = {}
        self.finalists: set[Identity] = set()

    def run(self) -> list[Measured]:
        """Race, and return what is known of every candidate that ran.

        Raises:
            NotPreparedError: The inputs or their fp32 reference could not be made, which is nobody's fault.
        """
        if not self._candidates:
            return []
        first, *_ = self._arena.routings
        self._arena.worker.point(self._M, self._arena.routings)
        alive = [identity for identity in self._candidates if self._launches(identity)]
        (budget_s, samples), keep = SCREEN, len(alive)
        while keep > FINALISTS and len(alive) > FINALISTS:
            self._time(alive, first, budget_s, samples)
            self._rounds.append({one: self._us[one][first][1] for one in alive if one not in self._barred})
            keep, budget_s = max(FINALISTS, math.ceil(keep / 2)), 2 * budget_s
            alive = self._kept(keep)
        alive = [identity for identity in alive if self._right(identity)]
        for routing in self._arena.routings:
            self._time([one for one in alive if one not in self._barred], routing, *FINAL)
        self.finalists = {one for one in alive if one not in self._barred}
        return self._measured()

    def _kept(self, count: int) -> list[Identity]:
        """The fastest of the last round that are right: `count`, the best of each backend, and who is within noise.

        Only who would be kept is checked; where one is wrong, the next takes its place.
        """
        first = self._arena.routings[0]
        last = self._rounds[-1]
        kept: list[Identity] = []
        cut = math.inf
        for one in sorted(last, key=lambda one: last[one]):
            low, median, high = self._us[one][first]
            # Noise may keep as many again, no more: else equals would never be parted.
            close = len(kept) < 2 * count and min(low, median / (1 + NOISE)) <= cut
            # A fallback is chosen among the backends' best.
            if (close or all(one[0] != other[0] for other in kept)) and self._right(one):
                kept.append(one)
                if len(kept) == count:
                    cut = high
        return kept

    def _launches(self, identity: Identity) -> bool:
        """Run a candidate once, alone: one that hangs or kills is known before the others wait for it."""
        if identity in self._barred:
            return False
        if self._ask_about(identity, "launch", routing=self._arena.routings[0]) is not None:
            self._launched.add(identity)
        return identity in self._launched

    def _right(self, identity: Identity) -> bool:
        """Hold a candidate against fp32, once."""
        if identity in self._errors or identity in self._barred:
            return identity not in self._barred
        answer = self._ask_about(
            identity, "check", mode=self._mode, routings=list(self._arena.routings),
            tolerance=self._arena.tolerance(identity[0], self._layer),
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
            return self._arena.worker.ask(op, M=self._M, backend=candidate.backend, config=candidate.config, **request)
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
            answer = self._arena.worker.ask(
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
                self._us[identity][routing] = (times[0], times[1], times[2])
            else:
                self._barred[identity] = f"raised {answer['failed'].get(str(index), 'nothing, and was not timed')}"

    def _kill(self, identity: Identity, cause: str) -> None:
        self._barred[identity] = cause
        self._arena.bar(identity[0], self._layer, self._M, self._mode, cause)
        # The backend is barred from such problems now; its other configurations would only die again.
        for other in self._candidates:
            if other[0] == identity[0] and other not in self._barred and other not in self._launched:
                self._barred[other] = f"not tried after {cause}"

    def _measured(self) -> list[Measured]:
        scores = self._scores()
        found = []
        for identity, candidate in self._candidates.items():
            why = self._barred.get(identity)
            score = None if why else scores.get(identity)
            if score is None and why is None:
                continue  # it left the race, and nobody finished it to compare with
            measurement = Measurement(
                candidate=0,
                us=self._us[identity],
                score=score,
                error=self._errors.get(identity),
                disqualified=why[:1000] if why else None,
            )
            found.append(Measured(self._layer, self._M, self._mode, candidate, measurement))
        return found

    def _scores(self) -> dict[Identity, float]:
        scores = {
            one: geometric_mean([self._us[one][routing][1] for routing in self._arena.routings])
            for one in self.finalists
        }
        if not scores:
            return {}
        leader = min(scores, key=lambda one: scores[one])
        # Who left early was timed for a moment and maybe never checked: it may not win, not even within noise.
        least = scores[leader] * (1 + 2 * NOISE)
        for timed in reversed(self._rounds):
            for one, us in timed.items():
                if one not in scores:
                    scores[one] = max(least, us / timed[leader] * scores[leader])
        return scores
