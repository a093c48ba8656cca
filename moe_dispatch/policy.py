"""What a policy is: it ranks backends and gives its reasons. Whether a backend can run, the backend itself decides."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from moe_dispatch.backend import Backend
from moe_dispatch.guard import foreign_errors
from moe_dispatch.machine import Machine
from moe_dispatch.problem import MoEProblem

ConfigData = Mapping[str, int | str | bool]


@dataclass(frozen=True)
class Choice:
    """One ranked candidate.

    Attributes:
        backend: The backend's registered name.
        reason: Why it has this rank, for a person: "measured 31.2 µs at M=64, next is deep_gemm at 40.1".
        config: The backend's configuration as JSON data; None for its default.
        us: The time that the policy measured or predicts, in µs.
        policy: The name of the policy that ranked it, filled in by the dispatcher where the policy leaves it empty.
    """

    backend: str
    reason: str
    config: ConfigData | None = None
    us: float | None = field(default_factory=lambda: None)  # no attribute of the class, so that `__getattr__` is asked
    policy: str = ""

    @classmethod
    def between(
        cls,
        counts: tuple[int, int],
        M: int,
        backend: str,
        config: ConfigData | None,
        policy: str,
        tell: Callable[[int], tuple[str, float]],
    ) -> Self:
        """A policy's first choice for M tokens and for all token counts between two others.

        Args:
            counts: Two token counts; the choice comes first at every count strictly between them.
            M: The token count that is asked about.
            backend: See the attribute of this name.
            config: See the attribute of this name.
            policy: See the attribute of this name.
            tell: Gives the reason and the time for a token count. It is called when one of them is first read, which is
                never where only the choice is needed. Where it raises, the reason is its error.
        """
        choice = object.__new__(cls)
        vars(choice).update(backend=backend, config=config, policy=policy, _counts=counts, _M=M, _tell=tell)
        return choice

    def also_at(self, M: int) -> Self | None:
        """The same choice for another token count, where it was made by `between` and comes first there as well."""
        values = vars(self)
        lower, upper = values.get("_counts", (M, M))
        if not lower < M < upper:
            return None
        other = object.__new__(type(self))
        vars(other).update(values, config=values["config"] and dict(values["config"]), _M=M)
        vars(other).pop("reason", None)
        vars(other).pop("us", None)
        return other

    if not TYPE_CHECKING:  # a type checker would accept any attribute name

        def __getattr__(self, name: str) -> object:
            values = vars(self)
            if name not in ("reason", "us") or "_tell" not in values:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            try:
                values["reason"], values["us"] = values["_tell"](values["_M"])
            except foreign_errors() as error:  # a reason must not end the call that it explains
                values["reason"], values["us"] = f"no reason: {type(error).__name__}: {error}"[:300], None
            return values[name]


class UsableBackends(Protocol):
    """Knows which backends a machine has, and which of them the dispatcher would let run a problem."""

    def able(self, name: str, problem: MoEProblem) -> Backend | None:
        """The backend of this name; None where anything is known against giving it the problem."""

    def without_library(self, name: str, problem: MoEProblem) -> Backend | None:
        """A backend that could run the problem but for a library that is missing here; None for any other."""


class Policy(ABC):
    """Ranks backends for a problem.

    Pure: the same problem, machine and usable backends (`consult`) give the same ranking.
    """

    name: ClassVar[str]

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def consult(self, backends: UsableBackends) -> None:  # noqa: B027 - optional, and most policies need none
        """Take from `backends` what can run here, where a ranking depends on it. Called before the first ranking."""

    @abstractmethod
    def rank(self, problem: MoEProblem) -> tuple[Choice, ...]:
        """Candidates, best first; empty where this policy knows nothing of the problem and the next one decides."""

    def ranked(self, problem: MoEProblem) -> Iterator[Choice]:
        """`rank` one choice at a time: a policy that overrides this does not make choices that are never looked at."""
        yield from self.rank(problem)

    def knows(self, problem: MoEProblem) -> bool:  # noqa: ARG002
        """Whether this policy may rank calls of the problem's layer in its mode at some token count."""
        return True

    def notes(self) -> tuple[str, ...]:
        """What a person should know about this policy on this machine: retired measurements, a refused file."""
        return ()

    def digest(self) -> str:
        """A hash of the data that the ranking depends on beside problem and machine; empty where there is none.

        The ranks of an expert-parallel group compare it: with equal data they make equal choices.
        """
        return ""
