"""The process in which candidates run, so that a crash, a hang or a lost device costs only the candidate at work.

The parent talks to it over two pipes, one line of JSON for each request and each answer. It is started as
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
from moe_dispatch.guard import foreign_errors
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
from moe_dispatch.measure.energy import energy_meter, joules_per_call
from moe_dispatch.measure.inputs import synchronize
from moe_dispatch.policies.calibration.memory import input_bytes, require, weight_bytes
from moe_dispatch.policies.calibration.placeholder_weights import placeholder_weights
from moe_dispatch.policies.measurements.schema import LayerShape
from moe_dispatch.problem import Mode, MoEProblem
from moe_dispatch.registry import BACKENDS, make_backend
from moe_dispatch.system import failures
from moe_dispatch.workloads import ROUTINGS, make_experts, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moe_dispatch.experts import ExpertWeights

SEED: Final = 4
# A timing runs over at most this many distinct inputs and routings: as many as it takes for the weights of their
# experts together to be CACHES times the L2 cache, and at least two, so that no single routing decides.
MOST_INPUTS: Final = 8
CACHES: Final = 6
# From this many tokens on a single input is enough.
MANY_TOKENS: Final = 2048
# Tokens of each distribution that are compared with the fp32 reference; the others must be finite.
CHECKED_TOKENS: Final = 1024
# Device memory that a process which only compiles may keep cached.
KEPT_BYTES: Final = 1 << 29
_DIE_WITH_PARENT: Final = 1  # PR_SET_PDEATHSIG


class WorkerServer:
    """Answers requests about one layer, and the candidates of one point of it, at a time."""

    _machine: Machine  # from `start` on, which comes first
    _layer: LayerShape  # from `layer` on, as the weights

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self._backends: dict[str, Backend] = {}
        self._experts: ExpertWeights | None = None
        # Of the current token count, by routing distribution.
        self._M = 0
        self._inputs: dict[str, tuple[LayerInputs, ...]] = {}
        # By routing distribution, and by whether activations are quantised where the weights are FP8.
        self._references: dict[tuple[str, bool], torch.Tensor] = {}
        # Of the current point. Candidates are named by their index; graphs live as long as `_turns`.
        self._mode: Mode = "eager"
        self._routings: list[str] = []
        self._candidates: list[tuple[str, dict[str, Any]]] = []
        self._turns: dict[str, Turns[int]] = {}
        self._calls: dict[int, Call] = {}
        self._placeholder: tuple[LayerShape, ExpertWeights] | None = None

    def start(self, device: str, backends: dict[str, str]) -> dict[str, Any]:
        """Inspect the device, and register the backends of the parent process."""
        for name, target in backends.items():
            BACKENDS.register(name, target)
        self._device = torch.device(device)
        self._machine = Machine.inspect(self._device)
        if self._device.type == "cuda":
            # Triton and DeepGEMM launch on the current GPU, whatever the tensors say.
            torch.cuda.set_device(self._device)
        return {}

    def layer(self, layer: dict[str, Any]) -> dict[str, Any]:
        """Allocate the weights of a layer in place of those of the layer before."""
        self._layer, self._experts = LayerShape.model_validate(layer), None
        self._forget_tokens()
        self._placeholder = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        generator = torch.Generator(self._device).manual_seed(SEED)
        problem = self._layer.problem(1, self._machine)
        require(weight_bytes(problem), "the weights", self._device)
        with torch.no_grad():
            self._experts = make_experts(
                problem, self._layer.dtype, self._device, generator, act_dtype=self._layer.act_dtype
            )
        return {}

    def point(
        self, M: int, mode: Mode, routings: list[str], candidates: list[tuple[str, dict[str, Any]]]
    ) -> dict[str, Any]:
        """Take a point's candidates, and make inputs of M tokens with their fp32 references unless they are there."""
        self._close_turns()
        if M != self._M:
            self._forget_tokens()
        self._M, self._mode, self._routings, self._candidates = M, mode, routings, candidates
        problem = self._layer.problem(M, self._machine)
        missing = [routing for routing in routings if routing not in self._inputs]
        count = distinct_inputs(problem, self._machine)
        require(input_bytes(problem, count * len(missing)) if missing else 0, "the inputs", self._device)
        for routing in missing:
            self._inputs[routing] = make_inputs(problem, ROUTINGS[routing], self._device, count, seed=SEED + M)
        self._references_of(routings, quantized=True)
        return {}

    def compile(self, layer: dict[str, Any], M: int, candidate: tuple[str, dict[str, Any]]) -> dict[str, Any]:
        """Compile one candidate by running it on a call whose ids are all -1; see `compile_ahead`."""
        shape = LayerShape.model_validate(layer)
        if self._placeholder is None or self._placeholder[0] != shape:
            self._placeholder = None
            self._placeholder = shape, placeholder_weights(shape.problem(M, self._machine), self._device)
        hidden = torch.zeros(M, shape.K, dtype=torch_dtype(shape.act_dtype), device=self._device)
        weights = torch.zeros(M, shape.topk, dtype=torch.float32, device=self._device)
        ids = torch.full((M, shape.topk), -1, dtype=torch.int32, device=self._device)
        backend, config = self._made(*candidate)
        with torch.no_grad():
            backend.run(hidden, self._placeholder[1], weights, ids, config)
        synchronize(self._device)
        if self._device.type == "cuda" and torch.cuda.memory_reserved(self._device) > KEPT_BYTES:
            # Release cached blocks: other compile workers share this GPU.
            del hidden, weights, ids
            torch.cuda.empty_cache()
        return {}

    def launch(self, candidate: int) -> dict[str, Any]:
        """Run a candidate once, which compiles it, and once more under the wall clock."""
        _, _, call = self._call(candidate)
        inputs = self._inputs[self._routings[0]][0]
        with torch.no_grad():
            call(inputs)
            synchronize(self._device)
            begin = time.perf_counter()
            call(inputs)
            synchronize(self._device)
        return {"us": 1e6 * (time.perf_counter() - begin)}

    def check(self, candidate: int, tolerance: float, *, briefly: bool) -> dict[str, Any]:
        """Compare a candidate with the fp32 reference, and its runs with each other; see `Worker.check`."""
        backend, config, call = self._call(candidate)
        routings = self._routings[:1] if briefly else self._routings
        quantized = backend.quantizes_activations(self._layer.problem(self._M, self._machine))
        verdict = verify(
            call,
            [self._inputs[routing][0] for routing in routings],
            self._references_of(routings, quantized=quantized),
            tolerance=tolerance,
            mode="eager" if briefly else self._mode,
            deterministic=backend.deterministic(config),
        )
        if not verdict.ok:
            return {"wrong": f"wrong (inputs: {', '.join(routings)}): {verdict.reason}"}
        return {"error": verdict.error}

    def _references_of(self, routings: list[str], *, quantized: bool) -> list[torch.Tensor]:
        """The fp32 references of the first input of each distribution, computed once for a token count.

        Those of all the point's distributions at the first need: one pass over the experts serves them together.
        """
        assert self._experts is not None  # noqa: S101 - `layer` comes first
        missing = [routing for routing in self._routings if (routing, quantized) not in self._references]
        if missing:
            checked = [self._inputs[routing][0] for routing in missing]
            references = reference_outputs(
                self._experts, checked, tokens=CHECKED_TOKENS, quantize_activations=quantized
            )
            self._references |= {(name, quantized): each for name, each in zip(missing, references, strict=True)}
        return [self._references[routing, quantized] for routing in routings]

    def time(self, candidates: list[int], routing: str, budget_s: float, rounds: int) -> dict[str, Any]:
        """Time candidates that take turns; see `Worker.time`.

        Returns:
            ``us``: for each candidate its time in each round in µs, or None if it failed; ``failed``: the reasons.
        """
        failed: dict[int, str] = {}

        def on_failure(candidate: int, error: BaseException) -> None:
            if failures.lost_device(error):
                raise error
            failed[candidate] = failures.summary(error)

        timings = self._turns_on(routing).time(
            {candidate: self._timed_call(candidate, self._inputs[routing][0]) for candidate in candidates},
            budget_s=budget_s,
            min_rounds=rounds,
            on_failure=on_failure,
        )
        return {
            "us": [timings[candidate].rounds if candidate in timings else None for candidate in candidates],
            "failed": [failed.get(candidate) for candidate in candidates],
        }

    def energy(self, candidate: int, seconds: float) -> dict[str, Any]:
        """Measure the energy of a call; see `Worker.energy`."""
        inputs = [each for routing in self._routings for each in self._inputs[routing]]
        meter, call = energy_meter(self._device), self._timed_call(candidate, inputs[0])
        assert not isinstance(meter, str), meter  # noqa: S101 - the parent has asked for it, too
        return {"joules": joules_per_call(call, inputs, self._mode, meter=meter, seconds=seconds)}

    def _call(self, candidate: int) -> tuple[Backend, BackendConfig, Call]:
        assert self._experts is not None  # noqa: S101 - `layer` comes first
        backend, config = self._made(*self._candidates[candidate])
        return backend, config, backend_call(backend, self._experts, config)

    def _timed_call(self, candidate: int, inputs: LayerInputs) -> Call:
        """What `moe_forward` runs: the backend's fast path in eager mode, its `run` while a graph is captured."""
        if candidate not in self._calls:
            assert self._experts is not None  # noqa: S101 - `layer` comes first
            backend, config, call = self._call(candidate)
            if self._mode == "eager":
                call = fast_path_call(backend, self._experts, config, inputs)
            self._calls[candidate] = call
        return self._calls[candidate]

    def _turns_on(self, routing: str) -> Turns[int]:
        if routing not in self._turns:
            pool = next((turns.pool for turns in self._turns.values()), None)
            self._turns[routing] = Turns(self._inputs[routing], mode=self._mode, pool=pool)
        return self._turns[routing]

    def _close_turns(self) -> None:
        while self._turns:
            self._turns.popitem()[1].close()
        self._calls = {}

    def _forget_tokens(self) -> None:
        self._close_turns()
        self._M, self._inputs, self._references = 0, {}, {}

    def _made(self, name: str, config: dict[str, Any]) -> tuple[Backend, BackendConfig]:
        if name not in self._backends:
            self._backends[name] = make_backend(name, self._machine).require()
        backend = self._backends[name]
        return backend, backend.config_type.model_validate(config)


def distinct_inputs(problem: MoEProblem, machine: Machine) -> int:
    """The number of inputs that a timing runs over."""
    least = 1 if problem.M >= MANY_TOKENS else 2
    read = problem.expected_experts * problem.expert_bytes
    return max(least, min(MOST_INPUTS, math.ceil(CACHES * machine.l2_bytes / read)))


def serve(read: int, write: int) -> None:
    """Answer requests until the parent closes its end of the pipe."""
    worker = WorkerServer()
    operations: dict[str, Callable[..., dict[str, Any]]] = {
        "start": worker.start, "layer": worker.layer, "point": worker.point,
        "compile": worker.compile, "launch": worker.launch, "check": worker.check, "time": worker.time,
        "energy": worker.energy,
    }  # fmt: skip
    with os.fdopen(read, encoding="utf-8") as requests, os.fdopen(write, "w", encoding="utf-8") as answers:
        for line in requests:
            request = json.loads(line)
            try:
                answer = operations[request.pop("op")](**request)
            except foreign_errors() as error:  # whatever a candidate raises is an answer to the parent
                answer = {
                    "raised": failures.summary(error),
                    "memory": failures.out_of_memory(error),
                    "lost": failures.lost_device(error),
                }
            print(json.dumps(answer), file=answers, flush=True)


def _die_with_parent() -> None:
    """Have the kernel kill this process with its parent: a candidate that hangs must not outlive a killed parent."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def main(arguments: "Sequence[str]") -> None:
    """Serve the pipe whose file descriptors are given, to read requests from and to write answers to."""
    _die_with_parent()
    read, write = map(int, arguments)
    serve(read, write)


if __name__ == "__main__":
    main(sys.argv[1:])
