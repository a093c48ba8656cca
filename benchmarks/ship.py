"""Makes a table to ship out of a machine's calibration: scores of those that may be chosen, and nothing else.

python -m moe_dispatch.benchmarks.ship CALIBRATION.json... --out policies/tables/nvidia_h200.json
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from moe_dispatch.benchmarks.command import mistakes_exit
from moe_dispatch.policies.measurements.merge import merge
from moe_dispatch.policies.measurements.schema import CalibrationFile, Measurement, parse_calibration, read_bytes
from moe_dispatch.system.files import write_atomically

# Who was farther behind at a token count is not chosen between it and the next either, unless it is its backend's best.
NEAR: Final = 1.25
DIGITS: Final = 4
# A layer and mode measured at fewer token counts is left to the other policies: its times would speak for far too much.
LEAST_TOKENS: Final = 4


def table(files: Iterable[CalibrationFile]) -> CalibrationFile:
    """One file of one machine's calibrations, later ones first, reduced to what a choice needs."""
    whole: CalibrationFile | None = None
    for file in files:
        whole = file if whole is None else merge(whole, file.measurements(), file.machine)
    if whole is None:
        raise ValueError("a table needs a calibration")
    points: dict[tuple[object, int, str], list[Measurement]] = {}
    for one in whole.measurements():
        if one.score is not None:
            points.setdefault(one.point, []).append(one)
    tokens = Counter((layer, mode) for layer, _, mode in points)
    kept = [
        _reduced(one)
        for (layer, _, mode), at in points.items()
        if tokens[layer, mode] >= LEAST_TOKENS
        for one in _worth(at)
    ]
    return merge(CalibrationFile(machine=whole.machine), kept, whole.machine)


def _worth(at: Sequence[Measurement]) -> list[Measurement]:
    ordered = sorted(at, key=_score)
    backends: set[str] = set()
    kept = []
    for one in ordered:
        if _score(one) <= NEAR * _score(ordered[0]) or one.candidate.backend not in backends:
            kept.append(one)
        backends.add(one.candidate.backend)
    return kept


def _score(one: Measurement) -> float:
    return float(one.score or "nan")  # only scored ones come here


def _reduced(one: Measurement) -> Measurement:
    score = float(f"{_score(one):.{DIGITS}g}")
    candidate = one.candidate.model_copy(update={"measured": one.candidate.measured[:10]})
    return Measurement(one.layer, one.M, one.mode, candidate, score=score)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibrations", type=Path, nargs="+", help="of one machine, the newest last")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    with mistakes_exit(parser):
        made = table(parse_calibration(read_bytes(path), str(path)) for path in given.calibrations)
    write_atomically(given.out, made.model_dump_json(exclude_defaults=True))
    count = sum(len(point.measurements) for point in made.points)
    print(f"{len(made.points)} points, {count} measurements, {given.out.stat().st_size:,} bytes: {given.out}")


if __name__ == "__main__":
    main()
