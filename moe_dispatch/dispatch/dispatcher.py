"""From a call to a running backend: one look-up in the steady state, everything else once per kind of call."""

import logging
import threading
import traceback
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor

from moe_dispatch.backend import FAST_PATH_TOKENS, Inputs
from moe_dispatch.dispatch.checks import check
from moe_dispatch.dispatch.counters import BackendStats, Counters
from moe_dispatch.dispatch.errors import BackendFailedError, DeviceLostError
from moe_dispatch.dispatch.gradients import needs_grad
from moe_dispatch.dispatch.plan import Plan
from moe_dispatch.dispatch.planner import Planner, warn_of_successor
from moe_dispatch.dispatch.policy_chain import LAST_RESORT
from moe_dispatch.dispatch.quarantine import Quarantine
from moe_dispatch.errors import warn
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine
from moe_dispatch.problem import Mode, MoEProblem
from moe_dispatch.settings import Settings, settings
from moe_dispatch.system import failures

logger = logging.getLogger("moe_dispatch")

MAX_PLANS: Final = 65536  # a server that saw this many kinds of call forgets them all and starts over
FAST_PATH_CALLS: Final = 3  # A backend may prepare for a kind of call (`Backend.fast_path`) at its third run.
PlanKey = tuple[Any, ...]


class Dispatcher:
    """Runs on one machine what its planner chooses, and recovers from what fails.

    Args:
        machine: Whose capability and versions decide.
        configured: The environment's wishes, as read from it if None.
        live: Whether `machine` is this one; see `Planner`.

    Attributes:
        machine: As given.
        planner: Chooses.
        quarantine: What failed before.
        one_of_several_gpus: Whether another GPU than this one may be current when a call arrives.
    """

    def __init__(self, machine: Machine, configured: Settings | None = None, *, live: bool = True) -> None:
        self.machine = machine
        self.quarantine = Quarantine(machine)
        self.one_of_several_gpus = live and machine.device == "cuda" and torch.cuda.device_count() > 1
        self._on_cuda = machine.device == "cuda"
        self._counters = Counters()
        self.planner = Planner(machine, configured or settings(), self.quarantine, self._counters, live=live)
        self._plans: dict[PlanKey, Plan] = {}
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
                needs_grad(hidden_states, experts, topk_weights),
                self._on_cuda and torch.cuda.is_current_stream_capturing(),
                backend,
            )
        except AttributeError:
            check(hidden_states, experts, topk_weights, topk_ids)
            raise
        plan = self._plans.get(key)
        if plan is None:
            check(hidden_states, experts, topk_weights, topk_ids)
            # Where a gradient is wanted, the reference sees to it that whoever wants one stands in the graph.
            if not hidden_states.shape[0] and not needs_grad(hidden_states, experts, topk_weights):
                return hidden_states.clone()
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
            if calls == FAST_PATH_CALLS:
                self._prepare_fast_path(plan, inputs)
        else:
            self._counters.count(plan.choice.backend, ran=1)
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
        if hidden_states.shape[0] <= FAST_PATH_TOKENS:
            for _ in range(1, FAST_PATH_CALLS):
                self.forward(*inputs, backend)
        M, topk = topk_ids.shape
        problem = experts.problem(M, topk, hidden_states.dtype, self.machine.capability, "graph")
        for plan in self.planner.eligible(problem, experts, backend):
            try:
                self._first_run(plan, inputs)
            except Exception as error:
                if failures.lost_device(error):
                    raise self._device_lost(plan, error) from error
                if plan.explicit:
                    raise BackendFailedError(plan.choice.backend, problem, error, plan.remedy) from error
                if not failures.out_of_memory(error):
                    self._bar(plan, failures.summary(error))
                continue
            return

    def stats(self) -> dict[str, BackendStats]:
        """How often each backend ran, was replaced after a failure, and was quarantined, in this process."""
        total = self._counters.counts()
        with self._lock:
            for plan in self._plans.values():
                total.setdefault(plan.choice.backend, BackendStats()).ran += plan.calls
        return total

    # Plans.

    def _plan(self, key: PlanKey, experts: ExpertWeights) -> Plan:
        with self._lock:
            if found := self._plans.get(key):
                return found
            problem = self._problem(key, experts)
            plan = self.planner.plan(problem, experts, key[-1])
            plan.widens = key[5] is not torch.float32
            if plan.kept:
                if len(self._plans) >= MAX_PLANS:
                    for old in list(self._plans):
                        self._forget(old)
                self._plans[key] = plan
        if not plan.proven and problem.device == "cuda" and problem.mode == "eager":
            # What failed before this first run is not this backend's doing, and shows here.
            torch.cuda.synchronize(experts.device)
        return plan

    def _forget(self, key: PlanKey) -> None:
        with self._lock:
            if plan := self._plans.pop(key, None):
                self._counters.count(plan.choice.backend, ran=plan.calls)

    def _problem(self, key: PlanKey, experts: ExpertWeights) -> MoEProblem:
        _, _, _, (M, topk), act_dtype, _, _, _, needs_grad, capturing, _ = key
        mode: Mode = "graph" if capturing else "eager"
        return experts.problem(M, topk, act_dtype, self.machine.capability, mode, needs_grad=needs_grad)

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
        self.planner.prove(plan)
        return out

    def _prepare_fast_path(self, plan: Plan, inputs: Inputs) -> None:
        """Let the backend prepare for more calls of a kind; it may decline, and its trouble stays its own."""
        problem = plan.problem
        if problem.mode == "graph" or problem.M > FAST_PATH_TOKENS:
            return
        try:
            plan.run = plan.backend.fast_path(inputs, plan.config) or plan.run
        except Exception as error:
            if failures.lost_device(error):
                raise self._device_lost(plan, error) from error
            logger.info("%s did not prepare for %s: %s", plan.choice.backend, problem, failures.summary(error))

    def _recover(self, key: PlanKey, plan: Plan, error: Exception, inputs: Inputs) -> Tensor:
        name = plan.choice.backend
        if failures.lost_device(error):
            raise self._device_lost(plan, error) from error
        if plan.explicit:
            raise BackendFailedError(name, plan.problem, error, plan.remedy) from error
        if plan.problem.mode == "graph":
            # The capture is void whatever runs now; the next one finds the culprit barred.
            if failures.broken_capture(error):
                remedy = "The capture had failed before; what failed first is its cause."
            else:
                self._bar(plan, failures.summary(error))
                remedy = "It is avoided for such problems from now on: `warm_up`, then capture again."
            raise BackendFailedError(name, plan.problem, error, remedy) from error
        if failures.out_of_memory(error):
            return self._with_less_memory(plan, error, inputs)
        if name == LAST_RESORT:
            raise error
        self._bar(plan, failures.summary(error))
        warn_of_successor(name, plan.problem, failures.summary(error), self._plan(key, inputs[1]))
        return self.forward(*inputs)

    def _bar(self, plan: Plan, cause: str) -> None:
        """Quarantine a plan's backend for such problems, in this process, and drop the plans that use it there."""
        name, bucket = plan.choice.backend, plan.problem.bucket
        self.quarantine.bar(name, plan.problem, cause, fatal=False)
        with self._lock:
            self._counters.count(name, fell_back=1, quarantined=1)
            for other, held in list(self._plans.items()):
                if held.choice.backend == name and not held.explicit and held.problem.bucket == bucket:
                    self._forget(other)

    def _with_less_memory(self, plan: Plan, error: Exception, inputs: Inputs) -> Tensor:
        """Out of memory: whoever needs less workspace, then the call in halves along M, for this call only."""
        hidden_states, experts, topk_weights, topk_ids = inputs
        self._counters.count(plan.choice.backend, fell_back=1)
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
            self._counters.count(leaner.choice.backend, ran=1)
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
        eligible = list(self.planner.eligible(plan.problem, experts))
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
            self.quarantine.bar(name, suspect.problem, failures.summary(error), fatal=True)
        return DeviceLostError([name], error, certain=certain)

    def _warn_of_memory(self, plan: Plan, error: Exception, instead: str) -> None:
        if plan.choice.backend in self._warned_of_memory:
            return  # the halves of a call run out in turn, and the next call again
        self._warned_of_memory.add(plan.choice.backend)
        warn(
            f"backend {plan.choice.backend!r} ran out of memory on {plan.problem} ({failures.summary(error)}); "
            f"{instead}. Leave more memory free (a smaller KV cache, say) to avoid this."
        )


def _release(error: BaseException) -> None:
    """Let go of what a failed run had allocated: its frames hold it as long as the traceback lives."""
    traceback.clear_frames(error.__traceback__)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
