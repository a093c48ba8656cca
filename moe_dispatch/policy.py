"""What a policy is: it ranks backends and gives its reasons. Whether a backend can run, the backend itself decides."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

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
        policy: The name of the policy that ranked it; the dispatcher fills it in.
    """

    backend: str
    reason: str
    config: ConfigData | None = None
    us: float | None = None
    policy: str = ""


class Policy(ABC):
    """Ranks backends for a problem. Pure: the same problem on the same machine gives the same ranking."""

    name: ClassVar[str]

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    @abstractmethod
    def rank(self, problem: MoEProblem) -> tuple[Choice, ...]:
        """Candidates, best first; empty where this policy knows nothing of the problem and the next one decides."""

    def ranked(self, problem: MoEProblem) -> Iterator[Choice]:
        """`rank` one choice at a time: a policy that overrides this does not make choices that are never looked at."""
        yield from self.rank(problem)

    def notes(self) -> tuple[str, ...]:
        """What a person should know about this policy on this machine: retired measurements, a refused file."""
        return ()

    def digest(self) -> str:
        """A hash of the data that the ranking depends on beside problem and machine; empty where there is none.

        The ranks of an expert-parallel group compare it: with equal data they make equal choices.
        """
        return ""
