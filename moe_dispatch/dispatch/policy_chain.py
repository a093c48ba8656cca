"""The policies in their order of precedence, asked as one."""

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Final

from moe_dispatch.errors import MoEDispatchError, UnknownNameError, warn
from moe_dispatch.guard import foreign_errors
from moe_dispatch.machine import Machine
from moe_dispatch.policy import Choice, Policy, UsableBackends
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import LAST_RESORT, POLICIES
from moe_dispatch.system import failures

_FIELDS: Final[Mapping[str, type | tuple[type, ...]]] = {
    "backend": str,
    "reason": str,
    "config": (dict, NoneType, Mapping),  # the usual ones first
    "us": (int, float, NoneType),
    "policy": str,
}


class PolicyChain:
    """Asks each policy in turn; what an earlier one ranks stands before what a later one adds.

    A policy that cannot load or rank is passed over with a warning, and one that ranks something else than a valid
    `Choice` from there on: neither a damaged file nor a fault in its code may stop a model.

    Args:
        machine: The machine that the policies rank for.
        names: Registered policy names, in order of precedence.
        backends: Tells the policies what can run; None where nothing is to run, and the machine's backends count.

    Raises:
        UnknownNameError: A name is not registered.
    """

    def __init__(self, machine: Machine, names: Sequence[str], backends: UsableBackends | None = None) -> None:
        self._policies: list[Policy] = []
        self._refusals: dict[tuple[str, type], str] = {}  # by policy and exception, whose text may differ each time
        for name in names:
            try:
                policy = POLICIES.load(name)(machine)
                if backends is not None:
                    policy.consult(backends)
                self._policies.append(policy)
            except UnknownNameError:
                raise
            except foreign_errors() as error:
                self._refuse(name, error)

    def rank(self, problem: MoEProblem) -> Iterator[Choice]:
        """Every candidate once, best first, the reference last where no policy placed it.

        A policy is asked when all choices of those before it are taken: most calls run the first choice of the first
        policy that knows the layer, and do not pay for the others.
        """
        ranked: dict[str, list[Choice]] = {}
        for policy in self._policies:
            try:
                for choice in policy.ranked(problem):
                    checked = _checked(choice, policy.name)
                    earlier = ranked.setdefault(checked.backend, [])
                    # As text, for 1 equals True and a configuration may tell them apart.
                    if not (earlier and any(repr(other.config) == repr(checked.config) for other in earlier)):
                        earlier.append(checked)
                        yield checked
            except foreign_errors() as error:
                self._refuse(policy.name, error)
        if LAST_RESORT not in ranked:
            yield Choice(LAST_RESORT, "runs anywhere", policy="last resort")

    def leads(self, choice: Choice, problem: MoEProblem) -> bool:
        """Whether no policy before the one that made a choice may rank calls of the problem's layer."""
        try:
            knowing = (policy.name for policy in self._policies if policy.knows(problem))
            return next(knowing, "") == choice.policy
        except foreign_errors():
            return False

    def notes(self) -> tuple[str, ...]:
        """The policies' notes, after those on policies that were passed over."""
        notes: list[str] = []
        for policy in self._policies:
            try:
                notes += [f"{policy.name}: {note}" for note in policy.notes()]
            except foreign_errors() as error:
                self._refuse(policy.name, error)
        return (*self._refusals.values(), *notes)

    def digest(self) -> str:
        """What the policies rank by, as text that is equal where their data is: each one's name and digest."""
        digests: list[str] = []
        for policy in self._policies:
            try:
                digests.append(f"{policy.name}:{policy.digest()}")
            except foreign_errors() as error:
                self._refuse(policy.name, error)
        return " ".join(digests)

    def _refuse(self, name: str, error: BaseException) -> None:
        what = str(error) if isinstance(error, MoEDispatchError) else failures.summary(error)
        text = f"policy {name!r} is passed over: {what}"
        if self._refusals.setdefault((name, type(error)), text) is text:
            warn(text)


def _checked(choice: object, policy: str) -> Choice:
    """A policy's choice with the policy's name.

    Raises:
        TypeError: It is none, or a field of it has the wrong type.
    """
    if not isinstance(choice, Choice):
        raise TypeError(f"it ranks {reprlib.repr(choice)}, which is no Choice")
    told_later = "_tell" in vars(choice)  # of a `Choice.between`, whose reason and time are not computed for a check
    for name, kinds in _FIELDS.items():
        if told_later and name in ("reason", "us"):
            continue
        value = getattr(choice, name)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise TypeError(f"it ranks a choice whose {name} is {reprlib.repr(value)}")
    for key, value in (choice.config or {}).items():
        if not isinstance(key, str) or not isinstance(value, int | str):
            raise TypeError(f"it ranks a choice whose config is {reprlib.repr(choice.config)}")
    return choice if choice.policy else Choice(choice.backend, choice.reason, choice.config, choice.us, policy)
