"""Merges new measurements into a machine's calibration file, whatever other processes wrote to it meanwhile."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from moe_dispatch.errors import PolicyFileError
from moe_dispatch.machine import Machine
from moe_dispatch.policies.measurements.schema import (
    CalibrationFile,
    Candidate,
    Identity,
    LayerKey,
    LayerShape,
    Measurement,
    Point,
    PointKey,
    StoredMeasurement,
    parse_calibration,
    read_calibration,
)
from moe_dispatch.policies.measurements.table import tables
from moe_dispatch.stored_files import NewerFileError, require_older
from moe_dispatch.system.files import check_writable, locked, set_aside, write_atomically

logger = logging.getLogger(__name__)


def merge(held: CalibrationFile, news: Iterable[Measurement], machine: Machine) -> CalibrationFile:
    """The held measurements, with the new ones in place of all that their backends had at the same points.

    A configuration that did not start this time was far behind, or is not offered any more: its old time was taken
    under other circumstances and must not win against new ones. A backend that took no part in a point keeps what it
    has there.
    """
    news = list(news)
    replaced = {(new.point, new.candidate.backend) for new in news}
    merged: dict[PointKey, dict[Identity, Measurement]] = {}
    for old in held.measurements():
        if (old.point, old.candidate.backend) not in replaced:
            merged.setdefault(old.point, {})[old.candidate.identity] = old
    for new in news:
        merged.setdefault(new.point, {})[new.candidate.identity] = new
    layers: dict[LayerKey, tuple[int, LayerShape]] = {}
    candidates: dict[str, tuple[int, Candidate]] = {}
    points = []
    for key, M, mode in sorted(merged, key=lambda point: (repr(point[0]), point[2], point[1])):
        stored = []
        for measurement in merged[key, M, mode].values():
            layers.setdefault(key, (len(layers), measurement.layer))
            text = measurement.candidate.model_dump_json()
            index, _ = candidates.setdefault(text, (len(candidates), measurement.candidate))
            stored.append(StoredMeasurement.of(measurement, index))
        points.append(Point(layer=layers[key][0], M=M, mode=mode, measurements=stored))
    return CalibrationFile(
        machine=machine,
        layers=[layer for _, layer in layers.values()],
        candidates=[candidate for _, candidate in candidates.values()],
        points=points,
    )


def save(path: Path, news: Iterable[Measurement], machine: Machine) -> None:
    """Merge into the file under its lock, and replace it in one step.

    A file that cannot be trusted is set aside as ``….damaged-1``, ``-2`` and so on instead of being overwritten.

    Raises:
        PolicyFileError: The directory is read-only, the disk full, or the file a newer version's; it is untouched.
    """
    _rewrite(path, machine, lambda held: merge(held, news, machine))


def require_writable(path: Path) -> None:
    """Find out before anything is measured whether the file could be written.

    Raises:
        PolicyFileError: The directory is read-only or the disk full, or a newer version wrote the file.
    """
    require_older(path, parse_calibration)
    with _write_errors(path):
        check_writable(path)


def promote_winners(path: Path, machine: Machine) -> None:
    """Make every winner of the file the incumbent of its point.

    The winner at one token count is decided together with the others; what a calibration measures next must not change
    it at points that it does not measure.

    Raises:
        PolicyFileError: See `save`.
    """
    _rewrite(path, machine, with_winners_promoted)


def with_winners_promoted(file: CalibrationFile) -> CalibrationFile:
    """The file with its winners, and no other candidates, as incumbents."""
    decided = tables(file)

    def promoted(point: Point) -> Point:
        table = decided.get((file.layers[point.layer].key, point.mode))
        winner = table.winners.get(point.M) if table else None
        measurements = [
            stored.model_copy(update={"incumbent": file.candidates[stored.candidate].identity == winner})
            for stored in point.measurements
        ]
        return point.model_copy(update={"measurements": measurements})

    return file.model_copy(update={"points": [promoted(point) for point in file.points]})


def _rewrite(path: Path, machine: Machine, change: Callable[[CalibrationFile], CalibrationFile]) -> None:
    with _write_errors(path), locked(path):
        try:
            held = read_calibration(path, machine)
        except FileNotFoundError:
            held = CalibrationFile(machine=machine)
        except NewerFileError:
            raise
        except PolicyFileError as error:
            logger.warning("%s", set_aside(path, error))
            held = CalibrationFile(machine=machine)
        write_atomically(path, change(held).model_dump_json(exclude_none=True))


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PolicyFileError(
            f"the calibration cannot be written to {path} ({error.strerror or error}); what was there is untouched. "
            "Make room or make it writable, or set MOE_DISPATCH_CACHE_DIR to another folder"
        ) from error
