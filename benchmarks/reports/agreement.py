"""Whether calibrations of one machine agree, and what the choices of the first lose by the measurements of the others.

    python -m moe_dispatch.benchmarks.reports.agreement FIRST.json SECOND.json [--between BETWEEN.json] [--seconds S]
        [--json]

SECOND repeats FIRST. BETWEEN was measured after FIRST at token counts between its own; what FIRST would choose there
took part. A choice loses its time over that of the fastest candidate, both as the later file has them, less 1; the
rules' choice is held against it there. A bar passes only on complete evidence.
"""

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moe_dispatch.benchmarks.command import mistakes_exit
from moe_dispatch.benchmarks.reports.scoreboard import Bar, markdown
from moe_dispatch.machine import Machine
from moe_dispatch.policies.learned.defaults import default_identity, find_backend
from moe_dispatch.policies.measurements.schema import (
    CalibrationFile,
    Identity,
    LayerShape,
    parse_calibration,
    read_bytes,
)
from moe_dispatch.policies.measurements.table import tables
from moe_dispatch.policies.rules import RulesPolicy
from moe_dispatch.problem import Mode

# Issue 4: what a calibration must show.
MOST_SECONDS: Final = 150.0
LEAST_AGREEMENT: Final = 0.95
MOST_APART: Final = 0.03
MOST_LOSS: Final = 0.02
MOST_LOSS_BETWEEN: Final = {"mean": 0.03, "worst": 0.10}
MOST_OVER_RULES: Final = 0.02


@dataclass(frozen=True)
class Point:
    """What a later file says of one of the first one's choices.

    Attributes:
        where: For a person.
        calibrated: Whether the first file measured this token count.
        same: Whether both chose the same; None where only one could.
        apart: By how much the times of the two choices differ; 0 for the same.
        loss: Of the choice; None where the later file did not time it.
        over_rules: Time of the choice over that of the rules' choice, less 1; None where one was not timed.
    """

    where: str
    calibrated: bool
    same: bool | None
    apart: float | None
    loss: float | None
    over_rules: float | None


def compare(first: CalibrationFile, later: CalibrationFile, *, between: bool = False) -> Iterator[Point]:
    """Each point of the later file that the first one has an opinion of; between: that it has not measured.

    A point that the later file only holds on to says nothing.
    """
    before = tables(first)
    layers = {layer.key: layer for layer in later.layers}
    for (key, mode), repeated in tables(later).items():
        if (table := before.get((key, mode))) is None:
            continue
        for M, at in repeated.scores.items():
            if (between and M in table.tokens) or at == table.scores.get(M):
                continue
            timed = {identity: us for identity, us in at.items() if us is not None}
            if not timed or not (ranked := table.rank(M)):
                continue
            chosen = ranked[0][0]
            rules = _rules_time(layers[key], M, mode, later.machine, timed)
            us, other = timed.get(chosen), timed[repeated.winners[M]]
            calibrated = M in table.tokens
            yield Point(
                where=f"{layers[key]} M={M} ({mode})",
                calibrated=calibrated,
                same=chosen == repeated.winners[M] if calibrated else None,
                apart=abs(us / other - 1) if us and calibrated else None,
                loss=us / min(timed.values()) - 1 if us else None,
                over_rules=us / rules - 1 if us and rules else None,
            )


def summary(points: Iterable[Point]) -> dict[str, dict[str, float]]:
    """Agreement and losses, at calibrated token counts and between them; fractions."""
    found: dict[str, dict[str, float]] = {}
    for name, calibrated in (("calibrated", True), ("between", False)):
        here = [point for point in points if point.calibrated == calibrated]
        losses = [point.loss for point in here if point.loss is not None]
        if not losses:
            continue
        over = [point.over_rules for point in here if point.over_rules is not None]
        apart = [point.apart for point in here if point.apart is not None]
        found[name] = {
            "points": len(here),
            "not_timed": len(here) - len(losses),
            "mean": math.fsum(losses) / len(losses),
            "worst": max(losses),
            "over_rules": max(over, default=math.nan),
        }
        if calibrated:
            found[name] |= {
                "agree": sum(bool(point.same) for point in here) / len(here),
                "apart": max(apart, default=0.0),
            }
    return found


def bars(points: Sequence[Point], seconds: float | None = None, *, expected: int = 0) -> list[Bar]:
    """The bars of issue 4 that calibrations can show; `expected` points were calibrated first."""
    found = [Bar("seconds of the calibration", seconds, MOST_SECONDS, at_least=False)] if seconds is not None else []
    here = [point for point in points if point.calibrated]
    between = [point for point in points if not point.calibrated]
    same = [point.same for point in here if point.same is not None]
    differ = [point for point in here if point.same is False]
    found.append(
        Bar(
            "share of points with the same winner", sum(same) / len(same) if same else None, LEAST_AGREEMENT,
            where=f"{len(same)} points, {len(differ)} differ", missing=max(expected - len(same), 0),
        )
    )  # fmt: skip
    if differ:
        found.append(_worst("how far apart the winners are where they differ", differ, "apart", MOST_APART))
    found.append(_worst("loss at calibrated token counts, worst point", here, "loss", MOST_LOSS))
    if between:
        losses = [point.loss for point in between if point.loss is not None]
        mean = math.fsum(losses) / len(losses) if losses else None
        found.append(
            Bar(
                "loss between them, mean", mean, MOST_LOSS_BETWEEN["mean"], at_least=False,
                where=f"{len(between)} points", missing=len(between) - len(losses),
            )
        )  # fmt: skip
        found.append(_worst("loss between them, worst point", between, "loss", MOST_LOSS_BETWEEN["worst"]))
    found.append(_worst("time over the rules' choice less 1, worst point", points, "over_rules", MOST_OVER_RULES))
    return found


def _worst(what: str, points: Sequence[Point], field: str, limit: float) -> Bar:
    timed = [(getattr(point, field), point.where) for point in points if getattr(point, field) is not None]
    worst, where = max(timed, default=(None, "none"))
    # Where the rules' choice was not timed it is far behind, and no calibration is slower than it.
    missing = 0 if field == "over_rules" else len(points) - len(timed)
    return Bar(what, worst, limit, at_least=False, where=f"{len(timed)} points, {where}", missing=missing)


def _rules_time(
    layer: LayerShape, M: int, mode: Mode, machine: Machine, timed: Mapping[Identity, float]
) -> float | None:
    """Time of the default configuration of the backend that the rules would have run."""
    problem = layer.problem(M, machine, mode)
    for choice in RulesPolicy(machine).rank(problem):
        backend = find_backend(choice.backend, machine)
        took_part = any(name == choice.backend for name, _ in timed)
        if backend is not None and took_part and not backend.unsupported_reasons(problem):
            return timed.get(default_identity(backend, problem))
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Print how the files agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--between", type=Path, action="append", default=[], help="measured between the first's")
    parser.add_argument("--seconds", type=float, help="that the first took")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    given: Any = parser.parse_args(arguments)
    with mistakes_exit(parser):
        first, second, *between = (
            parse_calibration(read_bytes(path), str(path)) for path in (given.first, given.second, *given.between)
        )
    points = [*compare(first, second), *(point for file in between for point in compare(first, file, between=True))]
    if given.json:
        print(json.dumps(summary(points), indent=1))
        return
    expected = sum(len(table.tokens) for table in tables(first).values())
    print(markdown(bars(points, given.seconds, expected=expected)))
    notable = [point for point in points if point.same is False or (point.loss or 0.0) > MOST_LOSS]
    for point in sorted(notable, key=lambda point: -(point.loss or 0.0)):
        loss = "not timed" if point.loss is None else f"loses {point.loss:.2%}"
        print(f"- {point.where}: {loss}{', and the winner differs' if point.same is False else ''}")


if __name__ == "__main__":
    main()
