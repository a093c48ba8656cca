"""Puts new measurements into a machine's calibration file, whatever another process put there meanwhile."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from moe_dispatch.errors import PolicyFileError
from moe_dispatch.machine import Machine
from moe_dispatch.policies.measurements.schema import (
    CalibrationFile,
    Candidate,
    Layer,
    LayerKey,
    Measurement,
    Point,
    read_calibration,
)
from moe_dispatch.policies.measurements.table import tables
from moe_dispatch.problem import Mode
from moe_dispatch.system.files import locked, write_atomically

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """One candidate at one point, with what the file keeps in lists of their own; see `schema.Measurement`."""

    layer: Layer
    M: int
    mode: Mode
    candidate: Candidate
    measurement: Measurement


def merge(held: CalibrationFile, news: Iterable[Measured], machine: Machine) -> CalibrationFile:
    """The held measurements with the new ones in place of all that their backends had at the same layer, M and mode.

    A configuration that did not start this time was far behind, or is not offered any more: its old time was taken
    under other circumstances and must not win against new ones. A backend that took no part keeps what it has.
    """
    news = list(news)
    replaced = {(new.layer.key, new.M, new.mode, new.candidate.backend) for new in news}
    kept: dict[tuple[LayerKey, int, Mode], dict[object, Measured]] = {}
    for old in flat(held):
        if (old.layer.key, old.M, old.mode, old.candidate.backend) not in replaced:
            kept.setdefault((old.layer.key, old.M, old.mode), {})[old.candidate.identity] = old
    for new in news:
        kept.setdefault((new.layer.key, new.M, new.mode), {})[new.candidate.identity] = new
    layers: dict[LayerKey, tuple[int, Layer]] = {}
    candidates: dict[str, tuple[int, Candidate]] = {}
    points = []
    for (key, M, mode), at in sorted(kept.items(), key=lambda item: (repr(item[0][0]), item[0][2], item[0][1])):
        measurements = []
        for measured in at.values():
            layers.setdefault(key, (len(layers), measured.layer))
            text = measured.candidate.model_dump_json()
            index, _ = candidates.setdefault(text, (len(candidates), measured.candidate))
            measurements.append(measured.measurement.model_copy(update={"candidate": index}))
        points.append(Point(layer=layers[key][0], M=M, mode=mode, measurements=measurements))
    return CalibrationFile(
        machine=machine,
        layers=[layer for _, layer in layers.values()],
        candidates=[candidate for _, candidate in candidates.values()],
        points=points,
    )


def save(path: Path, news: Iterable[Measured], machine: Machine) -> None:
    """Merge into the file under its lock, and replace it in one step.

    A file that cannot be trusted is set aside as ``….damaged`` instead of being overwritten.

    Raises:
        PolicyFileError: The directory is read-only, the disk full; what was on disk is untouched.
    """
    _rewrite(path, machine, lambda held: merge(held, news, machine))


def settle(path: Path, machine: Machine) -> None:
    """Make every winner of the file its point's incumbent.

    What wins at one token count is decided together with the others; what a calibration measures next must not change
    that where it does not measure.

    Raises:
        PolicyFileError: As of `save`.
    """
    _rewrite(path, machine, settled)


def settled(file: CalibrationFile) -> CalibrationFile:
    """The file with its winners as incumbents, and nobody else."""
    decided = tables(file)

    def marked(point: Point) -> Point:
        table = decided.get((file.layers[point.layer].key, point.mode))
        winner = table.winners.get(point.M) if table else None
        measurements = [
            one.model_copy(update={"incumbent": file.candidates[one.candidate].identity == winner})
            for one in point.measurements
        ]
        return point.model_copy(update={"measurements": measurements})

    return file.model_copy(update={"points": [marked(point) for point in file.points]})


def _rewrite(path: Path, machine: Machine, change: Callable[[CalibrationFile], CalibrationFile]) -> None:
    try:
        with locked(path):
            try:
                held = read_calibration(path, machine)
            except FileNotFoundError:
                held = CalibrationFile(machine=machine)
            except PolicyFileError as error:
                logger.warning("%s; it is set aside as %s.damaged", error, path.name)
                with contextlib.suppress(FileNotFoundError):
                    os.replace(path, path.with_name(f"{path.name}.damaged"))
                held = CalibrationFile(machine=machine)
            write_atomically(path, change(held).model_dump_json(exclude_defaults=False))
    except OSError as error:
        raise PolicyFileError(
            f"the calibration cannot be written to {path} ({error.strerror or error}); what was there is untouched. "
            "Make room or make it writable, or set MOE_DISPATCH_CACHE_DIR to another folder"
        ) from error


def flat(file: CalibrationFile) -> Iterable[Measured]:
    """A file's measurements, each with what the file keeps in lists of their own."""
    for point in file.points:
        for measurement in point.measurements:
            yield Measured(
                file.layers[point.layer], point.M, point.mode, file.candidates[measurement.candidate], measurement
            )
