"""Ranks by measurements: those of this machine, and as a base class those of any calibration file."""

from collections.abc import Iterator
from pathlib import Path

from moe_dispatch.errors import PolicyFileError, warn
from moe_dispatch.machine import Machine
from moe_dispatch.policies.measured_file import MeasuredFile
from moe_dispatch.policies.measurements.schema import CalibrationFile, layer_key, read_calibration
from moe_dispatch.policies.measurements.table import Table
from moe_dispatch.policy import Choice, Policy
from moe_dispatch.problem import Mode, MoEProblem
from moe_dispatch.settings import cache_dir, calibration_search_path, is_file_name


def calibration_path(machine: Machine, directory: Path | None = None) -> Path:
    """The path of a machine's own calibration file, which `moe-dispatch calibrate` writes."""
    return (directory or cache_dir()) / "calibration" / f"{machine.fingerprint}.json"


def calibration_paths(machine: Machine) -> list[Path]:
    """Every path from which a machine's calibration is read, in order of precedence.

    Its own file comes first, then the entries of ``MOE_DISPATCH_CALIBRATION_PATH``: a file, or in a folder the file
    with the machine's fingerprint as its name. Those are read and never written. None of them need exist.
    """
    shared = (
        entry if is_file_name(entry) else entry / f"{machine.fingerprint}.json" for entry in calibration_search_path()
    )
    return [calibration_path(machine), *shared]


class MeasuredPolicy(Policy):
    """Ranks by the measurements of calibration files; ranks nothing where there is none.

    A layer in a mode is ranked by the first file that has usable measurements of it. Two files are not mixed within a
    layer: times of different runs compare less well than those of one.

    Attributes:
        retires: Whether a change of a version that a measurement depends on retires it.
    """

    retires = True

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._notes: list[str] = []
        self._files: list[MeasuredFile] = []
        for file in self._read():
            measured = MeasuredFile(file, machine, retires=self.retires)
            self._files.append(measured)
            self._notes += measured.notes

    def _read(self) -> Iterator[CalibrationFile]:
        """The files in order of precedence; those that cannot be trusted go to `_refuse`."""
        raise NotImplementedError

    def _refuse(self, error: PolicyFileError) -> None:
        """Note, and warn of, a file that is not used."""
        self._notes.append(f"refused, so the next file or policy decides: {error}")
        warn(f"policy {self.name!r}: {error}")

    def rank(self, problem: MoEProblem) -> tuple[Choice, ...]:
        """See `Policy.rank`."""
        return tuple(self.ranked(problem))

    def ranked(self, problem: MoEProblem) -> Iterator[Choice]:
        """See `Policy.ranked`."""
        if problem.needs_grad or problem.M < 1 or not self._files:
            return iter(())
        problem = problem.whole_layer  # files hold measurements of whole layers
        table, how = self._table(problem)
        return iter(()) if table is None else table.choices(problem.M, how, self.name)

    def knows(self, problem: MoEProblem) -> bool:
        """See `Policy.knows`."""
        return self._table(problem.whole_layer)[0] is not None

    def _table(self, problem: MoEProblem) -> tuple[Table | None, str]:
        """The table that ranks the calls of a layer in a mode, if any, and what reasons call the mode of its times."""
        key = layer_key(problem)
        other: Mode = "eager" if problem.mode == "graph" else "graph"
        for mode, how in ((problem.mode, problem.mode), (other, f"{other}; {problem.mode} was not measured")):
            for file in self._files:
                if table := file.table(key, mode):
                    return table, how
        return None, ""

    def notes(self) -> tuple[str, ...]:
        """The reasons for which files are refused, and measurements that are not used."""
        return tuple(self._notes)

    def digest(self) -> str:
        """See `Policy.digest`: one hash of each file, in order of precedence."""
        return ",".join(file.digest() for file in self._files)


class CalibratedPolicy(MeasuredPolicy):
    """Ranks by what `moe-dispatch calibrate` measured, on this machine or on another one of the same hardware."""

    name = "calibrated"

    def _read(self) -> Iterator[CalibrationFile]:
        for path in calibration_paths(self.machine):
            try:
                yield read_calibration(path, self.machine)
            except FileNotFoundError:
                continue
            except PolicyFileError as error:
                self._refuse(error)
