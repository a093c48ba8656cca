"""The policies in their order, asked as one."""

from collections.abc import Sequence
from typing import Final

from moe_dispatch.errors import MoEDispatchError, UnknownNameError, warn
from moe_dispatch.machine import Machine
from moe_dispatch.policy import Choice, Policy
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import POLICIES

LAST_RESORT: Final = "reference"


class PolicyChain:
    """Asks each policy in turn; what an earlier one ranks stands before what a later one adds.

    A policy that cannot load or rank is passed over with a warning: a damaged file must not stop a model.

    Args:
        machine: For which the policies rank.
        names: Registered policy names, in order of precedence.

    Raises:
        UnknownNameError: A name is not registered.
    """

    def __init__(self, machine: Machine, names: Sequence[str]) -> None:
        self._policies: list[Policy] = []
        self._refusals: list[str] = []
        for name in names:
            try:
                self._policies.append(POLICIES.load(name)(machine))
            except UnknownNameError:
                raise
            except MoEDispatchError as error:
                self._refuse(name, error)

    def rank(self, problem: MoEProblem) -> tuple[Choice, ...]:
        """Every candidate once, best first, the reference last where no policy placed it."""
        ranked: dict[tuple[str, str], Choice] = {}
        for policy in self._policies:
            try:
                choices = policy.rank(problem)
            except MoEDispatchError as error:
                self._refuse(policy.name, error)
                continue
            for choice in choices:
                ranked.setdefault((choice.backend, repr(choice.config)), _named(choice, policy.name))
        if not any(choice.backend == LAST_RESORT for choice in ranked.values()):
            ranked[LAST_RESORT, ""] = Choice(LAST_RESORT, "runs anywhere", policy="last resort")
        return tuple(ranked.values())

    def notes(self) -> tuple[str, ...]:
        """What the policies have to say, refusals first."""
        return (*self._refusals, *(f"{policy.name}: {note}" for policy in self._policies for note in policy.notes()))

    def _refuse(self, name: str, error: MoEDispatchError) -> None:
        text = f"policy {name!r} is passed over: {error}"
        if text not in self._refusals:
            self._refusals.append(text)
            warn(text)


def _named(choice: Choice, policy: str) -> Choice:
    return choice if choice.policy else Choice(choice.backend, choice.reason, choice.config, choice.us, policy)
