"""What is decided for an engine's expert layers, and what is said about it."""

import logging
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from moe_dispatch.api import explain
from moe_dispatch.machine import Machine
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import LAST_RESORT


class Batches(NamedTuple):
    """The token counts of an engine's batches.

    Attributes:
        captured: Those that it is going to capture, ascending.
        most_tokens: The largest that it schedules.
    """

    captured: tuple[int, ...] = ()
    most_tokens: int = 0


@dataclass
class Takeover:
    """What has been decided for the layers of this process's engines, and the log line that says it.

    Attributes:
        taken: Description of a layer -> how many are ours.
        left: Reason -> how many layers stay the engine's.
        batches: Of the engine whose model was loaded last; a process may start several.
        warmed: Kinds of layers, with the batches of their engine, that `engine_warm_up.prepare` has warmed up for.
        warming: Held while it does.
    """

    engine: str
    taken: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    batches: Batches = field(default_factory=Batches)
    warmed: set[tuple[object, ...]] = field(default_factory=set)
    warming: threading.Lock = field(default_factory=threading.Lock)
    _told: tuple[int, int] = (0, 0)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def remember_engine(self, captured: Iterable[int], most_tokens: int) -> None:
        """Keep the token counts that the engine is going to capture, and the largest batch that it schedules."""
        self.batches = Batches(tuple(sorted(captured)), most_tokens)

    def take(self, description: str) -> None:
        """Count a layer as ours."""
        with self._lock:
            self.taken[description] += 1

    def leave(self, reasons: list[str]) -> None:
        """Count a layer as the engine's own. A model of which no layer is ours has no later moment to say so."""
        with self._lock:
            self.left["; ".join(reasons)] += 1
        if not self.taken and self.left.total() == 1:
            self.tell()

    def tell(self) -> None:
        """Log one line on all layers so far, unless nothing has changed since the last one."""
        with self._lock:
            counts = self.taken.total(), self.left.total()
            if counts == self._told:
                return
            self._told = counts
        ours = ", ".join(f"{count} × {what}" for what, count in self.taken.items()) or "no expert layer"
        theirs = ", ".join(f"{count} ({why})" for why, count in self.left.items()) or "none"
        self.logger.info("moe_dispatch runs %s; left to %s: %s", ours, self.engine, theirs)

    @property
    def logger(self) -> logging.Logger:
        """A logger below the engine's, so that its level and format apply: it shows nothing of others' INFO."""
        return logging.getLogger(f"{self.engine.lower()}.moe_dispatch")


def kernel_reasons(problem: MoEProblem, machine: Machine | None = None) -> list[str]:
    """Why a layer would run as the reference's loop over experts, which is slower than an engine's kernels on any GPU.

    Args:
        problem: A call of the layer.
        machine: See `explain`.

    Returns:
        One reason, which names what speaks against each backend; none if a faster backend would run.
    """
    explanation = explain(problem, machine=machine)
    if explanation.chosen is not None and explanation.chosen.choice.backend != LAST_RESORT:
        return []
    against = (f"{each.choice.backend} {', '.join(each.against)}" for each in explanation.candidates if each.against)
    return [f"no backend but {LAST_RESORT} runs it on this GPU ({'; '.join(against)})"]
