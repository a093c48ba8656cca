"""A backend's default configuration, in the form in which measurements name candidates."""

from moe_dispatch.backend import Backend
from moe_dispatch.machine import Machine
from moe_dispatch.policies.measurements.schema import Identity
from moe_dispatch.policies.rules import FAMILIES, RulesPolicy
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import make_backend


def find_backend(name: str, machine: Machine) -> Backend | None:
    """The backend of this name; None if it cannot be made here."""
    return make_backend(name, machine).backend


def default_identity(backend: Backend, problem: MoEProblem) -> Identity:
    """The backend with the configuration that it runs for a problem where no measurement names another."""
    return backend.name, tuple(sorted(backend.default_config(problem).model_dump(mode="json").items()))


def family_members(problem: MoEProblem, machine: Machine) -> dict[str, Backend]:
    """The backend that the rules choose of each family, among those that are here and can run the problem.

    Returns:
        Backends by the name of their family (their own, where they have none), in the order of the rules.
    """
    members: dict[str, Backend] = {}
    for choice in RulesPolicy(machine).rank(problem):
        family = FAMILIES.get(choice.backend, choice.backend)
        backend = None if family in members else find_backend(choice.backend, machine)
        if backend and not backend.unavailable_reasons() and not backend.unsupported_reasons(problem):
            members[family] = backend
    return members
