"""A backend's default configuration, under the name that measurements have for it."""

from moe_dispatch.backend import Backend
from moe_dispatch.machine import Machine
from moe_dispatch.policies.measurements.table import Identity
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import make_backend


def find_backend(name: str, machine: Machine) -> Backend | None:
    """The backend of this name; None if it cannot be had here."""
    return make_backend(name, machine).backend


def default_identity(backend: Backend, problem: MoEProblem) -> Identity:
    """What it runs for a problem where no measurement says otherwise."""
    return backend.name, tuple(sorted(backend.default_config(problem).model_dump(mode="json").items()))
