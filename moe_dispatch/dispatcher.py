"""From a call to a running backend: one look-up in the steady state, everything else once per kind of call."""

import dataclasses
import logging
import os
import threading
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import pydantic
import torch
from torch import Tensor

from moe_dispatch import failures
from moe_dispatch.backend import Backend, BackendConfig, Inputs, Run
from moe_dispatch.checks import check
from moe_dispatch.errors import (
    BackendFailedError,
    BackendUnavailableError,
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
# A kind of call that came back this often may be prepared for, where the host's time counts: at few tokens.
SETTLED_CALLS: Final = 3
SETTLED_TOKENS: Final = 256
PlanKey = tuple[Any, ...]


@dataclass(slots=True, eq=False)
class Plan:
    """What runs for one kind of call.

    Attributes:
        problem: The kind of call.
        backend: What runs it.
        config: How.
        choice: Why.
        explicit: Whether the caller named the backend; then nothing else runs in its place.
        run: The backend's bound method, or what it has in its place for this kind of call (`Backend.steady`).
        widens: Whether topk_weights come in half precision, which backends do not take.
        proven: Whether it has run such a problem to its end in this process.
        kept: Whether later calls of the kind find it; a capture's makeshift is planned anew.
        calls: How often it ran.
    """

    problem: MoEProblem
    backend: Backend
    config: BackendConfig
    choice: Choice
    explicit: bool
    run: Run = field(init=False)
    widens: bool = False
    proven: bool = False
    kept: bool = False
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
        # Whether another GPU than this one may be current when a call arrives.
        self.one_of_several_gpus = live and machine.device == "cuda" and torch.cuda.device_count() > 1
        self._on_cuda = machine.device == "cuda"
        self._live = live
        self._settings = configured or settings()
        self._roster = Roster(machine, self._settings.disabled, self.quarantine)
        self._ranking: Ranking | None = None
        self._plans: dict[PlanKey, Plan] = {}
        self._proven: set[tuple[str, BackendConfig, MoEProblem]] = set()
        self._stats: dict[str, BackendStats] = {}
        self._warned_of_memory: set[str] = set()
        self._distrusted: set[str] = set()
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
        """See `moe_dispatch.moe_forward`; the layer's GPU is the current one.

        The key holds all that a check, a policy or a backend may ask of a call, so a kind of call that is known needs
        none of them.
        """
        try:
            key = (
                experts.spec,
                hidden_states.shape,
                topk_weights.shape,
                topk_ids.shape,
                hidden_states.dtype,
                topk_weights.dtype,
                topk_ids.dtype,
                hidden_states.device == topk_weights.device == topk_ids.device == experts.device,
                torch.is_grad_enabled() and experts.wants_grad(hidden_states, topk_weights),
                self._on_cuda and torch.cuda.is_current_stream_capturing(),
                backend,
            )
        except AttributeError:
            check(hidden_states, experts, topk_weights, topk_ids)
            raise
        plan = self._plans.get(key)
        if plan is None:
            check(hidden_states, experts, topk_weights, topk_ids)
            if not hidden_states.shape[0]:
                return hidden_states.clone()  # not empty_like: a gradient may pass through it
            plan = self._plan(key, experts)
        if plan.widens:
            topk_weights = topk_weights.float()
        inputs = (hidden_states.contiguous(), experts, topk_weights.contiguous(), topk_ids.contiguous())
        try:
            out = plan.run(*inputs, plan.config) if plan.proven else self._first_run(plan, inputs)
        except Exception as error:  # noqa: BLE001 - whatever a backend raises, the layer is still to be computed
            return self._recover(key, plan, error, inputs)
        self._last = plan
        if plan.kept:
            with plan.lock:
                plan.calls = calls = plan.calls + 1
            if calls == SETTLED_CALLS:
                self._settle(plan, inputs)
        else:
            self._count(plan.choice.backend, ran=1)
        return out

    def warm_up(self, inputs: Inputs, backend: str | None = None) -> None:
        """Run what an eager call and a captured one would run, so that a capture of this M compiles nothing.

        Args:
            inputs: hidden_states, experts, topk_weights, topk_ids, as for `forward`.
            backend: As for `forward`.
        """
        self.forward(*inputs, backend)
        hidden_states, experts, _, topk_ids = inputs
        if experts.device.type != "cuda":
            return
        if hidden_states.shape[0] <= SETTLED_TOKENS:
            for _ in range(1, SETTLED_CALLS):
                self.forward(*inputs, backend)
        named = backend or self._settings.backend
        M, topk = topk_ids.shape
        problem = experts.problem(M, topk, hidden_states.dtype, self.machine.capability, "graph")
        choices = self._rank(problem)
        if named:
            choices = (self._named_plan(named, dataclasses.replace(problem, mode="eager"), experts).choice,)
        for choice in choices:
            if self._reasons_against(choice, problem) or self._probe(choice, problem, experts):
                continue
            plan = self._made_plan(problem, choice, explicit=bool(named))
            try:
                self._first_run(plan, inputs)
            except Exception as error:
                if failures.lost_device(error):
                    raise self._device_lost(plan, error) from error
                if plan.explicit:
                    raise BackendFailedError(choice.backend, problem, error) from error
                if not failures.out_of_memory(error):
                    self._bar(plan, failures.summary(error))
                continue
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
        choices = self._rank(problem)
        if name := self._settings.backend:
            choices = (Choice(name, "named by MOE_DISPATCH_BACKEND", policy="environment"), *choices)
        for choice in choices:
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
            total = {name: dataclasses.replace(counted) for name, counted in self._stats.items()}
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
            plan.widens = key[5] is not torch.float32
            if plan.kept:
                if len(self._plans) >= MAX_PLANS:
                    for old in list(self._plans):
                        self._forget(old)
                self._plans[key] = plan
            logger.info("%s runs %s: %s", plan.choice.backend, problem, plan.choice.reason)
        if not plan.proven and problem.device == "cuda" and problem.mode == "eager":
            # What failed before this first run is not this backend's doing, and shows here.
            torch.cuda.synchronize(experts.device)
        return plan

    def _forget(self, key: PlanKey) -> None:
        with self._lock:
            if plan := self._plans.pop(key, None):
                self._count(plan.choice.backend, ran=plan.calls)

    def _problem(self, key: PlanKey, experts: ExpertWeights) -> MoEProblem:
        _, _, _, (M, topk), act_dtype, _, _, _, needs_grad, capturing, _ = key
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
        if reasons:
            raise BackendUnsupportedError(name, problem, reasons)
        if distrust:
            raise BackendUnavailableError(name, (distrust,))
        named = dataclasses.replace(choice, reason="named by the caller", policy="caller")
        return self._made_plan(problem, named, explicit=True)

    def _best_plan(self, problem: MoEProblem, experts: ExpertWeights) -> Plan:
        against: dict[str, tuple[str, ...]] = {}
        faults: dict[str, str] = {}
        makeshift: Plan | None = None
        found: Plan | None = None
        for choice in self._rank(problem):
            reasons = self._reasons_against(choice, problem)
            if fault := self._roster.broken(choice.backend):
                faults[choice.backend] = fault
            if not reasons and (distrust := self._probe(choice, problem, experts)):
                reasons = (distrust,)
                if problem.mode == "eager":
                    faults[choice.backend] = distrust
            if reasons:
                against.setdefault(choice.backend, reasons)
                continue
            plan = self._made_plan(problem, choice, explicit=False)
            if problem.mode == "eager" or plan.kind in self._proven:
                found = plan
                break
            # What never ran may have to compile, which can break a capture: something that ran before is safer, though
            # only until this one has run.
            makeshift = makeshift or plan
        if found is not None:
            found.kept = makeshift is None
        found = found or makeshift
        if found is None:
            for name in BACKENDS.names():
                against.setdefault(name, self._roster.reasons_against(name, problem))
            raise NoBackendError(problem, against)
        for name, fault in faults.items():
            self._distrust(name, problem, fault, found)
        return found

    def _distrust(self, name: str, problem: MoEProblem, fault: str, successor: Plan) -> None:
        """Say once that a ranked backend does not import or is wrong, and what runs in its place."""
        if name in self._distrusted:
            return
        self._distrusted.add(name)
        self._count(name, fell_back=1, quarantined=1)
        self.quarantine.bar(name, problem, fault, lethal=False)
        self._warn_of_successor(name, problem, fault, successor)

    def _made_plan(self, problem: MoEProblem, choice: Choice, *, explicit: bool) -> Plan:
        made = self._roster.backend(choice.backend)
        config = (
            made.default_config(problem)
            if choice.config is None
            else made.config_type.model_validate(dict(choice.config))
        )
        return Plan(problem, made, config, choice, explicit, kept=explicit)

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
        device = inputs[0].device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return plan.run(*inputs, plan.config)  # nothing can be awaited, so nothing is proven
        if plan.choice.backend == LAST_RESORT:
            out = plan.run(*inputs, plan.config)
        else:
            with self.quarantine.first_run(plan.choice.backend, plan.problem):
                out = plan.run(*inputs, plan.config)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
        self._proven.add(plan.kind)
        plan.proven = True
        return out

    def _settle(self, plan: Plan, inputs: Inputs) -> None:
        """Let the backend prepare for more calls of a kind; it may decline, and its trouble stays its own."""
        problem = plan.problem
        if problem.mode == "graph" or problem.M > SETTLED_TOKENS:
            return
        try:
            plan.run = plan.backend.steady(inputs, plan.config) or plan.run
        except Exception as error:
            if failures.lost_device(error):
                raise self._device_lost(plan, error) from error
            logger.info("%s did not prepare for %s: %s", plan.choice.backend, problem, failures.summary(error))

    def _recover(self, key: PlanKey, plan: Plan, error: Exception, inputs: Inputs) -> Tensor:
        name = plan.choice.backend
        if failures.lost_device(error):
            raise self._device_lost(plan, error) from error
        if plan.problem.mode == "graph":
            # The capture is void whatever runs now; the next one finds the culprit barred.
            if not plan.explicit and not failures.broken_capture(error):
                self._bar(plan, failures.summary(error))
            raise BackendFailedError(name, plan.problem, error) from error
        if plan.explicit:
            raise BackendFailedError(name, plan.problem, error) from error
        if failures.out_of_memory(error):
            return self._with_less_memory(plan, error, inputs)
        if name == LAST_RESORT:
            raise error
        self._bar(plan, failures.summary(error))
        self._warn_of_successor(name, plan.problem, failures.summary(error), self._plan(key, inputs[1]))
        return self.forward(*inputs)

    def _bar(self, plan: Plan, cause: str) -> None:
        """Quarantine a plan's backend for such problems, in this process, and drop the plans that use it there."""
        name, bucket = plan.choice.backend, plan.problem.bucket
        self.quarantine.bar(name, plan.problem, cause, lethal=False)
        with self._lock:
            self._count(name, fell_back=1, quarantined=1)
            for other, held in list(self._plans.items()):
                if held.choice.backend == name and not held.explicit and held.problem.bucket == bucket:
                    self._forget(other)

    def _warn_of_successor(self, name: str, problem: MoEProblem, cause: str, successor: Plan) -> None:
        warnings.warn(
            f"backend {name!r} failed on {problem} and is avoided for such problems in this process: {cause}. "
            f"{successor.choice.backend!r} runs instead ({successor.choice.reason}). To mend it, see "
            f"`moe-dispatch doctor`; to leave it out, set MOE_DISPATCH_DISABLE={name}.",
            MoEDispatchWarning,
            stacklevel=5,
        )

    def _with_less_memory(self, plan: Plan, error: Exception, inputs: Inputs) -> Tensor:
        """Out of memory: whoever needs less workspace, then the call in halves along M, for this call only."""
        hidden_states, experts, topk_weights, topk_ids = inputs
        self._count(plan.choice.backend, fell_back=1)
        _release(error)
        for leaner in self._leaner_plans(plan, experts):
            try:
                out = self._first_run(leaner, inputs)
            except Exception as again:
                if failures.lost_device(again):
                    raise self._device_lost(leaner, again) from again
                if not failures.out_of_memory(again):
                    self._bar(leaner, failures.summary(again))
                _release(again)
                continue
            self._warn_of_memory(plan, error, f"{leaner.choice.backend!r}, which needs less workspace, runs instead")
            self._count(leaner.choice.backend, ran=1)
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
        # The naive loop needs little and takes long: halves of the call come first.
        eligible = [other for other in eligible if other.choice.backend != LAST_RESORT or plan.problem.M < 2]
        leaner = [(other.backend.workspace_bytes(other.problem, other.config), other) for other in eligible]
        return [other for size, other in sorted(leaner, key=lambda pair: pair[0]) if size < needed]

    def _device_lost(self, plan: Plan, error: Exception) -> DeviceLostError:
        """A first run was awaited and is the culprit; of later ones the error only says that it was earlier."""
        suspect = plan if not plan.proven else self._last or plan
        name = suspect.choice.backend
        certain = not suspect.proven and name != LAST_RESORT
        if certain:
            self.quarantine.bar(name, suspect.problem, failures.summary(error), lethal=True)
        return DeviceLostError([name], error, certain=certain)

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

    def _count(self, name: str, *, ran: int = 0, fell_back: int = 0, quarantined: int = 0) -> None:
        with self._lock:
            counted = self._stats.setdefault(name, BackendStats())
            counted.ran += ran
            counted.fell_back += fell_back
            counted.quarantined += quarantined


def _release(error: BaseException) -> None:
    """Let go of what a failed run had allocated: its frames hold it as long as the traceback lives."""
    traceback.clear_frames(error.__traceback__)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
