"""Whether calibrations of one machine agree, and what choices lose by the measurements of a later calibration.

The first calibration chooses, a later one judges. The loss of a choice is its time over that of the fastest candidate,
less 1, both as the later calibration measured them. The choice of the rules is judged in the same way.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from moe_dispatch.benchmarks.targets import Target, TargetResult
from moe_dispatch.machine import Machine
from moe_dispatch.policies.learned.defaults import default_identity
from moe_dispatch.policies.measurements.schema import CalibrationFile, Identity, LayerShape
from moe_dispatch.policies.measurements.table import tables
from moe_dispatch.policies.rules import RulesPolicy
from moe_dispatch.problem import Mode
from moe_dispatch.registry import make_backend

# What calibrations of one machine have to show.
SECONDS: Final = Target("seconds of the calibration", 150.0, at_least=False)
AGREEMENT: Final = Target("share of points with the same winner", 0.95)
APART: Final = Target("how far apart the winners are where they differ", 0.03, at_least=False)
LOSS: Final = Target("loss at calibrated token counts, worst point", 0.02, at_least=False)
LOSS_BETWEEN_MEAN: Final = Target("loss between them, mean", 0.03, at_least=False)
LOSS_BETWEEN_WORST: Final = Target("loss between them, worst point", 0.10, at_least=False)
OVER_RULES: Final = Target("time over the rules' choice less 1, worst point", 0.02, at_least=False)


@dataclass(frozen=True)
class JudgedChoice:
    """One choice of the first calibration, judged by a later one.

    Attributes:
        where: Layer, token count and mode, for a reader.
        calibrated: Whether the first calibration measured this token count.
        same: Whether both calibrations chose the same; None if the first did not measure here.
        apart: By how much the times of the two choices differ; 0 for the same choice.
        loss: Loss of the choice; None if the later calibration did not time it.
        over_rules: Time of the choice over that of the rules' choice, less 1; None if either was not timed.
    """

    where: str
    calibrated: bool
    same: bool | None
    apart: float | None
    loss: float | None
    over_rules: float | None


def compare(first: CalibrationFile, later: CalibrationFile, *, between: bool = False) -> Iterator[JudgedChoice]:
    """Judge every choice of the first calibration at the points of the later one.

    A point that the later file only carried over from the first is no evidence and is left out.

    Args:
        first: The calibration that chooses.
        later: The calibration that judges.
        between: Judge only token counts that the first calibration did not measure.
    """
    tables_before = tables(first)
    layers = {layer.key: layer for layer in later.layers}
    for (key, mode), repeated in tables(later).items():
        if (table := tables_before.get((key, mode))) is None:
            continue
        for M, scores in repeated.scores.items():
            if (between and M in table.tokens) or scores == table.scores.get(M):
                continue
            timed = {identity: us for identity, us in scores.items() if us is not None}
            if not timed or not (ranked := table.rank(M)):
                continue
            chosen = ranked[0][0]
            rules_us = _rules_time(layers[key], M, mode, later.machine, timed)
            us, winner_us = timed.get(chosen), timed[repeated.winners[M]]
            calibrated = M in table.tokens
            yield JudgedChoice(
                where=f"{layers[key]} M={M} ({mode})",
                calibrated=calibrated,
                same=chosen == repeated.winners[M] if calibrated else None,
                apart=abs(us / winner_us - 1) if us and calibrated else None,
                loss=us / min(timed.values()) - 1 if us else None,
                over_rules=us / rules_us - 1 if us and rules_us else None,
            )


def summary(choices: Iterable[JudgedChoice]) -> dict[str, dict[str, float]]:
    """Agreement and losses as fractions, at calibrated token counts and between them."""
    choices = list(choices)
    summaries: dict[str, dict[str, float]] = {}
    for name, calibrated in (("calibrated", True), ("between", False)):
        judged = [choice for choice in choices if choice.calibrated == calibrated]
        losses = [choice.loss for choice in judged if choice.loss is not None]
        if not losses:
            continue
        over_rules = [choice.over_rules for choice in judged if choice.over_rules is not None]
        apart = [choice.apart for choice in judged if choice.apart is not None]
        summaries[name] = {
            "points": len(judged),
            "not_timed": len(judged) - len(losses),
            "mean": math.fsum(losses) / len(losses),
            "worst": max(losses),
            "over_rules": max(over_rules, default=math.nan),
        }
        if calibrated:
            summaries[name] |= {
                "agree": sum(bool(choice.same) for choice in judged) / len(judged),
                "apart": max(apart, default=0.0),
            }
    return summaries


def results(choices: Sequence[JudgedChoice], seconds: float | None = None, *, expected: int = 0) -> list[TargetResult]:
    """The result of every target.

    Args:
        choices: What `compare` gave.
        seconds: Duration of the first calibration; its target is left out if None.
        expected: Number of points that the first calibration measured, all of which should be judged.
    """
    calibrated = [choice for choice in choices if choice.calibrated]
    between = [choice for choice in choices if not choice.calibrated]
    same = [choice.same for choice in calibrated if choice.same is not None]
    differing = [choice for choice in calibrated if choice.same is False]
    made = [TargetResult(SECONDS, seconds)] if seconds is not None else []
    made.append(
        TargetResult(
            AGREEMENT, sum(same) / len(same) if same else None, f"{len(same)} points, {len(differing)} differ",
            missing=max(expected - len(same), 0),
        )
    )  # fmt: skip
    if differing:
        made.append(_worst(APART, [(choice.where, choice.apart) for choice in differing]))
    made.append(_worst(LOSS, [(choice.where, choice.loss) for choice in calibrated]))
    if between:
        losses = [choice.loss for choice in between if choice.loss is not None]
        mean = math.fsum(losses) / len(losses) if losses else None
        made.append(TargetResult(LOSS_BETWEEN_MEAN, mean, f"{len(between)} points", len(between) - len(losses)))
        made.append(_worst(LOSS_BETWEEN_WORST, [(choice.where, choice.loss) for choice in between]))
    # A rules' choice that was not timed is far behind, and no calibrated choice is slower: nothing is missing there.
    over_rules = [(choice.where, choice.over_rules) for choice in choices if choice.over_rules is not None]
    made.append(_worst(OVER_RULES, over_rules))
    return made


def _worst(target: Target, values: Sequence[tuple[str, float | None]]) -> TargetResult:
    """The greatest of the values, each with its point; a point without a value is missing."""
    timed = [(value, where) for where, value in values if value is not None]
    worst, where = max(timed, default=(None, "none"))
    return TargetResult(target, worst, f"{len(timed)} points, {where}", len(values) - len(timed))


def _rules_time(
    layer: LayerShape, M: int, mode: Mode, machine: Machine, timed: Mapping[Identity, float]
) -> float | None:
    """Time of the backend that the rules would have run, in its default configuration."""
    problem = layer.problem(M, machine, mode)
    for choice in RulesPolicy(machine).rank(problem):
        backend = make_backend(choice.backend, machine).backend
        took_part = any(name == choice.backend for name, _ in timed)
        if backend is not None and took_part and not backend.unsupported_reasons(problem):
            return timed.get(default_identity(backend, problem))
    return None
