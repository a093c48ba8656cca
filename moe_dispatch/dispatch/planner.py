"""From a kind of call to the plan that runs it: the policies' order, each backend's reasons against, and its probe."""

import dataclasses
import functools
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import pydantic
import torch

from moe_dispatch.backend import Backend, BackendConfig
from moe_dispatch.dispatch.backend_pool import BackendPool, BackendStatus
from moe_dispatch.dispatch.counters import Counters
from moe_dispatch.dispatch.errors import BackendUnsupportedError, NoBackendError
from moe_dispatch.dispatch.explanation import Candidate, Explanation
from moe_dispatch.dispatch.first_calls import FIRST_CALLS
from moe_dispatch.dispatch.fitting import IN_HALVES, Fitting
from moe_dispatch.dispatch.plan import Plan, Proof
from moe_dispatch.dispatch.policy_chain import PolicyChain
from moe_dispatch.dispatch.quarantine import OBEYED_FOR, STRIKES, Quarantine, QuarantineEntry
from moe_dispatch.errors import BackendUnavailableError, UnknownNameError, warn, way_out
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.guard import foreign_errors
from moe_dispatch.machine import Machine
from moe_dispatch.policy import Choice
from moe_dispatch.problem import Mode, MoEProblem
from moe_dispatch.registry import BACKENDS, LAST_RESORT
from moe_dispatch.settings import Settings
from moe_dispatch.system import failures
from moe_dispatch.workspace import excess

logger = logging.getLogger("moe_dispatch")

BACKEND_VARIABLE: Final = "MOE_DISPATCH_BACKEND"
DISABLE_VARIABLE: Final = "MOE_DISPATCH_DISABLE"
POLICY_VARIABLE: Final = "MOE_DISPATCH_POLICY"
MAX_NEIGHBOURHOODS: Final = 4096  # Bound on `Planner._neighbours`, which is emptied when it is full.


class Planner:
    """Chooses backends on one machine.

    Args:
        machine: The machine whose capability and versions decide.
        configured: The values of the environment variables.
        quarantine: Consulted, and told of a backend that cannot be made or fails its probe.
        counters: Told of the same.
        live: Whether `machine` is this one. A described machine is only explained: nothing is imported or probed.
        barred: Backends that policies may not choose, each with the reason.

    Attributes:
        fitting: Which choices memory suffices for.
    """

    def __init__(
        self,
        machine: Machine,
        configured: Settings,
        quarantine: Quarantine,
        counters: Counters,
        *,
        live: bool,
        barred: Mapping[str, str],
    ) -> None:
        self.machine = machine
        self._settings, self._live = configured, live
        self._quarantine, self._counters = quarantine, counters
        self._pool = BackendPool(machine, configured.disabled, quarantine, barred)
        self._chain: PolicyChain | None = None
        self._proven: set[Proof] = set()
        # What was warned of. Of threads that come at once, the one whose object is kept warns.
        self._passed_over: dict[str, object] = {}
        self._obeyed: dict[tuple[str, str], object] = {}
        self._neighbours: dict[tuple[int, Mode, int, bool], tuple[Plan, ...]] = {}  # see `_neighbours_plan`
        self.fitting = Fitting(self._pool)

    def plan(
        self, problem: MoEProblem, experts: ExpertWeights, backend: str | None = None, *, into: bool = False
    ) -> Plan:
        """The best plan for a problem, or the one of the backend that the caller or the environment names.

        Raises:
            BackendUnsupportedError: The named backend cannot run this.
            BackendUnavailableError: The named backend is missing or broken.
            NoBackendError: Nothing can run this.
        """
        named = bool(backend or self._settings.backend)
        with FIRST_CALLS:
            if named:
                plan = self._named_plan(backend, problem, experts, into=into)
            else:
                plan = self._neighbours_plan(problem, into=into) or self._best_plan(problem, experts, into=into)
        plan.proven = plan.proven or plan.proof in self._proven
        if logger.isEnabledFor(logging.INFO):  # reading a reason may compute it
            logger.info("%s runs %s: %s", plan.choice.backend, problem, plan.choice.reason)
        return plan

    def eligible(
        self, problem: MoEProblem, experts: ExpertWeights, backend: str | None = None, *, into: bool = False
    ) -> Iterator[Plan]:
        """Every plan that could run a problem, best first; where a backend is named, that backend's or none."""
        named = bool(backend or self._settings.backend)
        remedy = way_out("" if backend else BACKEND_VARIABLE) if named else ""
        for choice in (self._named_choice(backend, problem),) if named else self._rank(problem):
            config, _ = self._config_or_reasons(choice, problem, chosen_by_name=named)
            if config is not None and not self._probe_failure(choice, problem, experts):
                yield self._made_plan(problem, choice, config, remedy, into=into)

    def is_halved(self, problem: MoEProblem, experts: ExpertWeights) -> bool:
        """Whether calls that name no backend are computed in halves, since other choices ran out of memory."""
        if not self.fitting.halvable(problem):
            return False
        return all(plan.choice.backend == LAST_RESORT and not plan.explicit for plan in self.eligible(problem, experts))

    def forget_neighbours(self) -> None:
        """Plan every token count by itself again until another plan is remembered."""
        self._neighbours.clear()

    def prove(self, plan: Plan) -> None:
        """Remember that a plan has run to its end."""
        self._proven.add(plan.proof)
        plan.proven = True

    def explain(self, problem: MoEProblem) -> Explanation:
        """The ranking for a problem, each choice's reason, and every backend's reasons against."""
        candidates: list[Candidate] = []
        name = self._settings.backend
        for choice in (self._named_choice(None, problem),) if name else self._rank(problem):
            _, reasons = self._config_or_reasons(choice, problem, chosen_by_name=bool(name))
            against = list(reasons)
            if self._live and not against and not any(not earlier.against for earlier in candidates):
                against += filter(None, [self._probe_failure(choice, problem, None)])
            candidates.append(Candidate(choice, tuple(against)))
        if name:
            passed_over = (f"{BACKEND_VARIABLE} names {name!r}, which nothing replaces",)
            others = (choice for choice in self._rank(problem) if choice.backend != name)
            candidates += [Candidate(choice, passed_over) for choice in others]
        notes = self.notes()
        if self.fitting.halvable(problem):
            able = {candidate.choice.backend for candidate in candidates if not candidate.against}
            notes = notes if able - {LAST_RESORT} else (*notes, IN_HALVES)
        ranked = {candidate.choice.backend for candidate in candidates}
        unranked = {name: self._pool.reasons_against(name, problem) for name in BACKENDS.names() if name not in ranked}
        return Explanation(problem, self.machine, tuple(candidates), unranked, notes)

    def backend(self, name: str) -> Backend:
        """The backend behind a name.

        Raises:
            UnknownNameError: Nothing is registered under it.
            BackendUnavailableError: It does not import, or its libraries are missing.
        """
        return self._pool.backend(name)

    def named(self, backend: str | None) -> tuple[str, str]:
        """The name of the backend that the caller gives, or else the environment, and its variable; empty if none does.

        Raises:
            UnknownNameError: Nothing is registered under it.
            BackendUnavailableError: It does not import, or its libraries are missing.
        """
        name, variable = (backend, "") if backend else (self._settings.backend, BACKEND_VARIABLE)
        if name:
            self._pool.made(name).require(variable)
        return name, variable

    def require(self, backend: str | None, problem: MoEProblem) -> tuple[str, str]:
        """`named`, and the backend must be able to run a problem.

        Raises:
            BackendUnsupportedError: It cannot.
            MoEDispatchError: As for `named`.
        """
        name, variable = self.named(backend)
        if name and (reasons := self._pool.reasons_against(name, problem, chosen_by_name=True)):
            raise BackendUnsupportedError(name, problem, reasons, variable)
        return name, variable

    def statuses(self) -> tuple[BackendStatus, ...]:
        """Every registered backend on this machine."""
        return self._pool.statuses()

    def notes(self) -> tuple[str, ...]:
        """Unknown names in the environment, retired measurements and refused files."""
        return (*self._unknown_names(), *self._policies().notes())

    def tables_digest(self) -> str:
        """What the policies rank by, as text that is equal where their data is."""
        return self._policies().digest()

    def _unknown_names(self) -> tuple[str, ...]:
        """Backends that the environment names and that are not registered."""
        wanted = [(DISABLE_VARIABLE, name) for name in sorted(self._settings.disabled)]
        if self._settings.backend:
            wanted.insert(0, (BACKEND_VARIABLE, self._settings.backend))
        known = BACKENDS.names() if wanted else ()
        return tuple(
            str(UnknownNameError("backend", name, known, variable)) for variable, name in wanted if name not in known
        )

    def _named_plan(self, backend: str | None, problem: MoEProblem, experts: ExpertWeights, *, into: bool) -> Plan:
        """The plan of the backend that the caller names, or else the environment."""
        name, variable = self.require(backend, problem)
        choice = self._named_choice(backend, problem)
        if failure := self._probe_failure(choice, problem, experts):
            raise BackendUnavailableError(name, (failure,), variable)
        config, reasons = self._config(choice, problem)
        if config is None:
            raise BackendUnavailableError(name, reasons, variable)
        return self._made_plan(problem, choice, config, way_out(variable), into=into)

    def _named_choice(self, backend: str | None, problem: MoEProblem) -> Choice:
        """The named backend, in the configuration that the policies rank first for it."""
        name = backend or self._settings.backend
        ranked = (choice for choice in self._rank(problem) if choice.backend == name)
        configured = ((choice, self._config(choice, problem)[0]) for choice in ranked)
        fitting = (one for one, config in configured if config and not excess(self.backend(name), problem, config))
        choice = next(fitting, Choice(name, ""))
        if backend:
            return dataclasses.replace(choice, reason="named by the caller", policy="caller")
        return dataclasses.replace(choice, reason=f"named by {BACKEND_VARIABLE}", policy="environment")

    def _neighbours_plan(self, problem: MoEProblem, *, into: bool) -> Plan | None:
        """The plan of a call that differs from a planned one in its token count alone; None where it may be another.

        It is the same where the policies put the same choice first for both token counts and nothing speaks against it.
        """
        for neighbour in self._neighbours.get(_neighbourhood(problem, into=into), ()):
            if (choice := neighbour.choice.also_at(problem.M)) is None:
                continue
            if not self._pool.still_able(choice.backend, problem):
                return None
            return Plan(
                problem, neighbour.backend, neighbour.config, choice, "", into=into, kept=True, proven=neighbour.proven
            )
        return None

    def _remember(self, plan: Plan) -> None:
        """Keep a plan for other token counts, if it is of the first choice and its policy says where that leads."""
        problem = plan.problem
        if problem.routed_experts is not None or plan.choice.also_at(problem.M) is None:
            return  # a part of a layer is ranked by another token count, and other choices are for this one alone
        choice = plan.choice
        if self._policies().leads(choice, problem) and self.fitting.fits(choice.backend, problem, plan.config):
            if len(self._neighbours) >= MAX_NEIGHBOURHOODS:
                self._neighbours.clear()
            key = _neighbourhood(problem, into=plan.into)
            self._neighbours[key] = (*self._neighbours.get(key, ()), plan)

    def _best_plan(self, problem: MoEProblem, experts: ExpertWeights, *, into: bool) -> Plan:
        against: dict[str, tuple[str, ...]] = {}
        faults: dict[str, str] = {}
        unproven: Plan | None = None
        best: Plan | None = None
        for choice in self._rank(problem):
            config, reasons = self._config_or_reasons(choice, problem)
            if fault := self._pool.broken(choice.backend):
                faults[choice.backend] = fault
            if not reasons and (failure := self._probe_failure(choice, problem, experts)):
                reasons = (failure,)
                if problem.mode == "eager" and not (config and self.fitting.lacking(choice.backend, problem, config)):
                    faults[choice.backend] = failure
            if reasons or config is None:
                against.setdefault(choice.backend, reasons)
                continue
            plan = Plan(problem, self._pool.backend(choice.backend), config, choice, "", into=into)
            if problem.mode == "eager" or plan.proof in self._proven:
                best = plan
                break
            # A backend that never ran may have to compile, which can break a capture: one that ran before is safer.
            unproven = unproven or plan
        if best is not None:
            # A fallback during a capture is not kept: once the plan before it has run, that one is better.
            best.kept = unproven is None
            if best.kept and not (against or faults):
                self._remember(best)
        if self.fitting.shortages:
            best = self.fitting.served(problem, best, unproven, into=into)
        best = best or unproven
        if best is None:
            for name in BACKENDS.names():
                against.setdefault(name, self._pool.reasons_against(name, problem))
            raise NoBackendError(problem, against)
        for name, fault in faults.items():
            self._pass_over(name, problem, fault, best)
        for entry in self._pool.recorded(problem):
            self._warn_of_record(entry, best)
        return best

    def _pass_over(self, name: str, problem: MoEProblem, fault: str, successor: Plan) -> None:
        """Warn once that a ranked backend is broken or fails its probe, and say what runs in its place."""
        mine = object()
        if self._passed_over.setdefault(name, mine) is not mine:
            return
        self._counters.count(name, fell_back=1, quarantined=1)
        self._quarantine.bar(name, problem, fault, fatal=False)
        warn_of_successor(name, problem, fault, successor)

    def _warn_of_record(self, entry: QuarantineEntry, successor: Plan) -> None:
        """Warn once that an earlier process's failure keeps a backend from running."""
        mine = object()
        if self._obeyed.setdefault((entry.backend, entry.problem), mine) is not mine:
            return
        until = "until a version changes" if entry.strikes >= STRIKES else f"for {OBEYED_FOR} after that"
        warn(
            f"backend {entry.backend!r} is avoided for {entry.problem} {until}, because of an earlier process, "
            f"{entry.when}: {entry.cause}. {successor.choice.backend!r} runs instead. `moe-dispatch doctor` lists such "
            "records, `moe-dispatch doctor --reset` lifts them."
        )

    def _made_plan(
        self, problem: MoEProblem, choice: Choice, config: BackendConfig, remedy: str = "", *, into: bool = False
    ) -> Plan:
        plan = Plan(problem, self.backend(choice.backend), config, choice, remedy, into=into, kept=bool(remedy))
        if self.fitting.shortages and not remedy:
            self.fitting.count(plan)
        return plan

    def _rank(self, problem: MoEProblem) -> Iterable[Choice]:
        if problem.needs_grad:
            reason = "torch differentiates the backend itself, which only the reference allows"
            return (Choice(LAST_RESORT, reason, policy="autograd"),)
        return (self._chain or self._policies()).rank(problem)  # for each new token count: without a call once loaded

    def _policies(self) -> PolicyChain:
        if self._chain is None:  # two threads may load it at once; no lock is held while a policy's code runs
            self._chain = self._load_policies()
        return self._chain

    def _load_policies(self) -> PolicyChain:
        for text in self._unknown_names():
            warn(text)
        try:
            return PolicyChain(self.machine, self._settings.policies, self._pool)
        except UnknownNameError as error:
            raise UnknownNameError(error.kind, error.name, error.known, POLICY_VARIABLE) from None

    def _config_or_reasons(
        self, choice: Choice, problem: MoEProblem, *, chosen_by_name: bool = False
    ) -> tuple[BackendConfig | None, tuple[str, ...]]:
        """The configuration that a choice would run a problem with, or None and every reason against the choice.

        One that memory does not suffice for runs if its backend was chosen by name.
        """
        reasons = self._pool.reasons_against(choice.backend, problem, chosen_by_name=chosen_by_name)
        config, reasons = (None, reasons) if reasons else self._config(choice, problem)
        if config is None or chosen_by_name or self.fitting.fits(choice.backend, problem, config):
            return config, reasons
        reason = self.fitting.reason(choice.backend, problem, config)
        return (None, (reason,)) if reason else (config, ())

    def _config(self, choice: Choice, problem: MoEProblem) -> tuple[BackendConfig | None, tuple[str, ...]]:
        """A choice's configuration as the backend's own type, or None and why there is none."""
        try:
            backend = self._pool.backend(choice.backend)
            if choice.config is None:
                return backend.default_config(problem), ()
            values = choice.config.values()
            typed = tuple(zip(choice.config, values, map(type, values), strict=True))
            return _validated(backend.config_type, typed), ()
        except pydantic.ValidationError as error:
            return None, (f"does not know the configuration {dict(choice.config or {})}: {error.errors()[0]['msg']}",)
        except BackendUnavailableError as error:
            return None, ("; ".join(error.reasons),)
        except foreign_errors() as error:  # of a validator of its own
            return None, (f"cannot read the configuration {dict(choice.config or {})}: {failures.summary(error)}",)

    def _probe_failure(self, choice: Choice, problem: MoEProblem, experts: ExpertWeights | None) -> str:
        device = experts.device if experts is not None else torch.device(self.machine.device)
        try:
            return self._pool.probe_failure(choice.backend, problem, device)
        except foreign_errors() as error:
            if not failures.out_of_memory(error):
                raise
            return self.fitting.probe_ran_out(choice.backend, problem, failures.summary(error))


def _neighbourhood(problem: MoEProblem, *, into: bool) -> tuple[int, Mode, int, bool]:
    """What plans of one `Plan.proof` have in common beside the choice; plans that are kept keep the layer's id."""
    return id(problem.layer), problem.mode, max(problem.M - 1, 0).bit_length(), into


# Bounded, as a policy may name ever new ones; by the types too, as 1 equals True and a strict type tells them apart.
@functools.lru_cache(maxsize=4096)
def _validated(config_type: type[BackendConfig], values: tuple[tuple[str, int | str, type], ...]) -> BackendConfig:
    return config_type.model_validate({name: value for name, value, _ in values})


def warn_of_successor(name: str, problem: MoEProblem, cause: str, successor: Plan) -> None:
    """Say that a backend failed, what runs in its place, and how to mend it."""
    warn(
        f"backend {name!r} failed on {problem} and is avoided for such problems in this process: {cause}. "
        f"{successor.choice.backend!r} runs instead ({successor.choice.reason}). To mend it, see "
        f"`moe-dispatch doctor`; to leave it out, set MOE_DISPATCH_DISABLE={name}."
    )
