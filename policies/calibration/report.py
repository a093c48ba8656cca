"""What a calibration tells its caller: progress while it runs, and a report at the end."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from moe_dispatch.policies.measurements.schema import Identity, Measurement
from moe_dispatch.policies.measurements.table import stable_winners
from moe_dispatch.problem import Mode


@dataclass(frozen=True)
class Progress:
    """How far a calibration is.

    Attributes:
        total: Points in all; refinements are added as they are found.
        what: Text that names the point at work.
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
        skipped: Points and candidates that were left out, each with the reason.
        unavailable: Backends that could not take part, each with its reasons.
        known: Points that an earlier calibration had measured with today's versions, when resuming.
        unprepared: Whether the weights or inputs of some point could not be made.
        late: Whether the budget was not enough for some point.
        interrupted: Whether it was stopped before its end; what was measured is kept.
    """

    path: Path
    measured: list[Measurement] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    known: int = 0
    unprepared: bool = False
    late: bool = False
    interrupted: bool = False
    seconds: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)

    def winners(self) -> dict[tuple[str, Mode], dict[int, tuple[Identity, float]]]:
        """Per layer (as text) and mode: the stable winner at each token count, with its time in µs."""
        scores: dict[tuple[str, Mode], dict[int, dict[Identity, float | None]]] = {}
        incumbents: dict[tuple[str, Mode], dict[int, Identity]] = {}
        for measurement in self.measured:
            key, identity = (str(measurement.layer), measurement.mode), measurement.candidate.identity
            scores.setdefault(key, {}).setdefault(measurement.M, {})[identity] = measurement.score
            if measurement.incumbent:
                incumbents.setdefault(key, {})[measurement.M] = identity
        winners: dict[tuple[str, Mode], dict[int, tuple[Identity, float]]] = {}
        for key, by_tokens in scores.items():
            timed = {M: by_tokens[M] for M in sorted(by_tokens) if any(by_tokens[M].values())}
            stable = stable_winners(timed, incumbents.get(key))
            winners[key] = {M: (winner, timed[M][winner] or math.nan) for M, winner in stable.items()}
        return winners

    def failure(self) -> str:
        """Why no candidate has a time, and what to do; empty if one has, or if there was nothing left to measure."""
        nothing_left = bool(self.known) and not (self.measured or self.late or self.unprepared)
        if nothing_left or any(measurement.score for measurement in self.measured):
            return ""
        if self.measured:
            return (
                "every candidate was disqualified, for the reasons above; `moe-dispatch doctor --probe` runs each "
                "backend alone"
            )
        if self.late:
            return (
                "the budget was spent before one point was measured; give a larger --budget, fewer --tokens, or fewer "
                "candidates by --backend and --max-configs"
            )
        if self.unprepared:
            return (
                "weights or inputs could not be made, for the reasons above; where memory is short, free some, or give "
                "fewer --tokens or a smaller layer by --model E,topk,K,N (such as one GPU's share of the experts)"
            )
        return "no backend here can run it; `moe-dispatch explain` prints the reasons against each"

    def disqualified(self) -> list[Measurement]:
        """Measurements of candidates that may not win."""
        return [measurement for measurement in self.measured if measurement.disqualified]
