"""Ranks backends for shapes that were not measured, by a cost model of each backend (see `cost_model`)."""

import hashlib
import operator
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Final, Literal

import pydantic

from moe_dispatch.errors import PolicyFileError, warn
from moe_dispatch.machine import Machine
from moe_dispatch.policies.learned.cost_model import TERMS, Term, rows_per_expert, terms
from moe_dispatch.policies.learned.defaults import Members
from moe_dispatch.policies.measurements.schema import Count, Name, Positive, Strict
from moe_dispatch.policies.measurements.table import rough_us
from moe_dispatch.policies.nearest import Nearest, nearest, read_shipped
from moe_dispatch.policy import Choice, Policy, UsableBackends
from moe_dispatch.problem import DType, Mode, MoEProblem
from moe_dispatch.registry import MadeBackends
from moe_dispatch.settings import cache_dir
from moe_dispatch.stored_files import parsed, read_bytes

SCHEMA: Final = 5
# A backend that is far behind is not measured further, so its cost model does not know where it is slow. The model is
# not used beyond this factor of the rows per expert that it was fitted to.
BEYOND: Final = 2.0
NotNegative = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]


class CostModel(Strict):
    """The cost model of a backend in its default configuration, for one dtype and mode.

    Attributes:
        dtype: Dtype of the weights.
        mode: Eager calls, or replays of a CUDA graph.
        backend: Registered name; of a family (`rules.FAMILIES`) the name of the family.
        layers: Number of layers that it is fitted to.
        points: Number of measurements that it is fitted to, each of a layer at a token count.
        most_rows: Largest number of rows per expert among them.
        error: Median relative error at them.
        coefficients: How often the backend does each part of the work that `cost_model.terms` describes.
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
    def _complete(cls, coefficients: dict[Term, float]) -> dict[Term, float]:
        if missing := [term for term in TERMS if term not in coefficients]:
            raise ValueError(f"no coefficient for {', '.join(missing)}")
        return coefficients

    def us(self, parts: Mapping[Term, float]) -> float:
        """Predicted time, in µs, of a problem with these terms, which are in the order of `TERMS`."""
        us: float = sum(map(operator.mul, self.in_order, parts.values()))
        return us

    @cached_property
    def in_order(self) -> tuple[float, ...]:
        """The coefficients in the order of `TERMS`."""
        return tuple(self.coefficients[term] for term in TERMS)


class ModelFile(Strict):
    """A machine's learned model.

    Attributes:
        schema_version: Version of this format.
        fingerprint: Fingerprint of the machine that it was fitted for.
        sms: Streaming multiprocessors of that machine.
        cost_models: One for each backend, dtype and mode.
    """

    schema_version: Literal[5] = SCHEMA
    fingerprint: Annotated[str, pydantic.Field(max_length=200)]
    sms: Annotated[int, pydantic.Field(ge=1)]
    cost_models: Annotated[list[CostModel], pydantic.Field(min_length=1, max_length=1000)]


def model_path(machine: Machine) -> Path:
    """The path of a machine's model file."""
    return cache_dir() / "learned" / f"{machine.fingerprint}.json"


def parse_model(content: bytes, origin: str) -> ModelFile:
    """Check a model's content.

    Raises:
        PolicyFileError: It is damaged or of another schema.
    """
    return parsed(ModelFile, content, origin, SCHEMA, "delete it, or `moe-dispatch fit` again")


def read_shipped_model(source: Nearest) -> ModelFile:
    """The model that ships for a device.

    Raises:
        PolicyFileError: It cannot be read, is damaged or of another schema.
    """
    return parse_model(*read_shipped(source.slug, ".model.json"))


def read_model(machine: Machine) -> ModelFile | None:
    """The machine's own model; None if it has none.

    Raises:
        PolicyFileError: It is damaged, of another schema, or of another machine.
    """
    path = model_path(machine)
    try:
        file = parse_model(read_bytes(path), str(path))
    except FileNotFoundError:
        return None
    if file.fingerprint != machine.fingerprint:
        raise PolicyFileError(
            f"{path} was fitted for {file.fingerprint} and this is {machine.fingerprint}; `moe-dispatch fit` here"
        )
    return file


class LearnedPolicy(Policy):
    """Ranks by predicted time.

    Args:
        machine: The machine to rank for.
        model: Model to use in place of the machine's file.
    """

    name = "learned"

    def __init__(self, machine: Machine, model: ModelFile | None = None) -> None:
        super().__init__(machine)
        self._notes: list[str] = []
        self._source: Nearest | None = None
        if model is None:
            try:
                model = read_model(machine) or self._read_shipped()
            except PolicyFileError as error:
                self._notes.append(f"refused, so the next policy decides: {error}")
                warn(f"policy {self.name!r}: {error}")
        self._backends: UsableBackends = MadeBackends(machine)
        self._where = ""
        if self._source and self._source.slug != machine.slug:
            self._where = f" on {self._source.name}, with this device's rates"
        self._cost_models: dict[tuple[DType, Mode], dict[str, CostModel]] = {}
        for cost_model in model.cost_models if model else ():
            self._cost_models.setdefault((cost_model.dtype, cost_model.mode), {})[cost_model.backend] = cost_model

    def consult(self, backends: UsableBackends) -> None:
        """See `Policy.consult`: which member of a family runs, and which backend is fastest, depends on what can."""
        self._backends = backends

    def rank(self, problem: MoEProblem) -> tuple[Choice, ...]:
        """See `Policy.rank`. Without cost models of the problem's mode, those of the other mode rank."""
        return tuple(self.ranked(problem))

    def ranked(self, problem: MoEProblem) -> Iterator[Choice]:
        """See `Policy.ranked`."""
        other: Mode = "eager" if problem.mode == "graph" else "graph"
        own = self._cost_models.get((problem.dtype, problem.mode))
        cost_models = own or self._cost_models.get((problem.dtype, other))
        if cost_models is None or problem.needs_grad or problem.M < 1:
            return
        rows = rows_per_expert(problem)
        applicable = {name: model for name, model in cost_models.items() if rows <= BEYOND * model.most_rows}
        members = Members(self._backends, problem)
        first = next(iter(members), "")  # family of the rules' choice
        if first not in applicable:
            return
        bandwidth, rate = (self._source.bandwidth, self._source.rate) if self._source else (1.0, 1.0)
        parts = terms(problem, bandwidth, rate)
        predicted = {name: cost_model.us(parts) for name, cost_model in applicable.items()}
        by_time = sorted(predicted, key=predicted.__getitem__)
        # A backend whose library is missing is ranked for `explain`, and the lead of the others does not depend on it.
        fastest = next(name for name in by_time if members.get(name))
        # A lead within the errors of both cost models does not count.
        within = applicable[first].error + applicable[fastest].error
        leading = first if predicted[first] <= predicted[fastest] * (1 + within) else fastest
        place = by_time.index(fastest)
        by_time.remove(leading)
        by_time.insert(place, leading)
        for name in by_time:
            if backend := members.get(name) or self._backends.without_library(name, problem):
                yield self._choice(applicable[name], backend.name, problem.mode, predicted[name])

    def notes(self) -> tuple[str, ...]:
        """The reason for which the file is refused, or the device whose model serves this one."""
        return tuple(self._notes)

    def digest(self) -> str:
        """See `Policy.digest`: a hash of the cost models."""
        models = [model.model_dump_json() for by_name in self._cost_models.values() for model in by_name.values()]
        return hashlib.sha256("\n".join(models).encode()).hexdigest()[:16] if models else ""

    def _choice(self, cost_model: CostModel, backend: str, mode: Mode, us: float) -> Choice:
        kind = mode if mode == cost_model.mode else f"{cost_model.mode}; {mode} was not measured"
        fitted = f"a cost model fitted to {cost_model.layers} layers ({kind}){self._where}"
        return Choice(backend, f"about {rough_us(us)} µs by {fitted}", None, us)

    def _read_shipped(self) -> ModelFile | None:
        """The model that ships for this device or the nearest one."""
        self._source = nearest(self.machine, ".model.json")
        if self._source is None:
            return None
        model = read_shipped_model(self._source)
        if self._source.slug != self.machine.slug:
            self._notes.append(self._source.note("learned model"))
        elif model.sms != self.machine.sms:
            return None  # of another device under the same name
        return model
