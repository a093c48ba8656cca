"""What a calibration tells: where it stands, and in the end what it did."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from moe_dispatch.policies.measurements.merge import Measured
from moe_dispatch.policies.measurements.table import Identity, stable_winners
from moe_dispatch.problem import Mode


@dataclass(frozen=True)
class Progress:
    """Where a calibration stands.

    Attributes:
        done: Points finished.
        total: Points in all, refinements as they are found.
        what: The point at work, for a person.
        left_s: Estimated seconds to the end; None before the first point is done.
    """

    done: int
    total: int
    what: str
    left_s: float | None


@dataclass
class CalibrationReport:
    """What a calibration did.

    Attributes:
        path: The file that holds the result.
        measured: Every measurement of this run.
        skipped: Points that were not measured, each with the reason.
        unavailable: Backends that could not take part, each with its reasons.
        interrupted: Whether it was stopped before its end; what was measured is kept.
        seconds: It took.
        spent: Of them, on each kind of work.
    """

    path: Path
    measured: list[Measured] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False
    seconds: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)

    def winners(self) -> dict[tuple[str, Mode], dict[int, tuple[Identity, float]]]:
        """Per layer and mode the calm winner at each token count, with its time in µs."""
        scores: dict[tuple[str, Mode], dict[int, dict[Identity, float | None]]] = {}
        for one in self.measured:
            at = scores.setdefault((str(one.layer), one.mode), {}).setdefault(one.M, {})
            at[one.candidate.identity] = one.measurement.score
        before = {
            (str(one.layer), one.mode, one.M): one.candidate.identity
            for one in self.measured
            if one.measurement.incumbent
        }
        found: dict[tuple[str, Mode], dict[int, tuple[Identity, float]]] = {}
        for key, by_tokens in scores.items():
            timed = {M: by_tokens[M] for M in sorted(by_tokens) if any(by_tokens[M].values())}
            incumbents = {M: before[*key, M] for M in timed if (*key, M) in before}
            winners = stable_winners(timed, incumbents)
            found[key] = {M: (winner, timed[M][winner] or math.nan) for M, winner in winners.items()}
        return found

    def disqualified(self) -> list[Measured]:
        """Candidates that may not win somewhere."""
        return [one for one in self.measured if one.measurement.disqualified]
