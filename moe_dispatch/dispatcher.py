"""From a call to a running backend: one look-up in the steady state, everything else once per kind of call."""

import dataclasses
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import pydantic
import torch
from torch import Tensor

from moe_dispatch import failures
from moe_dispatch.backend import Backend, BackendConfig
from moe_dispatch.errors import (
    BackendFailedError,
    BackendUnsupportedError,
    DeviceLostError,
    MoEDispatchWarning,
    NoBackendError,
    UnknownNameError,
)
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.explain import Candidate, Explanation
from moe_dispatch.machine import Machine, current_machine
from moe_dispatch.policy import Choice
from moe_dispatch.problem import Mode, MoEProblem
from moe_dispatch.quarantine import Quarantine
from moe_dispatch.ranking import LAST_RESORT, Ranking
from moe_dispatch.registry import BACKENDS
from moe_dispatch.roster import BackendStatus, Roster
from moe_dispatch.settings import Settings, settings

logger = logging.getLogger("moe_dispatch")

MAX_PLANS: Final = 65536  # a server that saw this many kinds of call forgets them all and starts over
Run = Callable[[Tensor, ExpertWeights, Tensor, Tensor, BackendConfig], Tensor]
PlanKey = tuple[Any, ...]
Inputs = tuple[Tensor, ExpertWeights, Tensor, Tensor]


@dataclass(slots=True, eq=False)
class Plan:
    """What runs for one kind of call.

    Attributes:
        problem: The kind of call.
        backend: What runs it.
        config: How.
        choice: Why.
        explicit: Whether the caller named the backend; then nothing else runs in its place.
        run: The backend's bound method.
        proven: Whether it has run such a problem to its end in this process.
        calls: How often it ran.
    """

    problem: MoEProblem
    backend: Backend
    config: BackendConfig
    choice: Choice
    explicit: bool
    run: Run = field(init=False)
    proven: bool = False
    calls: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.run = self.backend.run

    @property
    def kind(self) -> tuple[str, BackendConfig, MoEProblem]:
        """What a first run proves: this backend, so configured, at about this many tokens."""
        return self.choice.backend, self.config, dataclasses.replace(self.problem.bucket, mode="eager")


@dataclass
class BackendStats:
    """What happened to one backend in this process."""

    ran: int = 0
    fell_back: int = 0
    quarantined: int = 0


class Dispatcher:
    """Chooses and runs backends on one machine.

    Args:
        machine: Whose capability and versions decide.
        configured: The environment's wishes, as read from it if None.
        live: Whether `machine` is this one. A described machine is only explained: nothing is imported or probed.
    """

    def __init__(self, machine: Machine, configured: Settings | None = None, *, live: bool = True) -> None:
        self.machine = machine
        self.quarantine = Quarantine(machine)
        self._live = live
        self._settings = configured or settings()
        self._roster = Roster(machine, self._settings.disabled, self.quarantine)
        self._ranking: Ranking | None = None
        self._plans: dict[PlanKey, Plan] = {}
        self._proven: set[tuple[str, BackendConfig, MoEProblem]] = set()
        self._stats: dict[str, BackendStats] = {}
        self._warned_of_memory: set[str] = set()
        self._last: Plan | None = None
        self._lock = threading.RLock()

    def forward(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        backend: str | None = None,
    ) -> Tensor:
        """Run inputs that were checked; see `moe_dispatch.moe_forward`."""
        M, topk = topk_ids.shape
        needs_grad = experts.wants_grad(hidden_states, topk_weights)
        capturing = experts.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        key = (experts.spec, M, topk, hidden_states.dtype, needs_grad, capturing, backend)
        plan = self._plans.get(key) or self._plan(key, experts)
        try:
            if plan.proven:
                out = plan.run(hidden_states, experts, topk_weights, topk_ids, plan.config)
            else:
                out = self._first_run(plan, (hidden_states, experts, topk_weights, topk_ids))
        except Exception as error:  # noqa: BLE001 - whatever a backend raises, the layer is still to be computed
            return self._recover(key, plan, error, (hidden_states, experts, topk_weights, topk_ids))
        self._last = plan
        with plan.lock:
            plan.calls += 1
        return out

    def warm_up(self, inputs: Inputs) -> None:
        """Run what an eager call and a captured one would run, so that a capture of this M compiles nothing.

        Args:
            inputs: hidden_states, experts, topk_weights, topk_ids, as for `forward`.
        """
        self.forward(*inputs)
        hidden_states, experts, _, topk_ids = inputs
        if experts.device.type != "cuda":
            return
        M, topk = topk_ids.shape
        key = (experts.spec, M, topk, hidden_states.dtype, False, True, None)
        with torch.no_grad():
            problem = self._problem(key, experts)
            for choice in self._rank(problem):
                eager = dataclasses.replace(problem, mode="eager")
                if self._roster.reasons_against(choice.backend, problem) or self._probe(choice, eager, experts):
                    continue
                plan = self._made_plan(problem, choice, explicit=False)
                try:
                    self._first_run(plan, inputs)
                except Exception as error:  # noqa: BLE001 - as in forward
                    self._recover(key, plan, error, inputs)
                return

    def backend(self, name: str) -> Backend:
        """The backend behind a name.

        Raises:
            UnknownNameError: Nothing is registered under it.
            BackendUnavailableError: It does not import, or its libraries are missing.
        """
        return self._roster.backend(name)

    def statuses(self) -> tuple[BackendStatus, ...]:
        """Every registered backend on this machine."""
        return self._roster.statuses()

    def policy_notes(self) -> tuple[str, ...]:
        """Retired measurements, refused files."""
        return self._policies().notes()

    def explain(self, problem: MoEProblem) -> Explanation:
        """The ranking for a problem, each choice's reason, and every backend's reasons against."""
        candidates: list[Candidate] = []
        for choice in self._rank(problem):
            against = list(self._reasons_against(choice, problem))
            if self._live and not against and not any(not earlier.against for earlier in candidates):
                against += filter(None, [self._probe(choice, problem, None)])
            candidates.append(Candidate(choice, tuple(against)))
        ranked = {candidate.choice.backend for candidate in candidates}
        unranked = {
            name: self._roster.reasons_against(name, problem) for name in BACKENDS.names() if name not in ranked
        }
        return Explanation(problem, self.machine, tuple(candidates), unranked, self.policy_notes())

    def stats(self) -> dict[str, BackendStats]:
        """How often each backend ran, was replaced after a failure, and was quarantined, in this process."""
        with self._lock:
            total = {name: dataclasses.replace(stats) for name, stats in self._stats.items()}
            for plan in self._plans.values():
                total.setdefault(plan.choice.backend, BackendStats()).ran += plan.calls
        return total

    # Plans.

    def _plan(self, key: PlanKey, experts: ExpertWeights) -> Plan:
        with self._lock:
            if found := self._plans.get(key):
                return found
            named = key[-1] or self._settings.backend
            problem = self._problem(key, experts)
            plan = self._named_plan(named, problem, experts) if named else self._best_plan(problem, experts)
            plan.proven = plan.kind in self._proven
            # A capture that had to take what was compiled already may do better once more is.
            if plan.problem.mode == "eager" or plan.proven or plan.explicit:
                self._keep(key, plan)
            logger.info("%s runs %s: %s", plan.choice.backend, problem, plan.choice.reason)
            return plan

    def _keep(self, key: PlanKey, plan: Plan) -> None:
        with self._lock:
            if len(self._plans) >= MAX_PLANS:
                for old in list(self._plans):
                    self._forget(old)
            self._plans[key] = plan

    def _forget(self, key: PlanKey) -> None:
        with self._lock:
            if plan := self._plans.pop(key, None):
                self._of(plan.choice.backend).ran += plan.calls

    def _problem(self, key: PlanKey, experts: ExpertWeights) -> MoEProblem:
        _, M, topk, act_dtype, needs_grad, capturing, _ = key
        mode: Mode = "graph" if capturing else "eager"
        return experts.problem(M, topk, act_dtype, self.machine.capability, mode, needs_grad=needs_grad)

    def _named_plan(self, name: str, problem: MoEProblem, experts: ExpertWeights) -> Plan:
        self._roster.backend(name)  # raises where it is unknown or missing
        choice = next(
            (choice for choice in self._rank(problem) if choice.backend == name and not self._misconfigured(choice)),
            Choice(name, "named by the caller"),
        )
        reasons = self._roster.reasons_against(name, problem, chosen_by_name=True)
        distrust = "" if reasons else self._probe(choice, problem, experts)
        if reasons or distrust:
            raise BackendUnsupportedError(name, problem, reasons or (distrust,))
        named = dataclasses.replace(choice, reason="named by the caller", policy="caller")
        return self._made_plan(problem, named, explicit=True)

    def _best_plan(self, problem: MoEProblem, experts: ExpertWeights) -> Plan:
        against: dict[str, tuple[str, ...]] = {}
        unproven: Plan | None = None
        for choice in self._rank(problem):
            reasons = self._reasons_against(choice, problem)
            if not reasons and (distrust := self._probe(choice, problem, experts)):
                reasons = (distrust,)
            if reasons:
                against.setdefault(choice.backend, reasons)
                continue
            plan = self._made_plan(problem, choice, explicit=False)
            if problem.mode == "eager" or plan.kind in self._proven:
                return plan
            # What never ran may have to compile, which can break a capture: something that ran before is safer.
            unproven = unproven or plan
        if unproven:
            return unproven
        for name in BACKENDS.names():
            against.setdefault(name, self._roster.reasons_against(name, problem))
        raise NoBackendError(problem, against)

    def _made_plan(self, problem: MoEProblem, choice: Choice, *, explicit: bool) -> Plan:
        made = self._roster.backend(choice.backend)
        config = (
            made.default_config(problem)
            if choice.config is None
            else made.config_type.model_validate(dict(choice.config))
        )
        return Plan(problem, made, config, choice, explicit)

    def _rank(self, problem: MoEProblem) -> tuple[Choice, ...]:
        if problem.needs_grad:
            return (Choice(LAST_RESORT, "a gradient is needed, and only the reference has one", policy="autograd"),)
        return self._policies().rank(problem)

    def _policies(self) -> Ranking:
        if self._ranking is None:
            with self._lock:
                self._ranking = self._ranking or Ranking(self.machine, self._settings.policies)
        return self._ranking

    def _reasons_against(self, choice: Choice, problem: MoEProblem) -> tuple[str, ...]:
        try:
            reasons = self._roster.reasons_against(choice.backend, problem)
        except UnknownNameError as error:  # a file may name what this installation lacks
            return (str(error),)
        return reasons or tuple(filter(None, [self._misconfigured(choice)]))

    def _misconfigured(self, choice: Choice) -> str:
        if choice.config is None:
            return ""
        try:
            self._roster.backend(choice.backend).config_type.model_validate(dict(choice.config))
        except pydantic.ValidationError as error:
            return f"does not know the configuration {dict(choice.config)}: {error.errors()[0]['msg']}"
        return ""

    def _probe(self, choice: Choice, problem: MoEProblem, experts: ExpertWeights | None) -> str:
        device = experts.device if experts is not None else torch.device(self.machine.device)
        return self._roster.distrust(choice.backend, problem, device)

    # Running for the first time, and recovering.

    def _first_run(self, plan: Plan, inputs: Inputs) -> Tensor:
        """Run under a marker and wait for the end, so that whatever goes wrong has a name."""
        if plan.problem.mode == "graph" or plan.choice.backend == LAST_RESORT:
            out = plan.run(*inputs, plan.config)
        else:
            with self.quarantine.first_run(plan.choice.backend, plan.problem):
                out = plan.run(*inputs, plan.config)
                if plan.problem.device == "cuda":
                    torch.cuda.synchronize(inputs[0].device)
        if plan.problem.mode == "eager":
            self._proven.add(plan.kind)
            plan.proven = True
        return out

    def _recover(self, key: PlanKey, plan: Plan, error: Exception, inputs: Inputs) -> Tensor:
        if failures.lost_device(error):
            raise self._device_lost(plan, error) from error
        if plan.explicit:
            raise BackendFailedError(plan.choice.backend, plan.problem, error) from error
        if failures.out_of_memory(error):
            return self._with_less_memory(key, plan, error, inputs)
        name = plan.choice.backend
        if name == LAST_RESORT:
            raise error
        cause = failures.summary(error)
        self.quarantine.bar(name, plan.problem, cause, lethal=False)
        with self._lock:
            stats = self._of(name)
            stats.quarantined += 1
            stats.fell_back += 1
            for other, held in list(self._plans.items()):
                if held.choice.backend == name and not held.explicit and held.problem.bucket == plan.problem.bucket:
                    self._forget(other)
        successor = self._plan(key, inputs[1])
        warnings.warn(
            f"backend {name!r} failed on {plan.problem} and is avoided for such problems in this process: {cause}. "
            f"{successor.choice.backend!r} runs instead ({successor.choice.reason}). To mend it, see "
            f"`moe-dispatch doctor`; to leave it out, set MOE_DISPATCH_DISABLE={name}.",
            MoEDispatchWarning,
            stacklevel=4,
        )
        return self.forward(*inputs)

    def _with_less_memory(self, key: PlanKey, plan: Plan, error: Exception, inputs: Inputs) -> Tensor:
        """Out of memory: whoever needs less workspace, then the call in halves along M."""
        hidden_states, experts, topk_weights, topk_ids = inputs
        self._of(plan.choice.backend).fell_back += 1
        if plan.problem.device == "cuda" and plan.problem.mode == "eager":
            torch.cuda.empty_cache()
        for leaner in self._leaner_plans(plan, experts):
            try:
                out = self._first_run(leaner, inputs)
            except Exception as again:
                if failures.lost_device(again):
                    raise self._device_lost(leaner, again) from again
                continue
            self._forget(key)
            self._keep(key, leaner)
            self._warn_of_memory(plan, error, f"{leaner.choice.backend!r}, which needs less workspace, runs instead")
            leaner.calls += 1
            return out
        if plan.problem.M < 2:
            raise error
        half = plan.problem.M // 2
        self._warn_of_memory(plan, error, f"the call is split along M into {half} and {plan.problem.M - half} tokens")
        parts = (slice(None, half), slice(half, None))
        return torch.cat(
            [self.forward(hidden_states[part], experts, topk_weights[part], topk_ids[part]) for part in parts]
        )

    def _leaner_plans(self, plan: Plan, experts: ExpertWeights) -> Iterable[Plan]:
        needed = plan.backend.workspace_bytes(plan.problem, plan.config)
        eligible = [
            self._made_plan(plan.problem, choice, explicit=False)
            for choice in self._rank(plan.problem)
            if not self._reasons_against(choice, plan.problem) and not self._probe(choice, plan.problem, experts)
        ]
        leaner = [(other.backend.workspace_bytes(other.problem, other.config), other) for other in eligible]
        return [other for size, other in sorted(leaner, key=lambda pair: pair[0]) if size < needed]

    def _device_lost(self, plan: Plan, error: Exception) -> DeviceLostError:
        """A lost context shows at the launch after the culprit's, unless that was a first run, which was awaited."""
        suspect = plan if not plan.proven else self._last or plan
        name = suspect.choice.backend
        if name != LAST_RESORT:
            self.quarantine.bar(name, suspect.problem, failures.summary(error), lethal=True)
        return DeviceLostError([name], error)

    def _warn_of_memory(self, plan: Plan, error: Exception, instead: str) -> None:
        if plan.choice.backend in self._warned_of_memory:
            return  # the halves of a call run out in turn, and the next call again
        self._warned_of_memory.add(plan.choice.backend)
        warnings.warn(
            f"backend {plan.choice.backend!r} ran out of memory on {plan.problem} ({failures.summary(error)}); "
            f"{instead}. Leave more memory free (a smaller KV cache, say) to avoid this.",
            MoEDispatchWarning,
            stacklevel=5,
        )

    def _of(self, name: str) -> BackendStats:
        return self._stats.setdefault(name, BackendStats())


_dispatchers: dict[torch.device, Dispatcher] = {}
_dispatchers_lock = threading.Lock()


def get_dispatcher(device: torch.device | str | None = None) -> Dispatcher:
    """The process's dispatcher for a device: the current CUDA device if None, else the CPU."""
    found = _dispatchers.get(device) if isinstance(device, torch.device) else None
    return found or _make_dispatcher(device)


def _make_dispatcher(device: torch.device | str | None) -> Dispatcher:
    wanted = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if wanted.type == "cuda" and wanted.index is None:
        wanted = torch.device("cuda", torch.cuda.current_device())
    with _dispatchers_lock:
        if wanted not in _dispatchers:
            _dispatchers[wanted] = Dispatcher(current_machine(wanted.type, wanted.index))
        return _dispatchers[wanted]


def reset_dispatchers() -> None:
    """Forget every plan, policy and in-process quarantine: after a calibration, or in a forked child."""
    _dispatchers.clear()


def stats() -> dict[str, dict[str, int]]:
    """How often each backend ran, fell back and was quarantined in this process, over all devices."""
    total: dict[str, BackendStats] = {}
    for dispatcher in list(_dispatchers.values()):
        for name, found in dispatcher.stats().items():
            held = total.setdefault(name, BackendStats())
            held.ran += found.ran
            held.fell_back += found.fell_back
            held.quarantined += found.quarantined
    return {name: dataclasses.asdict(held) for name, held in total.items()}


def _after_fork_in_child() -> None:
    global _dispatchers_lock
    # Another thread may have held these locks at the fork; nobody in the child would release them.
    _dispatchers_lock = threading.Lock()
    reset_dispatchers()


os.register_at_fork(after_in_child=_after_fork_in_child)
