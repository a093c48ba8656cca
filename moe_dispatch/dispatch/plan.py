"""The plan for one kind of call: which backend runs it, and how."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moe_dispatch.backend import Backend, BackendConfig
from moe_dispatch.policy import Choice
from moe_dispatch.problem import MoEProblem


@dataclass(slots=True, eq=False)
class Plan:
    """What runs for one kind of call.

    Attributes:
        choice: The choice that it comes from, with its reason.
        remedy: How to have another backend in its place, where the caller or the environment named this one; no other
            one runs then. Empty where a policy chose.
        into: Whether the calls bring the memory for their output.
        run: The backend's bound `run` (`run_into` if `into`), or what its fast path gave in its place.
        widens: Whether topk_weights come in half precision and are converted to fp32 first.
        proven: Whether it has run such a problem to its end in this process.
        kept: Whether later calls of the kind use it; the fallback during a capture is planned anew.
        halved: Whether memory lacks for such calls, and each is computed in two halves in place of a run.
        count: Told of every run, where another choice is left out because of memory (`fitting.py`).
        calls: How often it ran.
        lock: Held while `calls` is counted.
    """

    problem: MoEProblem
    backend: Backend
    config: BackendConfig
    choice: Choice
    remedy: str
    into: bool = False
    run: Callable[..., Tensor] = field(init=False)
    widens: bool = False
    proven: bool = False
    kept: bool = False
    halved: bool = False
    count: Callable[[], None] | None = None
    calls: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.run = self.backend.run_into if self.into else self.backend.run

    def count_by(self, count: Callable[[], None]) -> None:
        """Have every run counted."""
        self.count = count
        self.use(self.run)

    def use(self, run: Callable[..., Tensor]) -> None:
        """Have calls run by `run`."""
        count = self.count

        def counted(*call: Any) -> Tensor:
            count()  # type: ignore[misc]  # it is only used where there is one
            return run(*call)

        self.run = run if count is None else counted

    @property
    def explicit(self) -> bool:
        """Whether the backend was named, so that no other one runs in its place."""
        return bool(self.remedy)

    @property
    def proof(self) -> "Proof":
        """What a first run proves: this backend in this configuration, at about this many tokens."""
        return self.choice.backend, self.config, self.problem.eager_bucket, self.into


Proof = tuple[str, BackendConfig, MoEProblem, bool]
