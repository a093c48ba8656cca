"""Chooses for shapes that nobody measured, by what did well on those that are like them (see `neighbours`)."""

import math
import warnings
from importlib import resources
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import pydantic

from moe_dispatch.errors import BackendUnavailableError, MoEDispatchWarning, PolicyFileError, UnknownNameError
from moe_dispatch.machine import Machine
from moe_dispatch.policy import Choice, Policy
from moe_dispatch.problem import DType, Mode, MoEProblem
from moe_dispatch.registry import BACKENDS
from moe_dispatch.storage import cache_dir

from .neighbours import FEATURES, Point, expected_lags, features, floor_us
from .schema import MAX_FILE_BYTES, Config, Index, Name, Strict, damage, read_bytes

SCHEMA: Final = 2
# Of each backend so many of its best are ranked: the first may not be offered for this shape.
EACH: Final = 3
Finite = Annotated[float, pydantic.Field(allow_inf_nan=False)]
Lag = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
# Infinite where a feature does not count, which JSON has no number for.
Scale = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)] | None


class LearnedCandidate(Strict):
    """A backend with a configuration, or with whatever is its default for the shape that is asked about.

    Attributes:
        backend: Registered name.
        config: Its configuration; None for the default.
    """

    backend: Name
    config: Config | None = None


class LearnedPoint(Strict):
    """A measured layer at a token count; see `neighbours.Point`.

    Attributes:
        x: Features.
        best: log(least time / floor).
        lags: Pairs of a candidate's index and log(its time / least time).
    """

    x: Annotated[list[Finite], pydantic.Field(min_length=len(FEATURES), max_length=len(FEATURES))]
    best: Finite
    lags: list[tuple[Index, Lag]] = pydantic.Field(max_length=10_000)


class LearnedGroup(Strict):
    """What is known for one dtype and mode.

    Attributes:
        dtype: Of the weights.
        mode: Eager, or in a CUDA graph.
        layers: How many were measured.
        scales: Of the kernel, one for each of `neighbours.FEATURES`.
        regret: Mean and worst of the choices that each layer got from the others; None with fewer than two.
        points: The measurements.
    """

    dtype: DType
    mode: Mode
    layers: Annotated[int, pydantic.Field(ge=1)]
    scales: Annotated[list[Scale], pydantic.Field(min_length=len(FEATURES), max_length=len(FEATURES))]
    regret: tuple[Lag, Lag] | None = None
    points: list[LearnedPoint] = pydantic.Field(min_length=1, max_length=100_000)


class ModelFile(Strict):
    """A machine's learned model."""

    schema_version: Literal[2] = SCHEMA
    fingerprint: Annotated[str, pydantic.Field(max_length=200)]
    sms: Annotated[int, pydantic.Field(ge=1)]
    candidates: list[LearnedCandidate] = pydantic.Field(max_length=100_000)
    groups: list[LearnedGroup] = pydantic.Field(max_length=100)

    @pydantic.model_validator(mode="after")
    def _indices_refer_to_something(self) -> Self:
        for group in self.groups:
            for point in group.points:
                if any(index >= len(self.candidates) for index, _ in point.lags):
                    raise ValueError(f"a point refers to a candidate beyond the {len(self.candidates)} there are")
        return self


def model_path(machine: Machine, directory: Path | None = None) -> Path:
    """Where a machine's model lies."""
    return (directory or cache_dir()) / "learned" / f"{machine.fingerprint}.json"


def parse_model(content: bytes, origin: str) -> ModelFile:
    """Check a model's content.

    Raises:
        PolicyFileError: It is damaged or of another schema.
    """
    try:
        return ModelFile.model_validate_json(content)
    except pydantic.ValidationError as error:
        raise PolicyFileError(f"{origin} {damage(error, SCHEMA)}; delete it, or `moe-dispatch fit` again") from error


def read_model(machine: Machine) -> ModelFile | None:
    """The machine's own model, else the one that ships for its device, else None.

    Raises:
        PolicyFileError: It is damaged, of another schema, or of another machine.
    """
    path = model_path(machine)
    try:
        file = parse_model(read_bytes(path), str(path))
    except FileNotFoundError:
        table = resources.files(__package__) / "tables" / f"{machine.slug}.model.json"
        if not table.is_file():
            return None
        content = table.read_bytes()
        if len(content) > MAX_FILE_BYTES:
            raise PolicyFileError(
                f"{table} is larger than {MAX_FILE_BYTES:,} bytes; install the package again"
            ) from None
        file = parse_model(content, str(table))
        return file if file.sms == machine.sms else None
    if file.fingerprint != machine.fingerprint:
        raise PolicyFileError(
            f"{path} was fitted for {file.fingerprint} and this is {machine.fingerprint}; `moe-dispatch fit` here"
        )
    return file


class LearnedPolicy(Policy):
    """Ranks by expected lag.

    Args:
        machine: Where.
        model: In place of the file's.
    """

    name = "learned"

    def __init__(self, machine: Machine, model: ModelFile | None = None) -> None:
        super().__init__(machine)
        self._notes: list[str] = []
        if model is None:
            try:
                model = read_model(machine)
            except PolicyFileError as error:
                self._notes.append(f"refused, so the next policy decides: {error}")
                warnings.warn(f"policy {self.name!r}: {error}", MoEDispatchWarning, stacklevel=2)
        self._candidates = model.candidates if model else []
        self._groups: dict[tuple[str, str], LearnedGroup] = {}
        self._points: dict[tuple[str, str], list[Point[int]]] = {}
        for group in model.groups if model else ():
            self._groups[group.dtype, group.mode] = group

    def rank(self, problem: MoEProblem) -> tuple[Choice, ...]:
        """See `Policy.rank`."""
        if problem.needs_grad or problem.M < 1:
            return ()
        other = "eager" if problem.mode == "graph" else "graph"
        found = self._groups.get((problem.dtype, problem.mode)) or self._groups.get((problem.dtype, other))
        if found is None:
            return ()
        scales = [float("inf") if scale is None else scale for scale in found.scales]
        best, lags = expected_lags(self._points_of(found), features(problem), scales)
        unit = floor_us(problem)
        choices: dict[str, list[Choice]] = {}
        offered: dict[str, frozenset[object] | None] = {}
        for index in sorted(lags, key=lambda one: lags[one]):
            candidate = self._candidates[index]
            name = candidate.backend
            if len(choices.setdefault(name, [])) == EACH:
                continue
            if name not in offered:
                offered[name] = _offered(name, problem, self.machine)
            if candidate.config is not None and (here := offered[name]) is not None and _frozen(candidate) not in here:
                continue
            us = unit * math.exp(best + lags[index])
            behind = f"{math.expm1(lags[index]):.0%}".replace("%", " %")
            reason = f"about {us:.3g} µs, {behind} behind the best on like ones of {found.layers} layers ({found.mode})"
            config = None if candidate.config is None else dict(candidate.config)
            choices[name].append(Choice(name, reason, config, us))
        return tuple(sorted((one for mine in choices.values() for one in mine), key=lambda one: one.us or 0.0))

    def notes(self) -> tuple[str, ...]:
        """A refused file."""
        return tuple(self._notes)

    def _points_of(self, group: LearnedGroup) -> list[Point[int]]:
        key = group.dtype, group.mode
        if key not in self._points:
            self._points[key] = [Point(tuple(point.x), point.best, dict(point.lags)) for point in group.points]
        return self._points[key]


def _frozen(candidate: LearnedCandidate) -> tuple[tuple[str, int | str | bool], ...]:
    return tuple(sorted((candidate.config or {}).items()))


def _offered(name: str, problem: MoEProblem, machine: Machine) -> frozenset[object] | None:
    """The configurations that a backend offers for a problem; None if it cannot be asked."""
    try:
        backend = BACKENDS.load(name)(machine)
    except (UnknownNameError, BackendUnavailableError):
        return None
    if backend.unsupported_reasons(problem):
        return None
    return frozenset(tuple(sorted(config.model_dump(mode="json").items())) for config in backend.configs(problem))
