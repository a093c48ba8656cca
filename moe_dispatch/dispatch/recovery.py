"""What follows a run that failed: the next backend, less memory, or the error that names what is to blame."""

import logging
import math
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from moe_dispatch.backend import Inputs
from moe_dispatch.dispatch.checks import check, have_memory
from moe_dispatch.dispatch.counters import Counters
from moe_dispatch.dispatch.errors import BackendFailedError, DeviceLostError
from moe_dispatch.dispatch.first_calls import wait_for_earlier_work
from moe_dispatch.dispatch.plan import Plan
from moe_dispatch.dispatch.planner import Planner, warn_of_successor
from moe_dispatch.dispatch.quarantine import Quarantine
from moe_dispatch.errors import InvalidInputError, warn
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.guard import foreign_errors
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import LAST_RESORT
from moe_dispatch.system import failures

logger = logging.getLogger("moe_dispatch")

_MORE_MEMORY: Final = "Leave more memory free (a smaller KV cache, say) to avoid this."


class Runner(Protocol):
    """What recovery needs of the dispatcher."""

    last_plan: Plan | None

    def forward(
        self, hidden_states: Tensor, experts: ExpertWeights, topk_weights: Tensor, topk_ids: Tensor,
        backend: str | None = None, out: Tensor | None = None, grad: bool = False, /,
    ) -> Tensor:  # fmt: skip
        """Run a call."""

    def first_run(self, plan: Plan, call: tuple[Any, ...]) -> Tensor:
        """Run a plan for the first time; `call` has the arguments of its `run`."""

    def drop_plans(self, concerned: Callable[[Plan], bool]) -> None:
        """Drop the plans that a policy made and that this says are concerned."""


class Recovery:
    """Recovers from failed runs. A backend is barred only once another one has run the same call.

    The planner gives the plans that could run in place of a failed one; quarantine and counters are told of every
    backend that failed a call that another one ran.
    """

    def __init__(self, runner: Runner, planner: Planner, quarantine: Quarantine, counters: Counters) -> None:
        self._runner, self._planner, self._quarantine, self._counters = runner, planner, quarantine, counters

    def recover(self, plan: Plan, error: BaseException, inputs: Inputs) -> Tensor:
        """Compute a call on which a plan raised.

        Raises:
            InvalidInputError: The arguments are to blame: weights changed since they were wrapped, or the reference
                raised as well.
            BackendFailedError: The backend was named, or a CUDA graph is being captured.
            DeviceLostError: The CUDA context is gone.
            NoBackendError: Nothing else can run the call, and the reference is disabled.
        """
        name, problem, experts = plan.choice.backend, plan.problem, inputs[1]
        if failures.lost_device(error):
            # A capture awaits nothing, so that what it reports may be the error of any work before it.
            raise self.device_lost(None if problem.mode == "graph" else plan, error) from error
        try:
            check(*inputs)
        except InvalidInputError as invalid:
            raise invalid from error
        if plan.explicit:
            raise BackendFailedError(name, problem, error, plan.remedy) from error
        if problem.mode == "graph":
            raise self.failed_capture(plan, error) from error
        if not have_memory(inputs):
            return self.run_transformed(inputs)
        failed = [(plan, error)]
        self.release(error)
        for successor in self._successors(problem, experts, failed):
            try:
                out = self._runner.first_run(successor, (*inputs, successor.config))
            except foreign_errors() as again:
                if failures.lost_device(again):
                    raise self.device_lost(successor, again) from again
                self.release(again)
                failed.append((successor, again))
                continue
            self._book(failed, successor)
            self._counters.count(successor.choice.backend, ran=1)
            return out
        return self._give_up(failed, inputs)

    def run_transformed(self, inputs: Inputs, backend: str | None = None, out: Tensor | None = None) -> Tensor:
        """Run a call inside of one of torch.func's transforms, whose tensors have no memory that a kernel could read.

        Only the reference can: it is made of torch's own operations.

        Raises:
            InvalidInputError: Torch cannot transform the reference either, as where vmap maps over topk_ids; another
                backend is named; or memory for the output is given.
        """
        if out is not None:
            raise InvalidInputError("out cannot be given inside of torch.func's transforms; leave it out")
        if backend not in (None, LAST_RESORT):
            raise InvalidInputError(f"backend {backend!r} cannot run inside of torch.func's transforms; leave it out")
        hidden_states, experts, topk_weights, topk_ids = inputs
        M, topk = topk_ids.shape
        problem = experts.problem(M, topk, hidden_states.dtype, self._planner.machine.capability)
        plan = self._planner.plan(problem, experts, LAST_RESORT)
        try:
            return plan.run(hidden_states, experts, topk_weights.float(), topk_ids, plan.config)
        except foreign_errors() as error:
            self.raise_if_lost(error)
            raise _callers_fault(error) from error

    def in_halves(self, inputs: Inputs, *, grad: bool) -> Tensor:
        """Compute a call of several tokens as two calls, because memory lacks for all of it at once."""
        return torch.cat([self._runner.forward(*half, None, None, grad) for half in halves(inputs)])

    def bar(self, plan: Plan, cause: str) -> bool:
        """Quarantine a plan's backend for such problems, in this process, and drop the plans that use it there.

        Returns:
            Whether it was not barred there before, as by another thread that met the same failure.
        """
        name, bucket = plan.choice.backend, plan.problem.bucket
        is_new = self._quarantine.bar(name, plan.problem, cause, fatal=False)
        self._counters.count(name, fell_back=1, quarantined=is_new)
        self._runner.drop_plans(lambda other: other.choice.backend == name and other.problem.bucket == bucket)
        return is_new

    def device_lost(self, plan: Plan | None, error: BaseException) -> DeviceLostError:
        """The error for a lost CUDA context. A plan in its first run is the culprit, which was awaited and watched.

        Otherwise, or outside of any run (None), CUDA reports the error of some earlier run, and the plan that ran last
        is only a suspect.
        """
        if plan is not None and not plan.proven and plan.choice.backend != LAST_RESORT:
            name = plan.choice.backend
            self._quarantine.bar(name, plan.problem, failures.summary(error), fatal=True)
            return DeviceLostError([name], error)
        return DeviceLostError(self._last_backend(plan), error, certain=False)

    def raise_if_lost(self, error: BaseException) -> None:
        """Raise DeviceLostError where an error that came up outside of any run says that the CUDA context is gone."""
        if failures.lost_device(error):
            raise self.device_lost(None, error) from error

    def failed_capture(self, plan: Plan, error: BaseException) -> BackendFailedError:
        """The capture is void whatever would run now; the next one finds the culprit barred."""
        if failures.broken_capture(error):
            remedy = "The capture had failed before; what failed first is its cause."
        else:
            remedy = "It is avoided for such problems from now on: `warm_up`, then capture again."
            if not failures.out_of_memory(error):
                self.bar(plan, failures.summary(error))
            elif not self.leave_out(plan, error, "the capture is void"):
                remedy = "Nothing else may run this call: leave more memory free, and capture again."
        return BackendFailedError(plan.choice.backend, plan.problem, error, remedy)

    def wait_for_earlier_work(self, device: torch.device) -> None:
        """See `first_calls.wait_for_earlier_work`."""
        wait_for_earlier_work(device, self._last_backend())

    def _last_backend(self, otherwise: Plan | None = None) -> list[str]:
        """The name of the backend that ran last, else that of a plan, if any."""
        last = self._runner.last_plan or otherwise
        return [last.choice.backend] if last else []

    def _successors(
        self, problem: MoEProblem, experts: ExpertWeights, failed: list[tuple[Plan, BaseException]]
    ) -> Iterator[Plan]:
        """The plans to try in place of those that failed, in the policies' order; the caller adds to `failed`.

        Of a backend that lacked memory another configuration may do. A call of several tokens can be split, so what
        takes no less workspace than what lacked memory is not tried for it then, and neither is the reference, which
        needs little and takes long.
        """
        if failed[0][0].choice.backend == LAST_RESORT and not failures.out_of_memory(failed[0][1]):
            return
        for plan in self._planner.eligible(problem, experts):
            name, config = plan.choice.backend, plan.config
            lacking = [other for other, error in failed if failures.out_of_memory(error)]
            if any(
                name == other.choice.backend and (other not in lacking or config == other.config) for other, _ in failed
            ):
                continue
            least = min(map(_workspace, lacking), default=math.inf) if problem.M > 1 else math.inf
            if least < math.inf and (name == LAST_RESORT or _workspace(plan) >= least):
                continue
            yield plan

    def _book(self, failed: list[tuple[Plan, BaseException]], successor: Plan) -> None:
        """Bar and warn of what failed a call that `successor` ran, or leave it out for a while where memory lacked."""
        for plan, error in failed:
            if not failures.out_of_memory(error):
                if self.bar(plan, failures.summary(error)):
                    warn_of_successor(plan.choice.backend, plan.problem, failures.summary(error), successor)
                continue
            less = ", which needs less workspace," if _workspace(successor) < _workspace(plan) else ""
            self.leave_out(plan, error, f"{successor.choice.backend!r}{less} runs instead")

    def _give_up(self, failed: list[tuple[Plan, BaseException]], inputs: Inputs) -> Tensor:
        """Nothing could run a call as it is: split it where memory was short, else raise."""
        plan, error = next((entry for entry in failed if failures.out_of_memory(entry[1])), failed[0])
        M = plan.problem.M
        if failures.out_of_memory(error) and M > 1:
            for other, its_error in failed:
                if failures.out_of_memory(its_error):
                    half = M // 2
                    self.leave_out(other, its_error, f"the call is split along M into {half} and {M - half} tokens")
            return self.in_halves(inputs, grad=plan.problem.needs_grad)
        if failures.out_of_memory(error):
            raise error
        last, cause = failed[-1]
        if last.choice.backend == LAST_RESORT:
            raise _callers_fault(cause) from cause
        for other, its_error in failed:
            self.bar(other, failures.summary(its_error))
        self._planner.plan(plan.problem, inputs[1])  # raises, with every backend's reasons
        raise error

    def release(self, error: BaseException) -> None:
        """Let go of what a run that lacked memory had allocated: its frames live as long as the traceback."""
        if failures.out_of_memory(error):
            traceback.clear_frames(error.__traceback__)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def leave_out(self, plan: Plan, error: BaseException, instead: str) -> bool:
        """Leave what ran out of memory out of calls of this size or larger (`fitting.py`), with one warning a layer.

        Args:
            plan: What ran out.
            error: What it raised.
            instead: What the call does without it.

        Returns:
            Whether it is left out: the reference never is of calls that nothing else may run.
        """
        name, problem, cause = plan.choice.backend, plan.problem, failures.summary(error)
        self._counters.count(name, fell_back=1)
        if name == LAST_RESORT and (problem.M <= 1 or problem.needs_grad):  # beside it there is nothing for them
            if self._planner.fitting.is_news(name, problem):
                warn(f"backend {name!r} ran out of memory on {problem} ({cause}); {instead}. {_MORE_MEMORY}")
            return False
        shortage, is_first = self._planner.fitting.ran_out(name, problem, plan.config, cause)
        if not is_first:  # the halves of a call run out in turn, other threads at the same time, and later tries again
            logger.info("%s ran out of memory again on %s: %s", name, problem, cause)
            return True
        warn(
            f"backend {name!r} ran out of memory on {problem} ({cause}); {instead}. It is left out of this layer's "
            f"calls of at least {shortage.least_tokens} tokens, and tried again after {shortage.wait} of them. "
            f"{_MORE_MEMORY}"
        )
        return True


def halves(inputs: Inputs) -> tuple[Inputs, Inputs]:
    """The two calls that together are one."""
    hidden_states, experts, topk_weights, topk_ids = inputs
    middle = hidden_states.shape[0] // 2
    first, second = (
        (hidden_states[part], experts, topk_weights[part], topk_ids[part])
        for part in (slice(None, middle), slice(middle, None))
    )
    return first, second


def _workspace(plan: Plan) -> int:
    return plan.backend.workspace_bytes(plan.problem, plan.config)


def _callers_fault(error: BaseException) -> InvalidInputError:
    return InvalidInputError(
        f"even {LAST_RESORT!r}, which runs every valid call, raised on this one: {failures.summary(error)}. Inside of "
        "torch.func.vmap, topk_ids cannot be mapped over"
    )
