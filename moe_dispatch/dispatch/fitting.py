"""Which choices memory suffices for: by what they would take (`workspace.excess`), and by what ran out in a run.

A choice that ran out of memory is left out of its layer's calls from then on, from the power of two of its token count
up, and so is whatever takes as much workspace there; a backend whose probe did, out of all of the layer's calls. Calls
for which nothing but the reference is left are computed in halves, where something else may run those. After so many
such calls (`waiting.py`) all of that is tried again, for memory may be free by then.

Calls are counted, each half as one, and no clock is read: ranks that fail alike try again alike. Only calls that do
without something are counted; all others pay nothing.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from moe_dispatch.backend import Backend, BackendConfig
from moe_dispatch.dispatch.backend_pool import BackendPool
from moe_dispatch.dispatch.plan import Plan
from moe_dispatch.dispatch.waiting import Waiting
from moe_dispatch.errors import warn
from moe_dispatch.policy import Choice
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import LAST_RESORT
from moe_dispatch.workspace import excess, gibibytes

MOST_KINDS: Final = 4096  # Bound on what is remembered of either kind; when full, all of it is forgotten.
# Up to this power of two of tokens it is found out at once where a configuration takes too much memory.
LARGEST_BUCKET: Final = 20
IN_HALVES: Final = "memory lacks for all of the call at once, so that it is computed in halves"


@dataclass(slots=True, eq=False)
class Shortage(Waiting):
    """That a choice ran out of memory.

    Attributes:
        layer: The layer (`MoEProblem.layer`).
        tokens: The smallest token count at which it did since it was last tried.
        backend: The backend's name.
        config: Its configuration; None for all of them, where its probe ran out of memory.
        cause: What it raised, one line.
        workspace: The bytes that it takes there: a call that can be split does without what takes as many.
    """

    layer: MoEProblem
    tokens: int
    backend: str
    config: BackendConfig | None
    cause: str
    workspace: float

    @property
    def least_tokens(self) -> int:
        """The least token count of the calls that do without."""
        return (1 << _bucket(self.tokens) >> 1) + 1

    def concerns(self, problem: MoEProblem) -> bool:
        """Whether a call is of the layer, and of as many tokens."""
        return self.least_tokens <= problem.M and problem.layer == self.layer

    def covers(self, backend: Backend, config: BackendConfig) -> bool:
        """Whether a choice is the one that ran out of memory, or takes as much."""
        if backend.name == self.backend and self.config in (None, config):
            return True
        taken = backend.workspace_bytes(self.layer.with_tokens(self.tokens), config)
        return backend.name != LAST_RESORT and taken >= self.workspace

    def reason(self, backend: Backend, config: BackendConfig) -> str:
        """Why a choice that is covered is left out."""
        what = "ran out of memory" if self.config is not None else "ran out of memory in its probe"
        if backend.name != self.backend or self.config not in (None, config):
            whose = "another of its configurations" if backend.name == self.backend else repr(self.backend)
            what = f"takes as much workspace as {whose} ({gibibytes(self.workspace)}), which {what}"
        return (
            f"{what} at M={self.tokens} ({self.cause}); calls of at least {self.least_tokens} tokens do without, and "
            f"try it again after {self.left} of them, or in a new process"
        )


class Fitting:
    """Answers by backend name, layer and configuration, for all token counts at once.

    Attributes:
        shortages: What ran out of memory, also if it may be tried again.
        changed: Told of a shortage that began, grew or ended, so that plans which were made before are dropped.
    """

    def __init__(self, pool: BackendPool) -> None:
        self._pool = pool
        # By backend, layer (which is kept, so that its id is) and configuration.
        self._known: dict[tuple[object, ...], tuple[MoEProblem, int]] = {}
        self.shortages: dict[tuple[str, MoEProblem, BackendConfig | None], Shortage] = {}
        self._told: dict[tuple[str, MoEProblem, bool], object] = {}  # of what a user was told, see `is_news`
        self.changed: Callable[[Shortage], None] = lambda _: None

    def fits(self, name: str, problem: MoEProblem, config: BackendConfig) -> bool:
        """Whether memory suffices for all calls of a problem's bucket.

        That is found out for all token counts at once, so that a new one costs a look-up.
        """
        layer = problem.layer
        kind = (name, id(layer), *vars(config).values())
        if (known := self._known.get(kind)) is None:
            if len(self._known) >= MOST_KINDS:
                self._known.clear()
            known = self._known[kind] = layer, self._fitting_buckets(self._pool.backend(name), layer, config)
        return bool(known[1] >> max(problem.M - 1, 0).bit_length() & 1)

    def reason(self, name: str, problem: MoEProblem, config: BackendConfig) -> str:
        """Why memory does not suffice for a problem, which `fits` answers for a whole bucket; empty if it does."""
        return self.lacking(name, problem, config) or excess(self._pool.backend(name), problem, config)

    def lacking(self, name: str, problem: MoEProblem, config: BackendConfig) -> str:
        """Why a choice is left out because memory ran out; empty if it is not."""
        backend = self._pool.backend(name)
        return next((one.reason(backend, config) for one in self.holding(problem) if one.covers(backend, config)), "")

    def halvable(self, problem: MoEProblem) -> bool:
        """Whether something that a call does without may run its halves."""
        return problem.M > 1 and any(one.least_tokens > 1 for one in self.holding(problem))

    def holding(self, problem: MoEProblem) -> list[Shortage]:
        """The shortages because of which a call does without something.

        There are none for a call that torch must differentiate: the reference alone runs it, whole or in halves.
        """
        if problem.needs_grad:
            return []
        return [one for one in list(self.shortages.values()) if one.left > 0 and one.concerns(problem)]

    def ran_out(
        self, name: str, problem: MoEProblem, config: BackendConfig | None, cause: str
    ) -> tuple[Shortage, bool]:
        """Leave out a choice that ran out of memory; see the module.

        Args:
            name: The backend's. The reference is never left out of calls of one token: nothing might be left.
            problem: What it ran, without `needs_grad`; what it was probed for if `config` is None.
            config: Its configuration, or None.
            cause: What it raised, one line.

        Returns:
            The shortage, and whether it is the first one of the backend and layer, of which a user is told.
        """
        layer, M = problem.layer, problem.M if config else 1
        workspace = self._pool.backend(name).workspace_bytes(problem, config) if config and M > 1 else math.inf
        found = Shortage(layer, M, name, config, cause, workspace)
        found.fail()
        if len(self.shortages) >= MOST_KINDS:
            self.shortages.clear()
            self._told.clear()
        shortage = self.shortages.setdefault((name, layer, config), found)
        if shortage is not found:
            if shortage.left <= 0 or shortage.tokens > M:
                shortage.tokens, shortage.cause, shortage.workspace = M, cause, workspace
            shortage.fail()
        self._announce(shortage)
        return shortage, self.is_news(name, problem)

    def is_news(self, name: str, problem: MoEProblem) -> bool:
        """Whether this is the first time that a backend is short of memory for a layer. Of threads, one is told so."""
        mine = object()
        return self._told.setdefault((name, problem.layer, problem.needs_grad), mine) is mine

    def probe_ran_out(self, name: str, problem: MoEProblem, cause: str) -> str:
        """Leave out a backend whose probe ran out of memory, which says nothing of it; returns the reason."""
        shortage, is_first = self.ran_out(name, problem, None, cause)
        if is_first:
            warn(
                f"backend {name!r} could not be probed, because memory ran out ({cause}): calls of {problem.layer} "
                f"with any number of tokens do without it, and try it again after {shortage.wait} of them"
            )
        return f"it could not be probed: {cause}"

    def _counter(self, shortages: Iterable[Shortage]) -> Callable[[], None]:
        """What counts a call as one that does without."""

        def count() -> None:
            for shortage in shortages:
                if shortage.ends():
                    self._announce(shortage)

        return count

    def count(self, plan: Plan) -> None:
        """Have a plan's runs counted, if they do without something."""
        if held := self.holding(plan.problem):
            plan.count_by(self._counter(held))

    def served(
        self, problem: MoEProblem, best: Plan | None, unproven: Plan | None = None, *, into: bool = False
    ) -> Plan | None:
        """The best plan, whose calls are counted if they do without something, and halved if nothing else is left.

        Args:
            problem: What is planned.
            best: The best plan; None if nothing can run the problem.
            unproven: A better one that a capture does not use.
            into: As `Plan.into`.
        """
        held = self.holding(problem)
        if not held:
            return best
        plans = [plan for plan in (best, unproven) if plan is not None]
        for plan in plans:
            self.count(plan)
        of_runs = [(one.backend, one.config) for one in held if one.config is not None and one.least_tokens > 1]
        if problem.M <= 1 or not of_runs or any(plan.choice.backend != LAST_RESORT for plan in plans):
            return best
        self._counter(held)()
        name, config = of_runs[0]
        choice = Choice(name, IN_HALVES, policy="memory")
        return Plan(problem, self._pool.backend(name), config, choice, "", into=into, proven=True, halved=True)

    def _announce(self, shortage: Shortage) -> None:
        self._known.clear()
        self.changed(shortage)

    def _fitting_buckets(self, backend: Backend, layer: MoEProblem, config: BackendConfig) -> int:
        """A number whose bit b is set if calls of more than ``2 ** (b - 1)`` tokens fit, up to ``2 ** b``."""
        fitting, fewer = 0, True
        for bits in range(LARGEST_BUCKET + 1):
            most = not excess(backend, layer.with_tokens(1 << bits), config)
            fitting |= (fewer and most) << bits
            fewer = most
        for shortage in list(self.shortages.values()):
            if shortage.left > 0 and shortage.layer == layer and shortage.covers(backend, config):
                fitting &= (1 << _bucket(shortage.tokens)) - 1
        return fitting


def _bucket(tokens: int) -> int:
    """The power of two that a token count is rounded up to, as its exponent."""
    return max(tokens - 1, 0).bit_length()
