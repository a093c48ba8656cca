"""Ranks by measurements: those of this machine, and as a base class those of any calibration file."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pydantic

from moe_dispatch.backend import Backend
from moe_dispatch.errors import PolicyFileError, warn
from moe_dispatch.machine import Machine
from moe_dispatch.policies.measurements.schema import (
    CalibrationFile,
    Candidate,
    Identity,
    LayerKey,
    layer_key,
    read_calibration,
)
from moe_dispatch.policies.measurements.table import LayerTable
from moe_dispatch.policies.measurements.versions import changes, relevant_versions
from moe_dispatch.policy import Choice, Policy
from moe_dispatch.problem import Mode, MoEProblem
from moe_dispatch.registry import MadeBackend, make_backend
from moe_dispatch.settings import cache_dir

logger = logging.getLogger(__name__)


def calibration_path(machine: Machine, directory: Path | None = None) -> Path:
    """The path of a machine's calibration file."""
    return (directory or cache_dir()) / "calibration" / f"{machine.fingerprint}.json"


class MeasuredPolicy(Policy):
    """Ranks by the measurements of a calibration file; ranks nothing where there is no file.

    Attributes:
        retires: Whether a change of a version that a measurement depends on retires it.
    """

    retires = True

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._notes: list[str] = []
        self._tables: dict[tuple[LayerKey, Mode], LayerTable | None] = {}
        self._points: dict[tuple[LayerKey, Mode], list[int]] = {}
        self._usable: list[Identity | None] = []  # by index of the file's candidates; None for one that is not used
        self._file: CalibrationFile | None = None
        try:
            self._file = self._read()
        except PolicyFileError as error:
            self._notes.append(f"refused, so the next policy decides: {error}")
            warn(f"policy {self.name!r}: {error}")
        if self._file is not None:
            self._index(self._file)

    def _read(self) -> CalibrationFile | None:
        raise NotImplementedError

    def rank(self, problem: MoEProblem) -> tuple[Choice, ...]:
        """See `Policy.rank`."""
        if self._file is None or problem.needs_grad or problem.M < 1:
            return ()
        problem = problem.whole_layer  # files hold measurements of whole layers
        key = layer_key(problem)
        if table := self._table(key, problem.mode):
            return table.choices(problem.M, problem.mode)
        other: Mode = "eager" if problem.mode == "graph" else "graph"
        if table := self._table(key, other):
            return table.choices(problem.M, f"{other}; {problem.mode} was not measured")
        return ()

    def notes(self) -> tuple[str, ...]:
        """The reason for which the file is refused, and measurements that are not used."""
        return tuple(self._notes)

    def digest(self) -> str:
        """See `Policy.digest`: a hash of the file's content."""
        return "" if self._file is None else hashlib.sha256(self._file.model_dump_json().encode()).hexdigest()[:16]

    def _table(self, key: LayerKey, mode: Mode) -> LayerTable | None:
        # Built when a layer is first ranked, so that the time to load does not grow with layers that never are.
        if (key, mode) not in self._tables:
            self._tables[key, mode] = self._build(self._points.get((key, mode), ()))
        return self._tables[key, mode]

    def _build(self, points: Iterable[int]) -> LayerTable | None:
        assert self._file is not None  # noqa: S101 - points come from the file
        scores: dict[int, dict[Identity, float | None]] = {}
        incumbents: dict[int, Identity] = {}
        for i in points:
            point = self._file.points[i]
            at = scores.setdefault(point.M, {})
            for stored in point.measurements:
                if (identity := self._usable[stored.candidate]) is not None:
                    at[identity] = stored.score
                    if stored.incumbent:
                        incumbents[point.M] = identity
        table = LayerTable(scores, incumbents)
        return table if table.tokens else None

    def _index(self, file: CalibrationFile) -> None:
        keys = [layer.key for layer in file.layers]
        for i, point in enumerate(file.points):
            self._points.setdefault((keys[point.layer], point.mode), []).append(i)
        backends: dict[str, MadeBackend] = {}
        unused: Counter[str] = Counter()
        for candidate in file.candidates:
            if candidate.backend not in backends:
                backends[candidate.backend] = make_backend(candidate.backend, self.machine)
            made = backends[candidate.backend]
            reason = self._reason_against(candidate, made.backend) if made.backend else _reason(made)
            self._usable.append(None if reason else candidate.identity)
            if reason:
                unused[f"{candidate.backend}: {reason}"] += 1
        for reason, count in unused.items():
            self._notes.append(f"{count} measured configuration{'s' if count > 1 else ''} not used: {reason}")

    def _reason_against(self, candidate: Candidate, backend: Backend) -> str:
        try:
            backend.config_type.model_validate(candidate.config)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            return f"its configuration is unknown here ({'.'.join(map(str, first['loc']))}: {first['msg']})"
        if self.retires and (changed := changes(candidate.versions, relevant_versions(backend))):
            return f"retired by {', '.join(changed)}; calibrate again"
        return ""


class CalibratedPolicy(MeasuredPolicy):
    """Ranks by what `moe-dispatch calibrate` measured on this machine."""

    name = "calibrated"

    def _read(self) -> CalibrationFile | None:
        try:
            return read_calibration(calibration_path(self.machine), self.machine)
        except FileNotFoundError:
            return None


def _reason(made: MadeBackend) -> str:
    """Why the backend cannot be made."""
    return "; ".join(made.reasons) if made.registered else "no such backend is registered here"
