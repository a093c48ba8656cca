"""What each backend runs by default, and which backend of a family the rules choose."""

from collections.abc import Container

from moe_dispatch.backend import Backend
from moe_dispatch.machine import Machine
from moe_dispatch.policies.measurements.schema import Identity
from moe_dispatch.policies.rules import FAMILIES, RulesPolicy
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import MadeBackend, make_backend


def find_backend(name: str, machine: Machine) -> Backend | None:
    """The backend of this name; None if it cannot be made here."""
    return make_backend(name, machine).backend


def default_identity(backend: Backend, problem: MoEProblem) -> Identity:
    """The backend with the configuration that it runs for a problem where no measurement names another."""
    return backend.name, tuple(sorted(backend.default_config(problem).model_dump(mode="json").items()))


class MachineBackends:
    """The backends of a machine, each made on its first use and kept.

    Args:
        machine: The machine that they are made for.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine, self._rules = machine, RulesPolicy(machine)
        self._made: dict[str, MadeBackend] = {}

    def find(self, name: str) -> Backend | None:
        """The backend of this name; None if it cannot be made here."""
        return self._make(name).backend

    def family_members(self, problem: MoEProblem, families: Container[str] | None = None) -> dict[str, Backend]:
        """The backend that the rules choose of each family, among those that are here and can run the problem.

        Args:
            problem: The problem to run.
            families: Families beyond the first one that can run it; all if None.

        Returns:
            Backends by the name of their family (their own, where they have none), in the order of the rules.
        """
        members: dict[str, Backend] = {}
        for choice in self._rules.rank(problem):
            family = FAMILIES.get(choice.backend, choice.backend)
            if family in members or (members and families is not None and family not in families):
                continue
            made = self._make(choice.backend)
            if made.backend and not made.reasons and not made.backend.unsupported_reasons(problem):
                members[family] = made.backend
        return members

    def without_library(self, name: str, problem: MoEProblem) -> Backend | None:
        """A backend that could run a problem but for a library that is missing here; None for any other.

        Policies rank it, so that `explain` shows what installing the library would give.
        """
        made = self._make(name)
        if made.backend is None or not made.reasons or made.backend.unsupported_reasons(problem):
            return None
        return made.backend

    def _make(self, name: str) -> MadeBackend:
        if name not in self._made:
            self._made[name] = make_backend(name, self._machine)
        return self._made[name]
