"""Calls over rows that came from several ranks: which backend takes them as they are, and stores where they belong."""

import contextlib
from typing import Any, Final

import torch
from torch import Tensor

from moe_dispatch.arrived_rows import ArrivedInputs, PeerRows, TravellingRows
from moe_dispatch.dispatch.counters import Counters
from moe_dispatch.dispatch.errors import BackendFailedError, DeviceLostError
from moe_dispatch.dispatch.first_calls import FIRST_CALLS
from moe_dispatch.dispatch.plan import Plan
from moe_dispatch.dispatch.planner import Planner
from moe_dispatch.dispatch.quarantine import Quarantine
from moe_dispatch.dispatch.recovery import Recovery, Runner
from moe_dispatch.dispatch.watched_runs import first_run
from moe_dispatch.guard import foreign_errors
from moe_dispatch.problem import Mode
from moe_dispatch.registry import LAST_RESORT
from moe_dispatch.system import failures

# Up to so many tokens an eager call takes the time of the host.
_FEW_TOKENS: Final = 256
_MAX_KINDS: Final = 4096  # Kinds of calls that are remembered; when full, all are forgotten.


class ArrivedCalls:
    """Runs `ArrivedInputs`.

    Quantised rows go to the first backend of the ranking that takes them. Where none does, or that one fails, they are
    dequantised for an ordinary call (`Dispatcher.forward`). Other rows go to the backend that the ranking puts first
    if that stores in peers' memory; else the call is an ordinary one. So is an eager call of few tokens, whose time is
    the host's: only ordinary calls have a fast path (`Backend.fast_path`).
    """

    def __init__(
        self, runner: Runner, planner: Planner, quarantine: Quarantine, counters: Counters, recovery: Recovery
    ) -> None:
        self._runner, self._planner, self._quarantine = runner, planner, quarantine
        self._counters, self._recovery = counters, recovery
        self._plans: dict[tuple[Any, ...], Plan | None] = {}
        self._proven: set[tuple[Any, ...]] = set()
        self._drops = 0  # how often plans were forgotten

    def forward(self, inputs: ArrivedInputs, backend: str | None = None) -> Tensor | PeerRows:
        """Compute the layer.

        Args:
            inputs: The rows, and what belongs to them.
            backend: The backend to run it; None to choose. It gets dequantised rows where it takes no others.

        Returns:
            ``[M, K]``, or `inputs.out` where the backend stored there.

        Raises:
            BackendFailedError: The backend was named and failed, or a CUDA graph is being captured.
            DeviceLostError: The CUDA context is gone.
        """
        experts = inputs.experts
        if experts.moved:
            experts.check_unchanged()
        try:
            capturing = experts.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        except RuntimeError as error:
            self._recovery.raise_if_lost(error)
            raise
        plan = self._plan(inputs, backend, "graph" if capturing else "eager")
        if plan is None:
            return self._ordinary(inputs, backend)
        try:
            out = self._run(plan, inputs, capturing=capturing)
        except foreign_errors() as error:
            self._book(plan, error, capturing=capturing)
            return self._ordinary(inputs, backend)
        self._runner.last_plan = plan
        self._counters.count(plan.choice.backend, ran=1)
        return out

    def warm_up(self, inputs: ArrivedInputs, backend: str | None = None) -> bool:
        """Run what an eager call and a captured one would run; returns whether no ordinary call is among these."""
        self.forward(inputs, backend)
        failed: set[str] = set()
        while (plan := self._plan(inputs, backend, "graph")) is not None and plan.choice.backend not in failed:
            try:
                self._run(plan, inputs, capturing=False)
            except foreign_errors() as error:
                self._book(plan, error, capturing=False)
                failed.add(plan.choice.backend)
                continue
            return True
        return False

    def forget_plans(self) -> None:
        """Plan every kind of call anew, as after a backend was barred."""
        self._drops += 1
        self._plans.clear()

    def _book(self, plan: Plan, error: BaseException, *, capturing: bool) -> None:
        """Bar the backend of a failed plan, or leave it out for a while; raise where no other may run the call."""
        if isinstance(error, DeviceLostError):
            raise error
        if failures.lost_device(error):
            raise self._recovery.device_lost(None if capturing else plan, error) from error
        if plan.explicit:
            raise BackendFailedError(plan.choice.backend, plan.problem, error, plan.remedy) from error
        if capturing:
            raise self._recovery.failed_capture(plan, error) from error
        if failures.out_of_memory(error):
            self._recovery.release(error)
            self._recovery.leave_out(plan, error, "an ordinary call runs instead")
        else:
            self._recovery.bar(plan, failures.summary(error))

    def _ordinary(self, inputs: ArrivedInputs, backend: str | None) -> Tensor:
        return self._runner.forward(*inputs.ordinary(), backend)

    def _plan(self, inputs: ArrivedInputs, backend: str | None, mode: Mode) -> Plan | None:
        """What runs a kind of call as it is; None if an ordinary call is to."""
        _, experts, _, topk_ids, out = inputs
        quantized = inputs.quantized
        key = (experts.spec, topk_ids.shape, topk_ids.dtype, inputs.act_dtype, quantized, out is None, backend, mode)
        with contextlib.suppress(KeyError):  # also where another thread forgets plans meanwhile
            return self._plans[key]
        M, topk = topk_ids.shape
        problem = experts.problem(M, topk, inputs.act_dtype, self._planner.machine.capability, mode)
        drops = self._drops
        plan: Plan | None = None
        with FIRST_CALLS:
            plans = self._planner.eligible(problem, experts, backend, into=True)
            if not quantized and out is not None and (mode == "graph" or M > _FEW_TOKENS):
                first = next(iter(plans), None)
                plan = first if first is not None and first.backend.stores_to_peers else None
            elif quantized and experts.dtype == "fp8":
                plan = next((each for each in plans if each.backend.takes_quantized_rows(problem)), None)
                if plan is not None and plan.choice.backend == LAST_RESORT and experts.device.type == "cuda":
                    plan = None  # the fastest backend on dequantised rows takes less time
        if len(self._plans) >= _MAX_KINDS:
            self._plans.clear()
        if self._drops == drops:  # else what it rests on may have changed meanwhile, and nothing would drop it
            self._plans[key] = plan
        return plan

    def _run(self, plan: Plan, inputs: ArrivedInputs, *, capturing: bool) -> Tensor | PeerRows:
        """Run a plan; for the first time see `watched_runs.first_run`."""
        rows, experts, topk_weights, topk_ids, peers = inputs
        out: Tensor | PeerRows
        if peers is not None and plan.backend.stores_to_peers:
            out = peers
        else:
            out = topk_weights.new_empty(topk_ids.shape[0], experts.K, dtype=inputs.act_dtype)
        if isinstance(rows, TravellingRows) and not plan.backend.starts_before_arrival:
            rows = rows.wait()
        arguments = (rows, experts, topk_weights, topk_ids, plan.config, out)
        proof = (plan.proof, type(rows), type(out))
        plan.proven = proof in self._proven
        if plan.proven:
            plan.run(*arguments)
            return out
        if not capturing:
            self._recovery.wait_for_earlier_work(experts.device)
        _, ended = first_run(plan, arguments, self._quarantine)
        if ended:
            self._proven.add(proof)
        return out
