"""Fits the learned model to measurements: those of a sweep or of a calibration."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moe_dispatch.errors import BackendUnavailableError, InvalidInputError, PolicyFileError, UnknownNameError
from moe_dispatch.machine import Machine
from moe_dispatch.problem import Mode, MoEProblem
from moe_dispatch.registry import BACKENDS
from moe_dispatch.storage import locked, write_atomically

from .learned import LearnedCandidate, LearnedGroup, LearnedPoint, ModelFile
from .neighbours import Point, features, floor_us
from .scales import LeaveOneOut, fit_scales
from .schema import CalibrationFile
from .table import Identity

LEAST_POINTS: Final = 4
_DIGITS: Final = 4

# A backend and configuration, or with None a backend's default.
Role = tuple[str, tuple[tuple[str, int | str | bool], ...] | None]


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
    """Choose the kernel for each dtype and mode, and keep the points.

    Raises:
        InvalidInputError: No dtype and mode has `LEAST_POINTS` points of measurements.
    """
    times: dict[tuple[str, Mode], dict[MoEProblem, dict[Identity, float]]] = {}
    for row in rows:
        times.setdefault((row.problem.dtype, row.problem.mode), {}).setdefault(row.problem, {})[row.candidate] = row.us
    enough = {key: at for key, at in times.items() if len(at) >= LEAST_POINTS}
    if not enough:
        most = max(map(len, times.values()), default=0)
        raise InvalidInputError(
            f"a fit needs {LEAST_POINTS} points (layer and token count) of one dtype and mode, and the most is {most}; "
            "measure with `moe-dispatch calibrate` or `moe-dispatch bench` first"
        )
    roles: dict[Role, int] = {}
    groups = [_group(at, roles, machine) for at in enough.values()]
    candidates = [
        LearnedCandidate(backend=backend, config=None if config is None else dict(config)) for backend, config in roles
    ]
    return ModelFile(fingerprint=machine.fingerprint, sms=machine.sms, candidates=candidates, groups=groups)


def save_model(model: ModelFile, path: Path) -> None:
    """Write a model, whole or not at all.

    Raises:
        PolicyFileError: It cannot be written.
    """
    try:
        with locked(path):
            write_atomically(path, model.model_dump_json(exclude_none=False))
    except OSError as error:
        raise PolicyFileError(
            f"the model cannot be written to {path} ({error.strerror or error}); make room or make it writable, or set "
            "MOE_DISPATCH_CACHE_DIR to another folder"
        ) from error


def _group(at: Mapping[MoEProblem, Mapping[Identity, float]], roles: dict[Role, int], machine: Machine) -> LearnedGroup:
    by_layer: dict[Hashable, list[Point[int]]] = {}
    for problem, times in at.items():
        by_layer.setdefault(problem.layer, []).append(_point(problem, times, roles, machine))
    scales = fit_scales(by_layer)
    lost: list[float] = LeaveOneOut(by_layer).regrets(scales).tolist() if len(by_layer) > 1 else []
    points = [point for held in by_layer.values() for point in held]
    some = next(iter(at))
    return LearnedGroup(
        dtype=some.dtype,
        mode=some.mode,
        layers=len(by_layer),
        scales=[None if math.isinf(scale) else scale for scale in scales],
        regret=(math.fsum(lost) / len(lost), max(lost)) if lost else None,
        points=[LearnedPoint(x=list(point.x), best=point.best, lags=list(point.lags.items())) for point in points],
    )


def _point(
    problem: MoEProblem, times: Mapping[Identity, float], roles: dict[Role, int], machine: Machine
) -> Point[int]:
    least = min(times.values())
    lags: dict[int, float] = {}
    known: list[tuple[Role, float]] = [*times.items(), *_defaults(problem, times, machine)]
    for role, us in known:
        lags[roles.setdefault(role, len(roles))] = round(math.log(us / least), _DIGITS)
    x = tuple(round(value, _DIGITS) for value in features(problem))
    return Point(x, round(math.log(least / floor_us(problem)), _DIGITS), lags)


def _defaults(problem: MoEProblem, times: Mapping[Identity, float], machine: Machine) -> Sequence[tuple[Role, float]]:
    """Each backend's default where it was measured, under the name of being that."""
    found: list[tuple[Role, float]] = []
    for name in dict.fromkeys(backend for backend, _ in times):
        try:
            backend = BACKENDS.load(name)(machine)
        except (UnknownNameError, BackendUnavailableError):
            continue
        default = backend.default_config(problem).model_dump(mode="json")
        if (us := times.get((name, tuple(sorted(default.items()))))) is not None:
            found.append(((name, None), us))
    return found
