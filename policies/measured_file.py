"""A calibration file as a policy reads it: which of its measurements hold here, and the tables made of those."""

import hashlib
from collections import Counter

import pydantic

from moe_dispatch.backend import Backend
from moe_dispatch.guard import foreign_errors
from moe_dispatch.machine import Machine
from moe_dispatch.policies.measurements.schema import CalibrationFile, Candidate, Identity, LayerKey, identity_of
from moe_dispatch.policies.measurements.table import EnergyTable, Table, points_of_layers, tabulated
from moe_dispatch.policies.measurements.versions import changes, relevant_versions
from moe_dispatch.problem import Mode
from moe_dispatch.registry import MadeBackend, MadeBackends
from moe_dispatch.settings import settings
from moe_dispatch.system import failures


class MeasuredFile:
    """The measurements of one file that a machine can use.

    With `retires` a change of a version that a measurement depends on retires it.

    Attributes:
        notes: Sentences about measurements that are not used.
    """

    def __init__(self, file: CalibrationFile, machine: Machine, *, retires: bool) -> None:
        self._file = file
        self._tables: dict[tuple[LayerKey, Mode], Table | None] = {}
        self._points = points_of_layers(file)
        self._usable: list[Identity | None] = []  # by index of the file's candidates; None for one that is not used
        backends = MadeBackends(machine)
        unused: Counter[str] = Counter()
        for candidate in file.candidates:
            made = backends.made(candidate.backend)
            try:
                if made.backend is None:
                    raise _UnusableError(_reason(made))
                self._usable.append(_identity(candidate, made.backend, retires=retires))
            except _UnusableError as error:
                self._usable.append(None)
                unused[f"{candidate.backend}: {error}"] += 1
        self.notes = tuple(
            f"{count} measured configuration{'s' if count > 1 else ''} not used: {reason}"
            for reason, count in unused.items()
        )

    def table(self, key: LayerKey, mode: Mode) -> Table | None:
        """The table of a layer in a mode; None if the file has nothing usable of it."""
        # Built when a layer is first ranked, so that the time to load does not grow with layers that never are.
        table_key = key, mode
        try:
            return self._tables[table_key]
        except KeyError:
            points = self._points.get(table_key, ())
            times = tabulated(points, self._usable)
            by_energy = settings().minimize == "energy"
            table = EnergyTable(times, tabulated(points, self._usable, "joules")) if by_energy else times
            return self._tables.setdefault(table_key, table if times.tokens else None)

    def digest(self) -> str:
        """A hash of the file's content."""
        return hashlib.sha256(self._file.model_dump_json().encode()).hexdigest()[:16]


class _UnusableError(Exception):
    """A candidate is not used; the message is the reason."""


def _identity(candidate: Candidate, backend: Backend, *, retires: bool) -> Identity:
    try:
        identity = identity_of(candidate.backend, backend.config_type.model_validate(candidate.config))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _UnusableError(f"its configuration is unknown here ({where}: {first['msg']})") from error
    except foreign_errors() as error:  # of a validator of its own
        raise _UnusableError(f"its configuration cannot be read here ({failures.summary(error)})") from error
    if retires and (changed := changes(candidate.versions, relevant_versions(backend))):
        raise _UnusableError(f"retired by {', '.join(changed)}; calibrate again")
    return identity


def _reason(made: MadeBackend) -> str:
    """Why the backend cannot be made."""
    return "; ".join(made.reasons) if made.registered else "no such backend is registered here"
