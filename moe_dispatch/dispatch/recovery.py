"""What follows a run that failed: the next backend, less memory, or the error that names what is to blame."""

import traceback
from collections.abc import Iterable
from typing import Any, Protocol

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

    def drop_plans(self, backend: str, bucket: MoEProblem) -> None:
        """Drop the plans that a policy made for a backend, for problems of one bucket."""


class Recovery:
    """Recovers from failed runs. A backend is barred only once another one has run the same call.

    The planner gives the plans that could run in place of a failed one; quarantine and counters are told of every
    backend that failed a call that another one ran.
    """

    def __init__(self, runner: Runner, planner: Planner, quarantine: Quarantine, counters: Counters) -> None:
        self._runner, self._planner, self._quarantine, self._counters = runner, planner, quarantine, counters
        self._warned_of_memory: set[str] = set()

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
            raise self._failed_capture(plan, error) from error
        if not have_memory(inputs):
            return self.run_transformed(inputs)
        failed = [(plan, error)]
        faulty = set()  # backends that failed by themselves; of those that lacked memory another configuration may do
        if failures.out_of_memory(error):
            self._release(plan, error)
            successors = self._leaner_plans(plan, experts)
        else:
            faulty.add(name)
            successors = self._planner.eligible(problem, experts) if name != LAST_RESORT else ()
        for successor in successors:
            if successor.choice.backend in faulty:
                continue
            try:
                out = self._runner.first_run(successor, (*inputs, successor.config))
            except foreign_errors() as again:
                if failures.lost_device(again):
                    raise self.device_lost(successor, again) from again
                if failures.out_of_memory(again):
                    self._release(successor, again)
                else:
                    faulty.add(successor.choice.backend)
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

    def bar(self, plan: Plan, cause: str) -> None:
        """Quarantine a plan's backend for such problems, in this process, and drop the plans that use it there."""
        name = plan.choice.backend
        self._quarantine.bar(name, plan.problem, cause, fatal=False)
        self._counters.count(name, fell_back=1, quarantined=1)
        self._runner.drop_plans(name, plan.problem.bucket)

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

    def wait_for_earlier_work(self, device: torch.device) -> None:
        """See `first_calls.wait_for_earlier_work`."""
        wait_for_earlier_work(device, self._last_backend())

    def _last_backend(self, otherwise: Plan | None = None) -> list[str]:
        """The name of the backend that ran last, else that of a plan, if any."""
        last = self._runner.last_plan or otherwise
        return [last.choice.backend] if last else []

    def _failed_capture(self, plan: Plan, error: BaseException) -> BackendFailedError:
        """The capture is void whatever would run now; the next one finds the culprit barred."""
        if failures.broken_capture(error):
            remedy = "The capture had failed before; what failed first is its cause."
        else:
            self.bar(plan, failures.summary(error))
            remedy = "It is avoided for such problems from now on: `warm_up`, then capture again."
        return BackendFailedError(plan.choice.backend, plan.problem, error, remedy)

    def _leaner_plans(self, plan: Plan, experts: ExpertWeights) -> Iterable[Plan]:
        """The plans to try when memory runs out, the least workspace first.

        A call of several tokens can be split, so only plans that declare less workspace come before that, and not the
        reference, which needs little and takes long. One token cannot be split: then every plan is tried.
        """
        divisible = plan.problem.M > 1
        needed = plan.backend.workspace_bytes(plan.problem, plan.config)
        sized = [
            (other.choice.backend == LAST_RESORT, other.backend.workspace_bytes(other.problem, other.config), other)
            for other in self._planner.eligible(plan.problem, experts)
            if (other.choice.backend, other.config) != (plan.choice.backend, plan.config)
        ]
        ordered = sorted(sized, key=lambda entry: entry[:2])
        return [other for last, size, other in ordered if not divisible or (size < needed and not last)]

    def _book(self, failed: list[tuple[Plan, BaseException]], successor: Plan) -> None:
        """Bar and warn of what failed a call that `successor` ran. Memory may be there the next time."""
        for plan, error in failed:
            if not failures.out_of_memory(error):
                self.bar(plan, failures.summary(error))
                warn_of_successor(plan.choice.backend, plan.problem, failures.summary(error), successor)
                continue
            sizes = [each.backend.workspace_bytes(each.problem, each.config) for each in (successor, plan)]
            less = ", which needs less workspace," if sizes[0] < sizes[1] else ""
            self._warn_of_memory(plan, error, f"{successor.choice.backend!r}{less} runs instead")

    def _give_up(self, failed: list[tuple[Plan, BaseException]], inputs: Inputs) -> Tensor:
        """Nothing could run a call as it is: split it where memory was short, else raise."""
        hidden_states, experts, topk_weights, topk_ids = inputs
        plan, error = next((entry for entry in failed if failures.out_of_memory(entry[1])), failed[0])
        M = plan.problem.M
        if failures.out_of_memory(error) and M > 1:
            half = M // 2
            self._warn_of_memory(plan, error, f"the call is split along M into {half} and {M - half} tokens")
            parts = (slice(None, half), slice(half, None))
            grad = plan.problem.needs_grad
            return torch.cat([
                self._runner.forward(hidden_states[p], experts, topk_weights[p], topk_ids[p], None, None, grad)
                for p in parts
            ])  # fmt: skip
        if failures.out_of_memory(error):
            raise error
        last, cause = failed[-1]
        if last.choice.backend == LAST_RESORT:
            raise _callers_fault(cause) from cause
        for other, its_error in failed:
            self.bar(other, failures.summary(its_error))
        self._planner.plan(plan.problem, experts)  # raises, with every backend's reasons
        raise error

    def _release(self, plan: Plan, error: BaseException) -> None:
        """Let go of what a run that lacked memory had allocated: its frames live as long as the traceback."""
        self._counters.count(plan.choice.backend, fell_back=1)
        traceback.clear_frames(error.__traceback__)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _warn_of_memory(self, plan: Plan, error: BaseException, instead: str) -> None:
        if plan.choice.backend in self._warned_of_memory:
            return  # the halves of a call run out in turn, and the next call again
        self._warned_of_memory.add(plan.choice.backend)
        warn(
            f"backend {plan.choice.backend!r} ran out of memory on {plan.problem} ({failures.summary(error)}); "
            f"{instead}. Leave more memory free (a smaller KV cache, say) to avoid this."
        )


def _callers_fault(error: BaseException) -> InvalidInputError:
    return InvalidInputError(
        f"even {LAST_RESORT!r}, which runs every valid call, raised on this one: {failures.summary(error)}. Inside of "
        "torch.func.vmap, topk_ids cannot be mapped over"
    )
