"""Make a table to ship from a machine's calibrations: the scores of candidates that may be chosen, and nothing else."""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Final

from moe_dispatch.policies.measurements.merge import merge
from moe_dispatch.policies.measurements.schema import CalibrationFile, Measurement, Origin, PointKey

# A candidate farther behind than this factor is not chosen at neighbouring token counts either. It is left out of the
# table unless it is the fastest of its backend.
NEAR: Final = 1.25
SIGNIFICANT_DIGITS: Final = 4
# A layer and mode that was measured at fewer token counts is left to the other policies: its few times would decide for
# the whole range.
LEAST_TOKENS: Final = 4


def table(files: Iterable[CalibrationFile]) -> CalibrationFile:
    """One file from one machine's calibrations, reduced to what a choice needs.

    Args:
        files: Calibrations of one machine, the newest last; where they overlap, the newest counts.
    """
    whole: CalibrationFile | None = None
    for file in files:
        if whole is None:
            whole = file
        else:
            # A calibration of some backends may have run where the libraries of the others were not installed.
            libraries = {**whole.machine.libraries, **file.machine.libraries}
            machine = file.machine.model_copy(update={"libraries": libraries})
            whole = merge(whole, file.measurements(), machine)
    if whole is None:
        raise ValueError("a table needs at least one calibration")
    points: dict[PointKey, list[Measurement]] = {}
    tried: dict[PointKey, set[str]] = {}
    for measurement in whole.measurements():
        tried.setdefault(measurement.point, set()).add(measurement.candidate.backend)
        if measurement.score is not None:
            points.setdefault(measurement.point, []).append(measurement)
    for outdated in _outdated(points, tried):
        del points[outdated]
    tokens = Counter((layer, mode) for layer, _, mode in points)
    kept = [
        _reduced(measurement)
        for (layer, _, mode), candidates in points.items()
        if tokens[layer, mode] >= LEAST_TOKENS
        for measurement in _worth_shipping(candidates)
    ]
    return merge(CalibrationFile(machine=whole.machine), kept, whole.machine)


def _outdated(points: Mapping[PointKey, list[Measurement]], tried: Mapping[PointKey, Set[str]]) -> list[PointKey]:
    """Points that take longer than the next one, which has more tokens, for want of the backend that is fastest there.

    It was not tried at them: they are older than what it takes now. Without them it is ranked by its neighbours.
    """
    fastest = {point: min(candidates, key=_score) for point, candidates in points.items()}
    ordered = sorted(points, key=lambda point: (str(point[0]), point[2], point[1]))
    return [
        point
        for point, following in itertools.pairwise(ordered)
        if (point[0], point[2]) == (following[0], following[2])
        and _score(fastest[point]) > _score(fastest[following])
        and fastest[following].candidate.backend not in tried[point]
    ]


def text(made: CalibrationFile) -> str:
    """A table as the content of a file.

    Of a measurement it has no more than candidate and score (`CalibrationFile.scores`), and each origin once.
    """
    stored = made.model_dump(mode="json", exclude_defaults=True)
    origins: list[dict[str, Any]] = []
    for candidate in stored.get("candidates", ()):
        origin = {name: candidate.pop(name) for name in Origin.model_fields if name in candidate}
        if origin not in origins:
            origins.append(origin)
        candidate["origin"] = origins.index(origin)
    stored["origins"] = origins
    points = stored.pop("points", [])
    measured = [_by_candidate(point["measurements"]) for point in points]
    stored["scores"] = {name: [point[name] for point in points] for name in ("layer", "M", "mode")} | {
        "candidates": [[candidate for candidate, _ in pairs] for pairs in measured],
        "scores": [[score for _, score in pairs] for pairs in measured],
    }
    return json.dumps(stored, separators=(",", ":"), ensure_ascii=False)


def _by_candidate(measurements: Iterable[dict[str, Any]]) -> list[tuple[int, float]]:
    """Candidates and scores of a point by ascending candidate; equal scores in the order that they are given in."""
    keys: list[int] = []
    pairs = [(each["candidate"], each["score"]) for each in measurements]
    for _, level in itertools.groupby(pairs, key=lambda pair: pair[1]):
        keys += sorted(candidate for candidate, _ in level)
    return [pair for _, pair in sorted(zip(keys, pairs, strict=True))]


def _worth_shipping(candidates: Sequence[Measurement]) -> list[Measurement]:
    ordered = sorted(candidates, key=_score)
    backends: set[str] = set()
    kept = []
    for measurement in ordered:
        if _score(measurement) <= NEAR * _score(ordered[0]) or measurement.candidate.backend not in backends:
            kept.append(measurement)
        backends.add(measurement.candidate.backend)
    return kept


def _score(measurement: Measurement) -> float:
    return float(measurement.score or "nan")  # only measurements with a score get here


def _reduced(measurement: Measurement) -> Measurement:
    score = float(f"{_score(measurement):.{SIGNIFICANT_DIGITS}g}")
    date = measurement.candidate.measured[: len("2026-11-25")]
    candidate = measurement.candidate.model_copy(update={"measured": date})
    return Measurement(measurement.layer, measurement.M, measurement.mode, candidate, score=score)
