"""Predicts what nobody measured, from what was."""

import warnings
from importlib import resources
from pathlib import Path
from typing import Annotated, Final, Literal

import pydantic

from moe_dispatch.errors import MoEDispatchWarning, PolicyFileError
from moe_dispatch.machine import Machine
from moe_dispatch.policy import Choice, Policy
from moe_dispatch.problem import DType, Mode, MoEProblem
from moe_dispatch.storage import cache_dir

from .cost_model import TERMS, features, predict
from .schema import MAX_FILE_BYTES, Config, Name, Positive, Strict, damage, read_bytes

SCHEMA: Final = 1
Coefficient = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]


class CostModel(Strict):
    """One candidate's fitted coefficients.

    Attributes:
        backend: Registered name.
        config: Its configuration.
        dtype: Of the weights it was fitted on.
        mode: It was fitted on.
        coefficients: One for each of `cost_model.TERMS`.
        rows: Measurements behind it.
        error: Mean relative error on them.
        largest_m: Greatest token count among them.
    """

    backend: Name
    config: Config = pydantic.Field(default_factory=dict, max_length=64)
    dtype: DType
    mode: Mode
    coefficients: Annotated[list[Coefficient], pydantic.Field(min_length=len(TERMS), max_length=len(TERMS))]
    rows: Annotated[int, pydantic.Field(ge=1)]
    error: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
    largest_m: Positive


class ModelFile(Strict):
    """A machine's learned model."""

    schema_version: Literal[1] = SCHEMA
    fingerprint: Annotated[str, pydantic.Field(max_length=200)]
    sms: Annotated[int, pydantic.Field(ge=1)]
    models: list[CostModel] = pydantic.Field(max_length=100_000)


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
    """Ranks by predicted time.

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
        self._models: dict[tuple[str, str], list[CostModel]] = {}
        for one in model.models if model else ():
            self._models.setdefault((one.dtype, one.mode), []).append(one)

    def rank(self, problem: MoEProblem) -> tuple[Choice, ...]:
        """See `Policy.rank`."""
        if problem.needs_grad or problem.M < 1:
            return ()
        other = "eager" if problem.mode == "graph" else "graph"
        models = self._models.get((problem.dtype, problem.mode)) or self._models.get((problem.dtype, other), [])
        timed = sorted(
            ((predict(one.coefficients, features(problem, one.config, self.machine.sms)), one) for one in models),
            key=lambda pair: pair[0],
        )
        best: dict[str, Choice] = {}
        for us, one in timed:
            if us > 0 and one.backend not in best:
                reason = f"predicted {us:.1f} µs from {one.rows} measurements ({one.mode}, ±{one.error:.0%})"
                best[one.backend] = Choice(one.backend, reason.replace("%", " %"), dict(one.config), us)
        return tuple(best.values())

    def notes(self) -> tuple[str, ...]:
        """A refused file."""
        return tuple(self._notes)
