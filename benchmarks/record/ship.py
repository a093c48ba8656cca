"""Make a table to ship from a machine's calibrations: the scores of candidates that may be chosen, and nothing else."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from moe_dispatch.policies.measurements.merge import Measured, flat, merge
from moe_dispatch.policies.measurements.schema import CalibrationFile, Measurement

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
        whole = file if whole is None else merge(whole, flat(file), file.machine)
    if whole is None:
        raise ValueError("a table needs at least one calibration")
    points: dict[tuple[object, int, str], list[Measured]] = {}
    for measured in flat(whole):
        if measured.measurement.score is not None:
            points.setdefault((measured.layer.key, measured.M, measured.mode), []).append(measured)
    tokens = Counter((layer, mode) for layer, _, mode in points)
    kept = [
        _reduced(measured)
        for (layer, _, mode), candidates in points.items()
        if tokens[layer, mode] >= LEAST_TOKENS
        for measured in _worth_shipping(candidates)
    ]
    return merge(CalibrationFile(machine=whole.machine), kept, whole.machine)


def _worth_shipping(candidates: Sequence[Measured]) -> list[Measured]:
    ordered = sorted(candidates, key=_score)
    backends: set[str] = set()
    kept = []
    for measured in ordered:
        if _score(measured) <= NEAR * _score(ordered[0]) or measured.candidate.backend not in backends:
            kept.append(measured)
        backends.add(measured.candidate.backend)
    return kept


def _score(measured: Measured) -> float:
    return float(measured.measurement.score or "nan")  # only measurements with a score get here


def _reduced(measured: Measured) -> Measured:
    score = float(f"{_score(measured):.{SIGNIFICANT_DIGITS}g}")
    date = measured.candidate.measured[: len("2026-11-25")]
    candidate = measured.candidate.model_copy(update={"measured": date})
    return Measured(measured.layer, measured.M, measured.mode, candidate, Measurement(candidate=0, score=score))
