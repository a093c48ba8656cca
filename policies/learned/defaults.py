"""What each backend runs by default, and which backend of a family the rules choose."""

import functools
from collections.abc import Iterator

import pydantic

from moe_dispatch.backend import Backend
from moe_dispatch.errors import MoEDispatchError
from moe_dispatch.policies.measurements.schema import Identity, identity_of
from moe_dispatch.policies.rules import FAMILIES, order
from moe_dispatch.policy import UsableBackends
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import BACKENDS, LAST_RESORT


def default_identity(backend: Backend, problem: MoEProblem) -> Identity:
    """The backend with the configuration that it runs for a problem where no measurement names another."""
    return identity_of(backend.name, backend.default_config(problem))


@functools.cache
def completed(identity: Identity) -> Identity:
    """A measured candidate with the fields that its configuration has got since, at their defaults.

    One whose backend or configuration is unknown here is returned as it is.
    """
    backend, fields = identity
    try:
        config = BACKENDS.load(backend).config_type.model_validate(dict(fields))
    except (MoEDispatchError, pydantic.ValidationError):
        return identity
    return identity_of(backend, config)


class Members:
    """Families of backends by name (a backend's own, where it has none): what the rules choose of each for a problem.

    A backend is asked when its turn comes, and once. One that the rules rank behind other families (triton_vector where
    slots share weights) does not stand for its own: it would be slower than the family's cost model says.

    Args:
        backends: Tells which backends can run the problem; no other is chosen.
        problem: The problem to run.
    """

    def __init__(self, backends: UsableBackends, problem: MoEProblem) -> None:
        self._backends, self._problem = backends, problem
        self._families: dict[str, list[str]] = {}
        previous = ""
        for name in (*order(problem), LAST_RESORT):
            family = FAMILIES.get(name, name)
            if family not in self._families:
                self._families[family] = [name]
            elif family == previous:
                self._families[family].append(name)
            previous = family
        self._chosen: dict[str, Backend | None] = {}

    def __iter__(self) -> Iterator[str]:
        """The families that can run the problem, in the order of the rules."""
        return filter(self.get, self._families)

    def get(self, family: str) -> Backend | None:
        """The backend that the rules choose of a family; None if none of it can run the problem."""
        if family not in self._chosen:
            able = (self._backends.able(name, self._problem) for name in self._families.get(family, ()))
            self._chosen[family] = next(filter(None, able), None)
        return self._chosen[family]
