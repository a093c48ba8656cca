"""Chooses for shapes that nobody measured, by what each backend's time is made of (see `cost`)."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Final, Literal

import pydantic

from moe_dispatch.backend import Backend
from moe_dispatch.errors import PolicyFileError, warn
from moe_dispatch.machine import Machine
from moe_dispatch.policies.learned.cost_model import TERMS, Term, rows_per_expert, terms
from moe_dispatch.policies.learned.defaults import find_backend
from moe_dispatch.policies.measurements.schema import MAX_FILE_BYTES, Count, Name, Positive, Strict, damage, read_bytes
from moe_dispatch.policies.rules import RulesPolicy
from moe_dispatch.policy import Choice, Policy
from moe_dispatch.problem import DType, Mode, MoEProblem
from moe_dispatch.settings import cache_dir

SCHEMA: Final = 3
# A lead of less than the laws' own errors, 2 to 4 %, is none: then the rules' choice stands. So it does where it has no
# law to compare with.
CLOSE: Final = 0.03
# A calibration does not start what is far behind, so that it has no times. With so many times more rows per expert than
# a backend was measured with, its law is not believed.
BEYOND: Final = 2.0
NotNegative = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]


class CostModel(Strict):
    """What a backend's time is made of, in its default configuration, for one dtype and mode.

    Attributes:
        dtype: Of the weights.
        mode: Eager, or in a CUDA graph.
        backend: Registered name.
        layers: How many were measured.
        points: Measurements, each of a layer at a token count.
        most_rows: Rows per expert at most, of those.
        error: Median relative error at those.
        coefficients: How often it does each part of the work that `cost.terms` describes.
    """

    dtype: DType
    mode: Mode
    backend: Name
    layers: Count
    points: Count
    most_rows: Positive
    error: NotNegative
    coefficients: dict[Term, NotNegative]

    @pydantic.field_validator("coefficients")
    @classmethod
    def _complete(cls, given: dict[Term, float]) -> dict[Term, float]:
        if missing := [term for term in TERMS if term not in given]:
            raise ValueError(f"no coefficient for {', '.join(missing)}")
        return given

    def us(self, parts: Mapping[Term, float]) -> float:
        """Time of what has these terms."""
        return sum(self.coefficients[term] * part for term, part in parts.items())


class ModelFile(Strict):
    """A machine's learned model."""

    schema_version: Literal[3] = SCHEMA
    fingerprint: Annotated[str, pydantic.Field(max_length=200)]
    sms: Annotated[int, pydantic.Field(ge=1)]
    laws: list[CostModel] = pydantic.Field(min_length=1, max_length=1000)


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
        table = resources.files("moe_dispatch.policies") / "tables" / f"{machine.slug}.model.json"
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
                warn(f"policy {self.name!r}: {error}")
        self._rules = RulesPolicy(machine)
        self._laws: dict[tuple[DType, Mode], list[tuple[CostModel, Backend]]] = {}
        for law in model.laws if model else ():
            if (backend := find_backend(law.backend, machine)) is not None:
                self._laws.setdefault((law.dtype, law.mode), []).append((law, backend))

    def rank(self, problem: MoEProblem) -> tuple[Choice, ...]:
        """See `Policy.rank`."""
        laws = self._laws.get((problem.dtype, problem.mode))
        if laws is None or problem.needs_grad or problem.M < 1:
            return ()
        parts = terms(problem)
        choices = {law.backend: _choice(law, parts) for law, backend in laws if _speaks(law, backend, problem)}
        ranked = sorted(choices.values(), key=lambda choice: choice.us or 0.0)
        stands = choices.get(self._favourite(problem))
        if stands is None:
            return ()
        if (stands.us or 0.0) <= (ranked[0].us or 0.0) * (1 + CLOSE):
            ranked.remove(stands)
            ranked.insert(0, stands)
        return tuple(ranked)

    def notes(self) -> tuple[str, ...]:
        """A refused file."""
        return tuple(self._notes)

    def _favourite(self, problem: MoEProblem) -> str:
        """The first of the rules that is there and can."""
        for choice in self._rules.rank(problem):
            backend = find_backend(choice.backend, self.machine)
            if backend and not backend.unavailable_reasons() and not backend.unsupported_reasons(problem):
                return choice.backend
        return ""


def _speaks(law: CostModel, backend: Backend, problem: MoEProblem) -> bool:
    """Whether a backend's law says anything of a problem."""
    return rows_per_expert(problem) <= BEYOND * law.most_rows and not backend.unsupported_reasons(problem)


def _choice(law: CostModel, parts: Mapping[Term, float]) -> Choice:
    us = law.us(parts)
    return Choice(law.backend, f"about {us:.3g} µs by its law, from {law.layers} layers ({law.mode})", None, us)
