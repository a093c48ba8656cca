"""The process in which candidates run, so that one that crashes, hangs or loses the device costs itself only.

Spoken to over two pipes in lines of JSON. Run as
``python -m moe_dispatch.policies.calibration.worker READ_FD WRITE_FD``.
"""

import json
import math
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import torch

from moe_dispatch.backend import Backend, BackendConfig
from moe_dispatch.machine import Machine
from moe_dispatch.measure import (
    Call,
    LayerInputs,
    Turns,
    backend_call,
    fast_path_call,
    make_inputs,
    reference_outputs,
    verify,
)
from moe_dispatch.measure.inputs import synchronize
from moe_dispatch.policies.calibration.placeholder_weights import placeholder_weights
from moe_dispatch.policies.measurements.schema import Layer
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import BACKENDS, make_backend
from moe_dispatch.system import failures
from moe_dispatch.workloads import ROUTINGS, make_experts, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_dispatch.experts import ExpertWeights

SEED: Final = 4
# Distinct inputs and routings that a timing runs over: enough that the weights of their experts together are many
# times what the cache holds, and not fewer than tell one routing's luck from another's.
MOST_INPUTS: Final = 8
CACHES: Final = 6
MANY_TOKENS: Final = 2048
# Tokens of a distribution whose fp32 truth is computed; the others must be finite.
CHECKED_TOKENS: Final = 1024
# Of memory, that a process which only compiles holds on to.
KEPT_BYTES: Final = 1 << 29
_DIE_WITH_PARENT: Final = 1  # PR_SET_PDEATHSIG


class Worker:
    """Answers requests about one layer at a time; weights are allocated once per layer."""

    def __init__(self) -> None:
        self._machine: Machine | None = None
        self._device = torch.device("cpu")
        self._layer: Layer | None = None
        self._experts: ExpertWeights | None = None
        self._M = 0
        self._inputs: dict[str, tuple[LayerInputs, ...]] = {}
        self._truths: dict[str, torch.Tensor] = {}
        # What was made ready for timing at this point; of one mode at a time, since graphs hold memory.
        self._turns: dict[tuple[str, str], Turns[str]] = {}
        self._calls: dict[tuple[str, str], Call] = {}
        self._backends: dict[str, Backend] = {}
        self._phantom: tuple[Layer, ExpertWeights] | None = None

    def start(self, device: str, backends: dict[str, str]) -> dict[str, Any]:
        """Look at the device; learn of backends that the parent process registered."""
        for name, target in backends.items():
            BACKENDS.register(name, target)
        self._device = torch.device(device)
        self._machine = Machine.inspect(self._device)
        if self._device.type == "cuda":
            # Triton and DeepGEMM launch on the current GPU, whatever the tensors say.
            torch.cuda.set_device(self._device)
        return {}

    def layer(self, layer: dict[str, Any]) -> dict[str, Any]:
        """Allocate a layer's weights in place of the last one's."""
        assert self._machine is not None  # noqa: S101 - `start` comes first
        self._layer, self._experts = Layer.model_validate(layer), None
        self._forget()
        self._phantom = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        generator = torch.Generator(self._device).manual_seed(SEED)
        problem = self._layer.problem(1, self._machine)
        with torch.no_grad():
            self._experts = make_experts(
                problem, self._layer.dtype, self._device, generator, act_dtype=self._layer.act_dtype
            )
        return {}

    def point(self, M: int, routings: list[str]) -> dict[str, Any]:
        """Make inputs and what fp32 makes of them, in place of the last token count's."""
        assert self._machine is not None and self._layer is not None and self._experts is not None  # noqa: S101, PT018
        if M != self._M:
            self._forget(M)
        problem = self._layer.problem(M, self._machine)
        missing = [routing for routing in routings if routing not in self._truths]
        for routing in missing:
            count = distinct_inputs(problem, self._machine)
            self._inputs[routing] = make_inputs(problem, ROUTINGS[routing], self._device, count, seed=SEED + M)
        if missing:
            checked = [self._inputs[routing][0] for routing in missing]
            truths = reference_outputs(self._experts, checked, tokens=CHECKED_TOKENS)
            self._truths |= dict(zip(missing, truths, strict=True))
        return {}

    def compile(self, layer: dict[str, Any], M: int, backend: str, config: dict[str, Any]) -> dict[str, Any]:
        """Run one candidate on M tokens that nobody serves, which compiles it; see `compile_ahead`."""
        assert self._machine is not None  # noqa: S101 - `start` comes first
        asked = Layer.model_validate(layer)
        problem = asked.problem(M, self._machine)
        if self._phantom is None or self._phantom[0] != asked:
            self._phantom = None
            self._phantom = asked, placeholder_weights(problem, self._device)
        hidden = torch.zeros(M, asked.K, dtype=torch_dtype(asked.act_dtype), device=self._device)
        weights = torch.zeros(M, asked.topk, device=self._device)
        ids = torch.full((M, asked.topk), -1, dtype=torch.int32, device=self._device)
        made = self._backend(backend)
        with torch.no_grad():
            made.run(hidden, self._phantom[1], weights, ids, made.config_type.model_validate(config))
        synchronize(self._device)
        # What torch keeps for the next call would be wanting to the processes that compile beside this one.
        if self._device.type == "cuda" and torch.cuda.memory_reserved(self._device) > KEPT_BYTES:
            del hidden, weights, ids
            torch.cuda.empty_cache()
        return {}

    def launch(self, M: int, routing: str, backend: str, config: dict[str, Any]) -> dict[str, Any]:
        """Run one candidate once, which compiles it, and again by the clock."""
        _, _, call = self._call(backend, config)
        given = self._inputs_of(M, routing)[0]
        with torch.no_grad():
            call(given)
            synchronize(self._device)
            begin = time.perf_counter()
            call(given)
            synchronize(self._device)
        return {"us": 1e6 * (time.perf_counter() - begin)}

    def check(
        self, M: int, mode: str, routings: list[str], backend: str, config: dict[str, Any], tolerance: float
    ) -> dict[str, Any]:
        """Hold one candidate against fp32, and its runs against each other."""
        made, chosen, call = self._call(backend, config)
        verdict = verify(
            call,
            [self._inputs_of(M, routing)[0] for routing in routings],
            [self._truths[routing] for routing in routings],
            tolerance=tolerance,
            mode="graph" if mode == "graph" else "eager",
            deterministic=made.deterministic(chosen),
        )
        if not verdict.ok:
            return {"wrong": f"wrong (inputs: {', '.join(routings)}): {verdict.reason}"}
        return {"error": verdict.error}

    def time(
        self,
        M: int,
        mode: str,
        routing: str,
        candidates: list[tuple[str, dict[str, Any]]],
        budget_s: float,
        rounds: int,
    ) -> dict[str, Any]:
        """Time candidates that take turns: the µs of each in every round."""
        inputs = self._inputs_of(M, routing)
        failed: dict[str, str] = {}

        def on_failure(name: str, error: Exception) -> None:
            if failures.lost_device(error):
                raise error
            failed[str(names.index(name))] = failures.summary(error)

        names = [json.dumps(candidate) for candidate in candidates]
        timings = self._turns_of(mode, routing).time(
            {
                name: self._timed_call(name, *candidate, mode, inputs[0])
                for name, candidate in zip(names, candidates, strict=True)
            },
            budget_s=budget_s,
            min_rounds=rounds,
            on_failure=on_failure,
        )
        return {"us": {str(names.index(name)): timing.rounds for name, timing in timings.items()}, "failed": failed}

    def _call(self, backend: str, config: dict[str, Any]) -> tuple[Backend, BackendConfig, Call]:
        assert self._experts is not None  # noqa: S101 - the parent keeps the order
        made = self._backend(backend)
        chosen = made.config_type.model_validate(config)
        return made, chosen, backend_call(made, self._experts, chosen)

    def _timed_call(self, name: str, backend: str, config: dict[str, Any], mode: str, given: LayerInputs) -> Call:
        """As `moe_forward` makes it: in its steady state, and the backend's own run while a graph is captured."""
        if (found := self._calls.get((mode, name))) is None:
            made, chosen, found = self._call(backend, config)
            if mode == "eager":
                assert self._experts is not None  # noqa: S101 - `_call` saw to it
                found = fast_path_call(made, self._experts, chosen, given)
            self._calls[mode, name] = found
        return found

    def _turns_of(self, mode: str, routing: str) -> Turns[str]:
        if any(other != mode for other, _ in self._turns):
            self._forget_turns()
        if (mode, routing) not in self._turns:
            pool = next((turns.pool for turns in self._turns.values()), None)
            inputs = self._inputs_of(self._M, routing)
            self._turns[mode, routing] = Turns(inputs, mode="graph" if mode == "graph" else "eager", pool=pool)
        return self._turns[mode, routing]

    def _forget_turns(self) -> None:
        while self._turns:
            self._turns.popitem()[1].close()
        self._calls = {}

    def _forget(self, M: int = 0) -> None:
        """Let go of a point."""
        self._forget_turns()
        self._M, self._inputs, self._truths = M, {}, {}

    def _backend(self, name: str) -> Backend:
        assert self._machine is not None  # noqa: S101 - `start` comes first
        if name not in self._backends:
            self._backends[name] = make_backend(name, self._machine).require()
        return self._backends[name]

    def _inputs_of(self, M: int, routing: str) -> tuple[LayerInputs, ...]:
        assert self._M == M, f"point M={self._M} is prepared, not M={M}"  # noqa: S101 - the parent keeps the order
        return self._inputs[routing]


def distinct_inputs(problem: MoEProblem, machine: Machine) -> int:
    """How many inputs a timing runs over."""
    least = 1 if problem.M >= MANY_TOKENS else 2
    read = problem.expected_experts * problem.expert_bytes
    return max(least, min(MOST_INPUTS, math.ceil(CACHES * machine.l2_bytes / read)))


def serve(read: int, write: int) -> None:
    """Answer until the parent closes its end."""
    worker = Worker()
    operations: dict[str, Callable[..., dict[str, Any]]] = {
        "start": worker.start, "layer": worker.layer, "point": worker.point,
        "compile": worker.compile, "launch": worker.launch, "check": worker.check, "time": worker.time,
    }  # fmt: skip
    with os.fdopen(read, encoding="utf-8") as requests, os.fdopen(write, "w", encoding="utf-8") as answers:
        for line in requests:
            request = json.loads(line)
            try:
                answer = operations[request.pop("op")](**request)
            except Exception as error:  # noqa: BLE001 - whatever a candidate raises is its own failure, told to the parent
                answer = {
                    "raised": failures.summary(error),
                    "memory": failures.out_of_memory(error),
                    "lost": failures.lost_device(error),
                }
            print(json.dumps(answer), file=answers, flush=True)


def _die_with_parent() -> None:
    """A candidate that hangs must not outlive a parent that was killed."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


if __name__ == "__main__":
    _die_with_parent()
    serve(int(sys.argv[1]), int(sys.argv[2]))
