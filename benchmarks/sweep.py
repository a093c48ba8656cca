"""Run benchmark plans point by point and write the rows.

Layers whose weights fit in memory together are visited in turn, few and many tokens first: a run that is cut short has
rows of all layers over the whole range of token counts. A candidate that runs out of memory, raises or is wrong loses
its own row, which says why; the others go on.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

from moe_dispatch.benchmarks.candidates import BenchCandidate, CandidateFactory, LoadedLayer
from moe_dispatch.benchmarks.compiled_ahead import compile_plans
from moe_dispatch.benchmarks.plan import BenchPlan
from moe_dispatch.benchmarks.point import SEED, Outcome, PointInputs, check_and_time, release_memory
from moe_dispatch.benchmarks.provenance import Provenance
from moe_dispatch.benchmarks.row_files import append
from moe_dispatch.benchmarks.rows import BenchRow, RowKey
from moe_dispatch.benchmarks.stopwatch import Stopwatch
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.machine import present_device
from moe_dispatch.measure.energy import EnergyOf
from moe_dispatch.policies.calibration.memory import input_bytes, require, weight_bytes
from moe_dispatch.policies.calibration.schedule import coarse_to_fine
from moe_dispatch.problem import DType, MoEProblem
from moe_dispatch.system.failures import out_of_memory, summary
from moe_dispatch.workloads import RoutingDistribution, Workload, make_experts

# Share of the device's memory for the weights of layers that are visited in turn; a baseline may copy them.
WEIGHTS_SHARE: Final = 0.4

Layers = list[tuple[Workload, DType]]


@dataclass
class Sweep:
    """A run of plans that adds its rows to a file.

    Attributes:
        done: Keys of rows that need not be measured again.
        deadline: `time.perf_counter` value after which no further point is started.
        advance: Called with a description before each point, and with None after it.
        notes: Reasons why something has no row, each once.
        energy: Measures the energy of a call; None not to measure it.
    """

    path: Path
    provenance: Provenance
    done: set[RowKey] = field(default_factory=set)
    deadline: float = math.inf
    advance: Callable[[str | None], None] = lambda _: None
    notes: list[str] = field(default_factory=list)
    written: list[BenchRow] = field(default_factory=list)
    energy: EnergyOf | None = None
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def __post_init__(self) -> None:
        self._device = torch.device(self.provenance.machine.device)
        self._loaded: dict[tuple[Workload, DType], LoadedLayer | None] = {}  # None for one that cannot be made
        self._factory = CandidateFactory(self.provenance.machine, self._note, self.stopwatch)

    def run(self, plans: Sequence[BenchPlan]) -> list[BenchRow]:
        """Run plans in their order until the deadline, and return this run's rows.

        Raises:
            RuntimeError: The CUDA context is lost; nothing further can run in this process.
        """
        try:
            self._compile_ahead(plans)
            for plan, group, M, layer in self._schedule(plans):
                if time.perf_counter() >= self.deadline:
                    self._note("stopped: the budget is spent; --resume goes on")
                    break
                if loaded := self._load(layer, group):
                    self._point(plan, layer[1], M, loaded)
                else:
                    for _ in plan.modes:
                        self.advance(None)
        finally:
            self._unload()
        return self.written

    def _compile_ahead(self, plans: Sequence[BenchPlan]) -> None:
        """Compile on all cores what the plans will run; no-op on a CPU, where nothing compiles."""
        machine = self.provenance.machine
        if machine.device != "cuda":
            return
        self.advance("compiling ahead")
        with self.stopwatch.spending("compiling ahead"):
            left_s = self.deadline - time.perf_counter()
            failed = compile_plans(plans, self._factory, machine, present_device(), self.done, left_s)
        if failed:
            self._note(f"{len(failed)} candidates were not compiled ahead; the first: {failed[0]}")

    def _schedule(self, plans: Sequence[BenchPlan]) -> Iterator[tuple[BenchPlan, Layers, int, tuple[Workload, DType]]]:
        """Plan, layers that are in memory together, token count and layer, in the order of measuring."""
        for plan in plans:
            for group in self._groups(plan):
                for M, layer in itertools.product(coarse_to_fine(plan.tokens), group):
                    yield plan, group, M, layer

    def _groups(self, plan: BenchPlan) -> list[Layers]:
        """The plan's layers in groups that fit in memory."""
        machine = self.provenance.machine
        groups: list[Layers] = [[]]
        group_bytes = 0.0
        for workload, dtype in itertools.product(plan.workloads, plan.dtypes):
            problem = workload.problem(1, dtype, machine)
            layer_bytes = problem.E * problem.expert_bytes
            if groups[-1] and group_bytes + layer_bytes > WEIGHTS_SHARE * machine.memory_bytes:
                groups.append([])
                group_bytes = 0.0
            groups[-1].append((workload, dtype))
            group_bytes += layer_bytes
        return groups

    def _load(self, layer: tuple[Workload, DType], group: Layers) -> LoadedLayer | None:
        """A layer with its weights in memory; None if they do not fit, or there are none of this dtype."""
        if layer in self._loaded:
            return self._loaded[layer]
        if any(other not in group for other in self._loaded):
            self._unload()
        workload, dtype = layer
        self.advance(f"{workload.name} {dtype}: weights")
        generator = torch.Generator(self._device).manual_seed(SEED)
        try:
            require(weight_bytes(workload.problem(1, dtype, self.provenance.machine)), "the weights", self._device)
            with self.stopwatch.spending("weights"):
                experts = make_experts(workload, dtype, self._device, generator)
        except InvalidInputError as error:  # such as MXFP4 with 24 columns
            self._note(f"{workload.name} {dtype}: has no such weights ({error})")
            self._loaded[layer] = None
            return None
        except Exception as error:
            if not out_of_memory(error):
                raise
            release_memory(self._device)
            self._note(f"{workload.name} {dtype}: the weights do not fit in memory ({summary(error)})")
            return None
        self._loaded[layer] = LoadedLayer(workload, experts)
        return self._loaded[layer]

    def _unload(self) -> None:
        self._loaded.clear()
        release_memory(self._device)

    def _point(self, plan: BenchPlan, dtype: DType, M: int, layer: LoadedLayer) -> None:
        """Measure one token count of a layer in every mode, on the same inputs."""
        drawn: dict[RoutingDistribution, PointInputs] = {}
        for mode in plan.modes:
            problem = layer.workload.problem(M, dtype, self.provenance.machine, mode)
            description = f"{layer.workload.name} {dtype} M={M} {mode}"
            self.advance(description)
            try:
                self._measure(plan, problem, layer, drawn)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                self._note(f"{description}: inputs and references do not fit in memory ({summary(error)})")
                release_memory(self._device)
            self.advance(None)

    def _measure(
        self, plan: BenchPlan, problem: MoEProblem, layer: LoadedLayer, drawn: dict[RoutingDistribution, PointInputs]
    ) -> None:
        """Measure the candidates that have no row yet, and write their rows; `drawn` keeps the inputs."""
        candidates = [
            candidate
            for candidate in self._factory.candidates(plan, problem, layer)
            if candidate.key(layer.workload, problem) not in self.done
        ]
        if not candidates:
            return
        # Not of the candidates: the inputs serve every mode.
        unquantized = not all(backend.quantizes_activations(problem) for backend in plan.backends)
        for routing in dict.fromkeys(candidate.routing for candidate in candidates):
            if routing not in drawn:
                require(input_bytes(problem, plan.inputs), "the inputs", self._device)
                with self.stopwatch.spending("inputs and fp32 references"):
                    drawn[routing] = PointInputs.draw(
                        problem, routing, layer.experts, plan.inputs, unquantized=unquantized
                    )
        outcomes = check_and_time(candidates, drawn, problem.mode, plan.point_s, self.stopwatch, self.energy)
        for candidate, outcome in zip(candidates, outcomes, strict=True):
            row = self._row(layer.workload, problem, candidate, drawn[candidate.routing], outcome)
            append(self.path, row)
            self.written.append(row)
            self.done.add(row.key)

    def _row(
        self,
        workload: Workload,
        problem: MoEProblem,
        candidate: BenchCandidate,
        inputs: PointInputs,
        outcome: Outcome,
    ) -> BenchRow:
        ceilings, source = self.provenance.roofline
        hits = inputs.hit_experts
        roofline = ceilings.roofline_us(problem, hits)
        timing, verdict = outcome.timing, outcome.verdict
        error = None if verdict is None or verdict.error == float("inf") else verdict.error
        return BenchRow(
            workload=workload.name, E=workload.E, topk=workload.topk, K=workload.K, N=workload.N,
            dtype=problem.dtype, M=problem.M, backend=candidate.backend, config=candidate.config, mode=problem.mode,
            routing=candidate.routing.name,
            us=timing and timing.us, us_q1=timing and timing.us_q1, us_q3=timing and timing.us_q3,
            samples=timing.samples if timing else 0, inputs=len(inputs.inputs), hit_experts=hits,
            roofline_us=roofline, roofline_from=source if roofline else None,
            fraction=roofline / timing.us if roofline and timing else None,
            joules_per_token=None if outcome.joules is None else outcome.joules / problem.M,
            error=error, deterministic=verdict.repeatable if verdict and timing else None, reason=outcome.reason,
            machine=self.provenance.machine.name, fingerprint=self.provenance.machine.fingerprint,
            versions=self.provenance.versions, commit=self.provenance.commit, ceilings=self.provenance.measured,
        )  # fmt: skip

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
