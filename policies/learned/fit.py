"""Fits the learned model to the measurements of a sweep or of a calibration."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from moe_dispatch.errors import InvalidInputError, PolicyFileError
from moe_dispatch.machine import Machine
from moe_dispatch.policies.learned.cost_model import TERMS, rows_per_expert, terms
from moe_dispatch.policies.learned.defaults import Members, completed, default_identity
from moe_dispatch.policies.learned.policy import CostModel, ModelFile, parse_model
from moe_dispatch.policies.measurements.schema import CalibrationFile, Identity
from moe_dispatch.policies.rules import FAMILIES
from moe_dispatch.problem import DType, Mode, MoEProblem
from moe_dispatch.registry import MadeBackends
from moe_dispatch.stored_files import require_older
from moe_dispatch.system.files import locked, write_atomically

# Cost models fitted to five of the seven named layers chose for the other two at least as well as the rules do; those
# fitted to four layers chose worse.
LEAST_LAYERS: Final = 5
# A layer measured at fewer token counts does not say how the parts of the work grow.
LEAST_TOKENS: Final = 4
# Relative error whose weight is halved: one shape that a default configuration does badly must not bend the whole fit.
_ROBUST: Final = 0.05
_ROUNDS: Final = 4  # of reweighting
# Weight of squared coefficients, in units of each term's greatest share: it decides only between terms that no
# measurement tells apart.
_RIDGE: Final = 1e-6
_DIGITS: Final = 4  # significant digits in the file


@dataclass(frozen=True)
class Observation:
    """The time of a candidate on a problem, from a calibration or from benchmark rows.

    Attributes:
        problem: The problem.
        candidate: Backend and configuration.
        us: Geometric mean over the routing distributions, in µs.
        once: Whether it was measured by a single run, which showed that it is far behind.
        uniform_us: Time under uniform routing alone, in µs; None where it is `us` or was not recorded.
    """

    problem: MoEProblem
    candidate: Identity
    us: float
    once: bool = False
    uniform_us: float | None = None


def observations(file: CalibrationFile) -> list[Observation]:
    """Every measurement of a calibration that has a score."""
    return [
        Observation(
            measurement.layer.problem(measurement.M, file.machine, measurement.mode),
            measurement.candidate.identity,
            measurement.score,
            uniform_us=measurement.us["uniform"][1] if "uniform" in measurement.us else None,
        )
        for measurement in file.measurements()
        if measurement.score is not None
    ]


def fit_model(rows: Iterable[Observation], machine: Machine) -> ModelFile:
    """Fit a cost model to the default configuration of each backend, for each dtype and mode.

    Terms are those of uniform routing, and so are times where they were recorded: skewed routing reads fewer weights.

    Raises:
        InvalidInputError: In no dtype and mode enough layers were measured.
    """
    kinds: dict[tuple[DType, Mode], dict[MoEProblem, dict[Identity, float]]] = {}
    for row in rows:
        points = kinds.setdefault((row.problem.dtype, row.problem.mode), {})
        points.setdefault(row.problem, {})[completed(row.candidate)] = row.uniform_us or row.us
    cost_models = []
    for (dtype, mode), points in kinds.items():
        for name, times in sorted(_defaults(points, machine).items()):
            layers = _layers(times)
            if layers >= LEAST_LAYERS:
                coefficients, error = fit_cost_model(times)
                cost_models.append(
                    CostModel(
                        dtype=dtype,
                        mode=mode,
                        backend=name,
                        layers=layers,
                        points=len(times),
                        most_rows=_rounded(max(map(rows_per_expert, times))),
                        error=_rounded(error),
                        coefficients=dict(zip(TERMS, map(_rounded, coefficients), strict=True)),
                    )
                )
    if not cost_models:
        most = max(map(_layers, kinds.values()), default=0)
        raise InvalidInputError(
            f"a fit needs {LEAST_LAYERS} layers, each at {LEAST_TOKENS} token counts, in one dtype and mode, and the "
            f"most are {most}; measure more models with `moe-dispatch calibrate` first"
        )
    return ModelFile(fingerprint=machine.fingerprint, sms=machine.sms, cost_models=cost_models)


def fit_cost_model(times: Mapping[MoEProblem, float]) -> tuple[list[float], float]:
    """Coefficients of `cost_model.TERMS`, and the median relative error.

    Minimises relative errors, with Cauchy weights that make large ones count less.

    Args:
        times: Times of one backend in µs.
    """
    on_host: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    parts = torch.tensor([[terms(problem)[term] for term in TERMS] for problem in times], **on_host)
    shares = parts / torch.tensor(list(times.values()), **on_host)[:, None]  # [P, T], parts of the time
    units = shares.amax(0)
    shares = shares / units
    weights = shares.new_ones(len(times))
    for _ in range(_ROUNDS):
        coefficients = nonnegative_least_squares(shares * weights[:, None], weights)
        errors = (1 - shares @ coefficients).abs()
        weights = (1 + (errors / _ROBUST).square()).rsqrt()
    return (coefficients / units).tolist(), float(errors.median())


def nonnegative_least_squares(a: Tensor, b: Tensor) -> Tensor:
    """The x ≥ 0 with the least ‖a x − b‖, ``[T]``: the best solution over all sets of columns whose solution is ≥ 0.

    Args:
        a: ``[P, T]`` with few columns, since there are 2^T sets.
        b: ``[P]``.
    """
    columns = torch.arange(a.shape[1], device=a.device)
    sets = (torch.arange(1 << len(columns), device=a.device)[:, None] >> columns & 1).to(a.dtype)  # [2^T, T]
    gram, moments = a.T @ a + _RIDGE * torch.eye(len(columns), dtype=a.dtype, device=a.device), a.T @ b
    # A column outside a set becomes one of the identity, and its coefficient 0.
    within = gram * sets[:, :, None] * sets[:, None, :] + torch.diag_embed(1 - sets)
    solutions = torch.linalg.solve(within, moments * sets)
    losses = torch.einsum("si,ij,sj->s", solutions, gram, solutions) - 2 * solutions @ moments
    best: Tensor = solutions[losses.masked_fill((solutions < 0).any(1), torch.inf).argmin()]
    return best


def save_model(model: ModelFile, path: Path) -> None:
    """Write a model, whole or not at all.

    Raises:
        PolicyFileError: It cannot be written, or would replace one that a newer version wrote.
    """
    try:
        with locked(path):
            require_older(path, parse_model)
            write_atomically(path, model.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise PolicyFileError(
            f"the model cannot be written to {path} ({error.strerror or error}); make room or make it writable, or set "
            "MOE_DISPATCH_CACHE_DIR to another folder"
        ) from error


def _defaults(
    points: Mapping[MoEProblem, Mapping[Identity, float]], machine: Machine
) -> dict[str, dict[MoEProblem, float]]:
    """Times of each backend's default configuration, by backend; of a family, by the member that the rules choose."""
    defaults: dict[str, dict[MoEProblem, float]] = {}
    backends = MadeBackends(machine)
    for problem, times in points.items():
        members = Members(backends, problem)
        for name in {FAMILIES.get(backend, backend) for backend, _ in times}:
            backend = members.get(name) or backends.made(name).backend
            if backend is not None and (us := times.get(default_identity(backend, problem))) is not None:
                defaults.setdefault(name, {})[problem] = us
    return defaults


def _layers(problems: Iterable[MoEProblem]) -> int:
    """The number of layers that were measured at enough token counts."""
    return sum(count >= LEAST_TOKENS for count in Counter(problem.layer for problem in problems).values())


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
