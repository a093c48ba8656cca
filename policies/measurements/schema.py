"""The file format of a calibration, and the checks by which a damaged file is refused.

There is one file per machine fingerprint, and the shipped tables have the same format. A file holds numbers and names
only: nothing in it is ever imported or executed, and backends are looked up by name among the registered ones.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import pydantic

from moe_dispatch.activations import Activation, canonical
from moe_dispatch.errors import InvalidInputError, PolicyFileError
from moe_dispatch.machine import Machine
from moe_dispatch.problem import QUANTIZED_DTYPES, DType, Mode, MoEProblem
from moe_dispatch.stored_files import parsed, read_bytes

SCHEMA: Final = 1
# What to do about a damaged file of the cache.
_ANEW: Final = "delete it, or calibrate again"
MAX_TEXT: Final = 1000

Name = Annotated[str, pydantic.Field(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9_.\-]+$")]
Text = Annotated[str, pydantic.Field(max_length=MAX_TEXT)]
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, pydantic.Field(ge=1, lt=1 << 40)]
Index = Annotated[int, pydantic.Field(ge=0)]
Config = dict[Name, int | bool | Annotated[str, pydantic.Field(max_length=80)]]
Quartiles = tuple[Positive, Positive, Positive]
LayerKey = tuple[int, int, int, int, str, str, str, bool, bool]
PointKey = tuple[LayerKey, int, Mode]
Identity = tuple[str, tuple[tuple[str, int | str | bool], ...]]  # of a candidate: backend and sorted configuration


def identity_of(backend: str, config: pydantic.BaseModel) -> Identity:
    """The identity of a backend in a configuration, which has all of its fields.

    That of a record lacks those that the configuration has got since.
    """
    return backend, tuple(sorted(config.model_dump(mode="json").items()))


class Strict(pydantic.BaseModel):
    """Base class of everything on disk: immutable, without unknown fields, without coercion between types."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)


class LayerShape(Strict):
    """The fields of a problem that are fixed per MoE layer (see `MoEProblem.layer`); the file names the device."""

    K: Count
    N: Count
    E: Count
    topk: Count
    dtype: DType
    act_dtype: DType
    activation: Annotated[Activation, pydantic.AfterValidator(canonical)] = "silu"
    bias: bool = False
    interleaved: bool = False

    @classmethod
    def of(cls, problem: MoEProblem) -> Self:
        """The layer of a problem."""
        return cls(**{name: getattr(problem, name) for name in cls.model_fields})

    @property
    def key(self) -> LayerKey:
        """Hashable; equal to `layer_key` of every problem of this layer."""
        return layer_key(self)

    def problem(self, M: int, machine: Machine, mode: Mode = "eager") -> MoEProblem:
        """The problem of M tokens through this layer on a machine."""
        return MoEProblem(M=M, **self.model_dump(), device=machine.device, capability=machine.capability, mode=mode)

    def __str__(self) -> str:
        text = f"E={self.E} topk={self.topk} K={self.K} N={self.N} {self.dtype}"
        text += f"/{self.act_dtype}" if self.dtype in QUANTIZED_DTYPES else ""
        text += f" {self.activation}" if self.activation != "silu" else ""
        return text + " bias" * self.bias + " interleaved" * self.interleaved


def layer_key(of: LayerShape | MoEProblem) -> LayerKey:
    """The key under which measurements of a layer are looked up."""
    return of.K, of.N, of.E, of.topk, of.dtype, of.act_dtype, of.activation, of.bias, of.interleaved


class Origin(Strict):
    """When a measurement was made, and with which versions.

    Attributes:
        versions: Versions that the measurement depends on; a change of any of them retires it.
        measured: Time of the measurement, UTC, ISO 8601.
        commit: Commit of the checkout that measured; empty for an installed package.
    """

    versions: dict[Name, Text] = pydantic.Field(default_factory=dict, max_length=32)
    measured: Text = ""
    package: Text = ""
    commit: Text = ""


class Candidate(Origin):
    """A backend in one configuration, with the origin of its measurements.

    Attributes:
        config: The configuration as JSON data; empty for a backend without options.
        origin: Index into `CalibrationFile.origins`, as shipped tables hold it; read into the fields of `Origin`.
    """

    backend: Name
    config: Config = pydantic.Field(default_factory=dict, max_length=64)
    origin: Index | None = None

    @property
    def identity(self) -> Identity:
        """Backend and configuration as they are recorded, hashable."""
        return self.backend, tuple(sorted(self.config.items()))


@dataclass(frozen=True)
class Measurement:
    """One candidate, measured on one layer at one token count in one mode.

    Attributes:
        us: Per routing distribution: lower quartile, median and upper quartile, in µs.
        score: Geometric mean of the medians over the distributions, in µs. A candidate that was eliminated before the
            final has its ratio to the later winner in its last round times the winner's score, and at least the
            winner's score plus noise. None if it was disqualified.
        error: ‖out − ref‖ / ‖ref‖ against the fp32 reference, the worst over the distributions; None for a candidate
            that was eliminated before its check.
        disqualified: Why it may not win: wrong, unstable, crashed, hung or out of memory. None if it has a score.
        incumbent: Whether it won here in the calibration before, and so wins again within noise.
        joules: Energy of one call in joules, averaged over the distributions; None if it was not measured.
    """

    layer: LayerShape
    M: int
    mode: Mode
    candidate: Candidate
    us: Mapping[str, Quartiles] = field(default_factory=dict)
    score: float | None = None
    error: float | None = None
    disqualified: str | None = None
    incumbent: bool = False
    joules: float | None = None

    @property
    def point(self) -> PointKey:
        """Layer, token count and mode, hashable."""
        return self.layer.key, self.M, self.mode


class StoredMeasurement(Strict):
    """A `Measurement` as the file has it: layer, token count, mode and candidate are stored once and referred to.

    Attributes:
        candidate: Index into `CalibrationFile.candidates`.
        us: See `Measurement`, as for all that follow.
    """

    candidate: Index
    us: dict[Name, Quartiles] = pydantic.Field(default_factory=dict, max_length=16)
    score: Positive | None = None
    error: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] | None = None
    disqualified: Text | None = None
    incumbent: bool = False
    joules: Positive | None = None

    @pydantic.model_validator(mode="after")
    def _scored_or_disqualified(self) -> Self:
        if (self.score is None) == (self.disqualified is None):
            raise ValueError("a measurement has either a score or the reason of its disqualification")
        return self

    @classmethod
    def of(cls, measurement: Measurement, candidate: int) -> Self:
        """The stored form of a measurement, whose candidate has this index."""
        fields = {name: getattr(measurement, name) for name in cls.model_fields}
        return cls(**{**fields, "candidate": candidate})


class Point(Strict):
    """Everything measured for one layer, token count and mode.

    Attributes:
        layer: Index into `CalibrationFile.layers`.
    """

    layer: Index
    M: Count
    mode: Mode
    measurements: list[StoredMeasurement] = pydantic.Field(default_factory=list, max_length=10_000)


class Scores(Strict):
    """Points with nothing but scores, stored as one list per field because columns compress best.

    Attributes:
        layer: See `Point`, as for M and mode.
        candidates: Of each point, indices into `CalibrationFile.candidates`.
        scores: Their scores, see `Measurement`.
    """

    layer: list[Index] = pydantic.Field(default_factory=list, max_length=100_000)
    M: list[Count] = pydantic.Field(default_factory=list)
    mode: list[Mode] = pydantic.Field(default_factory=list)
    candidates: list[list[Index]] = pydantic.Field(default_factory=list)
    scores: list[list[Positive]] = pydantic.Field(default_factory=list)

    @pydantic.model_validator(mode="after")
    def _columns_are_of_one_length(self) -> Self:
        lengths = {name: len(column) for name, column in self}
        pairs = zip(self.candidates, self.scores, strict=False)
        if len({*lengths.values()}) > 1 or any(len(indices) != len(scores) for indices, scores in pairs):
            raise ValueError(f"the lists of scores must be of one length, and each point's two as well, got {lengths}")
        return self


class CalibrationFile(Strict):
    """A machine's measurements.

    Attributes:
        origins: What several candidates share, referred to by index.
        candidates: Backends and configurations, referred to by index.
        scores: Further points, as shipped tables hold them; read into `points`, the fastest candidate first.
    """

    schema_version: Literal[1] = SCHEMA
    machine: Annotated[Machine, pydantic.Strict(strict=False)]
    layers: list[LayerShape] = pydantic.Field(default_factory=list, max_length=10_000)
    origins: list[Origin] = pydantic.Field(default_factory=list, max_length=100_000)
    candidates: list[Candidate] = pydantic.Field(default_factory=list, max_length=100_000)
    points: list[Point] = pydantic.Field(default_factory=list, max_length=100_000)
    scores: Scores = pydantic.Field(default_factory=Scores, exclude=True)

    @pydantic.model_validator(mode="after")
    def _read_scores(self) -> Self:
        columns = dict(self.scores).values()
        for layer, M, mode, candidates, scores in zip(*columns, strict=True):
            ascending = sorted(zip(candidates, scores, strict=True), key=lambda pair: pair[1])
            stored = [StoredMeasurement(candidate=index, score=score) for index, score in ascending]
            self.points.append(Point(layer=layer, M=M, mode=mode, measurements=stored))
        for column in columns:
            column.clear()
        return self

    @pydantic.model_validator(mode="after")
    def _read_origins(self) -> Self:
        for i, candidate in enumerate(self.candidates):
            if candidate.origin is None:
                continue
            if candidate.origin >= len(self.origins):
                raise ValueError(f"a candidate refers to origin {candidate.origin}, and there are {len(self.origins)}")
            shared = {"origin": None, **dict(self.origins[candidate.origin])}
            self.candidates[i] = candidate.model_copy(update=shared)
        self.origins.clear()
        return self

    @pydantic.model_validator(mode="after")
    def _indices_refer_to_something(self) -> Self:
        layers, candidates = len(self.layers), len(self.candidates)
        for point in self.points:
            if point.layer >= layers:
                raise ValueError(f"a point refers to layer {point.layer}, and there are {layers}")
            for measurement in point.measurements:
                if measurement.candidate >= candidates:
                    raise ValueError(
                        f"a measurement refers to candidate {measurement.candidate}, and there are {candidates}"
                    )
        return self

    def measurements(self) -> Iterator[Measurement]:
        """Every measurement with its layer and candidate in place of their indices."""
        for point in self.points:
            for stored in point.measurements:
                fields = {**dict(stored), "candidate": self.candidates[stored.candidate]}
                yield Measurement(self.layers[point.layer], point.M, point.mode, **fields)


def parse_calibration(content: bytes, origin: str, anew: str = _ANEW) -> CalibrationFile:
    """Check a calibration's content.

    Args:
        content: JSON.
        origin: Where it comes from, for messages.
        anew: What to do where it is damaged, for messages.

    Raises:
        NewerFileError: It is of a later schema.
        PolicyFileError: It is damaged or of an earlier schema; the message says what is wrong where.
    """
    try:
        return parsed(CalibrationFile, content, origin, SCHEMA, anew)
    except InvalidInputError as error:
        raise PolicyFileError(f"{origin} describes no machine: {error}") from error


def read_calibration(path: Path, machine: Machine, anew: str = _ANEW) -> CalibrationFile:
    """Read a machine's calibration; ``anew`` as for `parse_calibration`.

    Raises:
        FileNotFoundError: There is no calibration.
        PolicyFileError: It is damaged, of another schema, or of another machine.
    """
    file = parse_calibration(read_bytes(path, anew), str(path), anew)
    if file.machine.fingerprint != machine.fingerprint:
        raise PolicyFileError(
            f"{path} was measured on {file.machine.name!r} ({file.machine.fingerprint}) and this is {machine.name!r} "
            f"({machine.fingerprint}); calibrate here"
        )
    return file
