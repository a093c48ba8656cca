"""Fits the learned model to measurements: those of a sweep or of a calibration."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moe_dispatch.errors import InvalidInputError, PolicyFileError
from moe_dispatch.machine import Machine
from moe_dispatch.problem import Mode, MoEProblem
from moe_dispatch.storage import locked, write_atomically

from .cost_model import features, fit, predict
from .learned import CostModel, ModelFile, model_path
from .schema import CalibrationFile
from .table import Identity

LEAST_ROWS: Final = 4


@dataclass(frozen=True)
class Observation:
    """A measured time.

    Attributes:
        problem: What ran.
        candidate: Backend and configuration.
        us: Geometric mean over the routing distributions, in µs.
    """

    problem: MoEProblem
    candidate: Identity
    us: float


def observations(file: CalibrationFile) -> list[Observation]:
    """Every scored measurement of a calibration."""
    return [
        Observation(
            file.layers[point.layer].problem(point.M, file.machine, point.mode),
            file.candidates[one.candidate].identity,
            one.score,
        )
        for point in file.points
        for one in point.measurements
        if one.score is not None
    ]


def fit_model(rows: Iterable[Observation], machine: Machine) -> ModelFile:
    """Fit one cost model per backend, configuration, dtype and mode.

    Raises:
        InvalidInputError: No candidate has `LEAST_ROWS` measurements.
    """
    groups: dict[tuple[Identity, str, Mode], list[Observation]] = {}
    for row in rows:
        groups.setdefault((row.candidate, row.problem.dtype, row.problem.mode), []).append(row)
    models = [_fit_one(held, machine) for held in groups.values() if len(held) >= LEAST_ROWS]
    if not models:
        most = max(map(len, groups.values()), default=0)
        raise InvalidInputError(
            f"a fit needs {LEAST_ROWS} measurements of one candidate, dtype and mode, and the most is {most}; "
            "measure with `moe-dispatch calibrate` or `moe-dispatch bench` first"
        )
    return ModelFile(fingerprint=machine.fingerprint, sms=machine.sms, models=models)


def save_model(model: ModelFile, machine: Machine, directory: Path | None = None) -> Path:
    """Write the machine's model, whole or not at all.

    Raises:
        PolicyFileError: It cannot be written.
    """
    path = model_path(machine, directory)
    try:
        with locked(path):
            write_atomically(path, model.model_dump_json())
    except OSError as error:
        raise PolicyFileError(
            f"the model cannot be written to {path} ({error.strerror or error}); make room or make it writable, or set "
            "MOE_DISPATCH_CACHE_DIR to another folder"
        ) from error
    return path


def _fit_one(rows: Sequence[Observation], machine: Machine) -> CostModel:
    backend, config = rows[0].candidate
    options = dict(config)
    values = [(features(row.problem, options, machine.sms), row.us) for row in rows]
    coefficients = fit(values)
    errors = [abs(predict(coefficients, one) / us - 1) for one, us in values]
    return CostModel(
        backend=backend,
        config=options,
        dtype=rows[0].problem.dtype,
        mode=rows[0].problem.mode,
        coefficients=list(coefficients),
        rows=len(rows),
        error=sum(errors) / len(errors),
        largest_m=float(max(row.problem.M for row in rows)),
    )
