"""From a call to a running backend: one look-up for a kind of call that is known, everything else once per kind."""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from moe_dispatch.arrived_rows import ArrivedInputs
from moe_dispatch.backend import Inputs
from moe_dispatch.dispatch import torch_operator, watched_runs
from moe_dispatch.dispatch.arrived_calls import ArrivedCalls
from moe_dispatch.dispatch.checks import check, check_out, have_memory, kind_of_out, may_overlap
from moe_dispatch.dispatch.counters import BackendStats, Counters
from moe_dispatch.dispatch.errors import BackendFailedError
from moe_dispatch.dispatch.fitting import Shortage
from moe_dispatch.dispatch.internals import is_tracing
from moe_dispatch.dispatch.plan import Plan
from moe_dispatch.dispatch.planner import Planner
from moe_dispatch.dispatch.quarantine import Quarantine
from moe_dispatch.dispatch.recovery import Recovery, halves
from moe_dispatch.dispatch.settled_plans import SETTLING_CALLS, SettledPlans
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.guard import foreign_errors
from moe_dispatch.machine import Machine
from moe_dispatch.problem import Mode, MoEProblem
from moe_dispatch.settings import Settings, settings
from moe_dispatch.system import failures

logger = logging.getLogger("moe_dispatch")

MAX_PLANS: Final = 65536  # Plan-cache bound; when full, the oldest plan is dropped.
FAST_PATH_CALLS: Final = 2  # A backend may prepare for a kind of call (`Backend.fast_path`) after as many runs.
PlanKey = tuple[Any, ...]  # all that a plan depends on, as `Dispatcher._forward` puts it together
_SPEC, _SHAPE, _WEIGHTS_DTYPE, _BACKEND, _OUT = 0, 1, 5, -2, -1  # places in it


class Dispatcher:
    """Runs on one machine what its planner chooses.

    No lock is held while a backend's or a policy's code runs.

    Args:
        machine: The machine whose capability and versions decide.
        configured: The values of the environment variables; they are read if None.
        live: Whether `machine` is this one. A described machine is only explained; see `Planner`.
        barred: Backends that policies may not choose, each with the reason.

    Attributes:
        planner: Chooses the backend for a kind of call.
        quarantine: Remembers which backends failed.
        arrived: Runs calls over rows that came from several ranks.
        one_of_several_gpus: Whether a call may arrive while another GPU than this one is the current device.
        last_plan: The plan that ran last, a suspect when the CUDA context is lost.
    """

    def __init__(
        self,
        machine: Machine,
        configured: Settings | None = None,
        *,
        live: bool = True,
        barred: Mapping[str, str] | None = None,
    ) -> None:
        self.machine = machine
        self.quarantine = Quarantine(machine)
        self.one_of_several_gpus = live and machine.device == "cuda" and torch.cuda.device_count() > 1
        self._on_cuda = machine.device == "cuda"
        self._counters = Counters()
        self.planner = Planner(
            machine, configured or settings(), self.quarantine, self._counters, live=live, barred=barred or {}
        )
        self._recovery = Recovery(self, self.planner, self.quarantine, self._counters)
        self.arrived = ArrivedCalls(self, self.planner, self.quarantine, self._counters, self._recovery)
        self.planner.fitting.changed = self._drop_plans_without_memory
        self._plans: dict[PlanKey, Plan] = {}
        self._drops = 0  # how often plans were dropped
        # Of calls that passed every check, by all of their key but the token count: a problem of some token count.
        self._checked: dict[PlanKey, MoEProblem] = {}
        self._settled = SettledPlans[Plan](on_cuda=self._on_cuda)
        self.last_plan: Plan | None = None
        self._lock = threading.RLock()

    def forward(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        backend: str | None = None,
        out: Tensor | None = None,
        grad: bool = False,
    ) -> Tensor:
        """See `moe_dispatch.moe_forward`; the layer's GPU is the current device.

        With `grad` the backend's operations have to be differentiable one by one (`gradients.needs_grad`).
        """
        plan = None
        if out is None and not grad:
            plan = self._settled.find(hidden_states, experts, topk_weights, topk_ids, backend)
        if plan is None:
            return self._forward(hidden_states, experts, topk_weights, topk_ids, backend, out, grad=grad)
        try:
            if plan.widens:
                topk_weights = topk_weights.float()
            result = plan.run(hidden_states, experts, topk_weights, topk_ids, plan.config)
        except foreign_errors() as error:
            return self._recovery.recover(plan, error, (hidden_states, experts, topk_weights, topk_ids))
        self.last_plan = plan
        with plan.lock:
            plan.calls += 1
        return result

    def _forward(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        backend: str | None,
        out: Tensor | None,
        *,
        grad: bool,
    ) -> Tensor:
        """`forward` of a call of any kind.

        The key holds everything that a check, a policy or a backend may ask of a call, so a kind of call that is known
        needs none of them, and one that differs from such a kind in its token count alone is planned and not checked.
        Weights at another address than before are checked again.
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
                grad,
                self._on_cuda and torch.cuda.is_current_stream_capturing(),
                backend,
                None if out is None else kind_of_out(out),
            )
            plan = self._plans.get(key)
            if experts.moved:
                experts.check_unchanged()
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            self._recovery.raise_if_lost(error)
            # No tensors, or tensors without a shape or an address; check() says which.
            arguments = (hidden_states, experts, topk_weights, topk_ids)
            check(*arguments, backend)
            if out is not None and not isinstance(out, Tensor):
                check_out(out, arguments, needs_grad=False)  # raises
            return self._recovery.run_transformed(arguments, backend, out)
        if plan is None:
            arguments = (hidden_states, experts, topk_weights, topk_ids)
            if is_tracing():
                return torch_operator.call(*arguments, backend, out)  # which runs the call outside of the trace
            alike = self._check(key, arguments, backend)
            if out is not None:
                check_out(out, arguments, needs_grad=grad)
            if not hidden_states.shape[0] and not grad:
                self.planner.named(backend)
                return hidden_states.clone() if out is None else out
            if alike is None:
                return self._recovery.run_transformed(arguments, backend, out)
            # The reference puts every tensor that requires a gradient into the graph, without a token too.
            plan = self._plan(key, alike, experts)
            if plan.halved:
                result = self._recovery.in_halves(arguments, grad=grad)
                return result if out is None else out.copy_(result)
        try:
            weights = topk_weights.float() if plan.widens else topk_weights
            inputs = (hidden_states.contiguous(), experts, weights.contiguous(), topk_ids.contiguous())
        except RuntimeError as error:
            self._recovery.raise_if_lost(error)
            check(hidden_states, experts, topk_weights, topk_ids, backend)  # such as sparse tensors
            raise
        # Addresses may differ from call to call. Outside of the next try, for it is the caller's fault.
        if out is not None and may_overlap(out, inputs):
            check_out(out, inputs, needs_grad=False)  # raises
        try:
            call = (*inputs, plan.config, out) if plan.into else (*inputs, plan.config)
            result = plan.run(*call) if plan.proven else self.first_run(plan, call)
            if out is not None and not out.is_inference():
                increment_version(out)  # a kernel leaves it, and autograd would take what it saved for unchanged
        except foreign_errors() as error:
            result = self._recovery.recover(plan, error, inputs)
            return result if out is None else out.copy_(result)
        self.last_plan = plan
        if plan.kept:
            self._settle(key, plan, inputs, (hidden_states, experts, topk_weights, topk_ids))
        else:
            self._counters.count(plan.choice.backend, ran=1)
        return result

    def warm_up(self, inputs: Inputs | ArrivedInputs, backend: str | None = None, out: Tensor | None = None) -> None:
        """Run what an eager call and a captured one would run, so that capturing this M compiles nothing.

        The inputs are as for `forward`, or those of a call over rows that came from several ranks.
        """
        if isinstance(inputs, ArrivedInputs):
            if self.arrived.warm_up(inputs, backend):
                return
            inputs = inputs.ordinary()
        self.forward(*inputs, backend, out)
        if inputs[1].device.type != "cuda":
            return
        for _ in range(1, FAST_PATH_CALLS):
            self.forward(*inputs, backend, out)
        self._prepare_capture(inputs, backend, out)

    def _prepare_capture(self, inputs: Inputs, backend: str | None, out: Tensor | None) -> None:
        """Run what a captured call would run."""
        hidden_states, experts, _, topk_ids = inputs
        M, topk = topk_ids.shape
        problem = experts.problem(M, topk, hidden_states.dtype, self.machine.capability, "graph")
        if backend is None and self.planner.is_halved(problem, experts):
            for half in halves(inputs):
                self._prepare_capture(half, None, None)  # which run so, and are copied to `out`
            return
        for plan in self.planner.eligible(problem, experts, backend, into=out is not None):
            self._recovery.wait_for_earlier_work(experts.device)
            try:
                self.first_run(plan, (*inputs, plan.config) if out is None else (*inputs, plan.config, out))
            except foreign_errors() as error:
                if failures.lost_device(error):
                    raise self._recovery.device_lost(plan, error) from error
                if plan.explicit:
                    raise BackendFailedError(plan.choice.backend, problem, error, plan.remedy) from error
                if failures.out_of_memory(error):
                    self._recovery.release(error)
                    if self._recovery.leave_out(plan, error, "a capture does without it"):
                        self._prepare_capture(inputs, backend, out)
                        return
                else:
                    self._recovery.bar(plan, failures.summary(error))
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

    def _check(self, key: PlanKey, arguments: Inputs, backend: str | None) -> MoEProblem | None:
        """Refuse a call that is at fault, unless one that differs in its token count at most is known to be sound.

        Returns:
            The problem of that call, or of this one; None if the tensors have no memory.
        """
        any_tokens = _without_tokens(key)
        if (problem := self._checked.get(any_tokens)) is not None and have_memory(arguments):
            return problem
        check(*arguments, backend)
        if not have_memory(arguments):
            return None
        _, _, _, (M, topk), act_dtype, *_, grad, capturing, _, _ = key
        mode: Mode = "graph" if capturing else "eager"
        problem = arguments[1].problem(M, topk, act_dtype, self.machine.capability, mode, needs_grad=grad)
        with self._lock:
            if len(self._checked) >= MAX_PLANS:
                self._checked.clear()
            self._checked[any_tokens] = problem
        return problem

    def _plan(self, key: PlanKey, alike: MoEProblem, experts: ExpertWeights) -> Plan:
        """The plan for a key; `alike` differs from the problem in its token count at most."""
        problem, drops = alike.with_tokens(key[_SHAPE][0]), self._drops
        plan = self.planner.plan(problem, experts, key[_BACKEND], into=key[_OUT] is not None)
        plan.widens = key[_WEIGHTS_DTYPE] is not torch.float32
        if plan.kept:
            with self._lock:
                if len(self._plans) >= MAX_PLANS:
                    self._forget(next(iter(self._plans)))
                if self._drops == drops:
                    plan = self._plans.setdefault(key, plan)  # another thread may have been faster
                else:  # what it rests on may have changed meanwhile, and nothing would drop it
                    plan.kept = False
        if not plan.proven and problem.mode == "eager":
            self._recovery.wait_for_earlier_work(experts.device)
        return plan

    def _forget(self, key: PlanKey) -> None:
        if plan := self._plans.pop(key, None):
            plan.kept = False  # a call that runs it now is counted by itself
            self._settled.forget(plan, key[_SPEC], key[_SHAPE], key[_BACKEND])
            self._counters.count(plan.choice.backend, ran=plan.calls)

    def _settle(self, key: PlanKey, plan: Plan, inputs: Inputs, arguments: Inputs) -> None:
        """Count a call, and make a kind that comes often cheap: by the backend's fast path, then by settling its plan.

        The plan has just run the inputs; `arguments` are the same as the caller gave them.
        """
        with plan.lock:
            plan.calls = calls = plan.calls + 1
        if calls == FAST_PATH_CALLS:
            self._prepare_fast_path(plan, inputs)
        if calls < SETTLING_CALLS or plan.into or plan.problem.mode != "eager":
            return
        hidden_states, _, *rest = arguments
        if all(tensor.is_contiguous() for tensor in (hidden_states, *rest)):
            with self._lock:
                if self._plans.get(key) is plan:
                    self._settled.keep(plan, arguments, key[_BACKEND])

    def drop_plans(self, concerned: Callable[[Plan], bool]) -> None:
        """Drop the plans that a policy made and that this says are concerned."""
        self.arrived.forget_plans()
        with self._lock:
            self._drops += 1
            for key, plan in list(self._plans.items()):
                if not plan.explicit and concerned(plan):
                    self._forget(key)

    def _drop_plans_without_memory(self, shortage: Shortage) -> None:
        self.planner.forget_neighbours()
        self.drop_plans(lambda plan: shortage.concerns(plan.problem))

    # First runs.

    def first_run(self, plan: Plan, call: tuple[Any, ...]) -> Tensor:
        """Run a plan for the first time; see `watched_runs.first_run`."""
        result, ended = watched_runs.first_run(plan, call, self.quarantine)
        if ended:
            self.planner.prove(plan)
        return cast("Tensor", result)

    def _prepare_fast_path(self, plan: Plan, inputs: Inputs) -> None:
        """Let the backend prepare for more calls of a kind. It may decline, and a failure leaves things as they are."""
        problem = plan.problem
        if problem.mode == "graph":
            return
        try:
            prepare = plan.backend.fast_path_into if plan.into else plan.backend.fast_path
            run = prepare(inputs, plan.config)
            if run is None:
                return
            if plan.backend.needs_probe:
                call = (*inputs, plan.config, *([torch.empty_like(inputs[0])] if plan.into else ()))
                watched_runs.check_result(run(*call), call)
        except foreign_errors() as error:
            if failures.lost_device(error):
                raise self._recovery.device_lost(plan, error) from error
            logger.info("%s did not prepare for %s: %s", plan.choice.backend, problem, failures.summary(error))
            return
        plan.use(run)


def _without_tokens(key: PlanKey) -> PlanKey:
    """What the calls of a key have in common with those of another token count; empty where M is not the same for all.

    Nothing that `check` asks depends on M otherwise. Memory for the output is checked in every new kind of call.
    """
    spec, rows, weights, ids, *rest, _ = key
    agree = weights == ids and len(rows) == len(ids) == 2 and rows[0] == ids[0]
    return (spec, rows[1], ids[1], *rest) if agree else ()
