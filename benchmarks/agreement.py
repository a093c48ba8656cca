"""Whether calibrations of one machine agree, and what the choices of the first lose by the measurements of the others.

    python -m moe_dispatch.benchmarks.agreement FIRST.json SECOND.json [BETWEEN.json...] [--json]

SECOND repeats FIRST; token counts that only a later file has lie between the calibrated ones. A choice loses its time
over that of the fastest candidate, both as the later file has them, less 1; the rules' choice is held against it there.
"""

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dispatch.machine import Machine
from moe_dispatch.policies.rules import RulesPolicy
from moe_dispatch.policies.schema import CalibrationFile, Layer, parse_calibration, read_bytes
from moe_dispatch.policies.table import Identity, tables
from moe_dispatch.problem import Mode
from moe_dispatch.registry import BACKENDS


@dataclass(frozen=True)
class Point:
    """What a later file says of one of the first one's choices.

    Attributes:
        where: For a person.
        calibrated: Whether the first file measured this token count.
        same: Whether both chose the same; None where only one could.
        loss: Of the choice; None where the later file did not time it.
        over_rules: Time of the choice over that of the rules' choice, less 1; None where one was not timed.
    """

    where: str
    calibrated: bool
    same: bool | None
    loss: float | None
    over_rules: float | None


def compare(first: CalibrationFile, later: CalibrationFile) -> Iterator[Point]:
    """Each point of the later file that the first one has an opinion of."""
    before = tables(first)
    layers = {layer.key: layer for layer in later.layers}
    for (key, mode), repeated in tables(later).items():
        if (table := before.get((key, mode))) is None:
            continue
        for M, at in repeated.scores.items():
            timed = {identity: us for identity, us in at.items() if us is not None}
            if not timed or not (ranked := table.rank(M)):
                continue
            chosen = ranked[0][0]
            rules = _rules_time(layers[key], M, mode, later.machine, timed)
            us = timed.get(chosen)
            yield Point(
                where=f"{layers[key]} M={M} ({mode})",
                calibrated=M in table.tokens,
                same=chosen == repeated.winners[M] if M in table.tokens else None,
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
        apart = [point.loss for point in here if point.same is False and point.loss is not None]
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


def _rules_time(layer: Layer, M: int, mode: Mode, machine: Machine, timed: Mapping[Identity, float]) -> float | None:
    """Time of the default configuration of the backend that the rules would have run."""
    problem = layer.problem(M, machine, mode)
    for choice in RulesPolicy(machine).rank(problem):
        backend = BACKENDS.load(choice.backend)(machine)
        if any(identity[0] == choice.backend for identity in timed) and not backend.unsupported_reasons(problem):
            default = backend.default_config(problem).model_dump(mode="json")
            return timed.get((choice.backend, tuple(sorted(default.items()))))
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Print how the files agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("later", type=Path, nargs="+")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    given: Any = parser.parse_args(arguments)
    first, *later = (parse_calibration(read_bytes(path), str(path)) for path in (given.first, *given.later))
    points = [point for file in later for point in compare(first, file)]
    found = summary(points)
    if given.json:
        print(json.dumps(found, indent=1))
        return
    for name, values in found.items():
        print(name, " ".join(f"{key}={value:.4g}" for key, value in values.items()))
    for point in sorted(points, key=lambda point: -(point.loss or 0.0))[:12]:
        print(f"  {point.where}: loss {point.loss}, over the rules {point.over_rules}, same {point.same}")


if __name__ == "__main__":
    main()
