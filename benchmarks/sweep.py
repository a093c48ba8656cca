"""Run points one after another: draw, check against fp32, time what is right in turns, write the rows.

Layers whose weights fit in memory together are visited in turn, few and many tokens first: a run that is cut short has
rows of all of them, over the whole range. Whatever runs out of memory, raises or is wrong costs itself a row with the
reason, and the rest goes on.
"""

import contextlib
import functools
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor

from moe_dispatch.backend import Backend, BackendConfig
from moe_dispatch.benchmarks.baselines import Baseline
from moe_dispatch.benchmarks.rows import BenchRow, RowKey, append, row_key
from moe_dispatch.dispatch.policy_chain import PolicyChain
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine
from moe_dispatch.measure import (
    Call,
    Ceilings,
    LayerInputs,
    Timing,
    Verdict,
    backend_call,
    fast_path_call,
    known_ceilings,
    make_inputs,
    measure_ceilings,
    reference_outputs,
    time_interleaved,
    verify,
)
from moe_dispatch.measure.provenance import commit, versions
from moe_dispatch.policies.calibration.schedule import coarse_to_fine
from moe_dispatch.problem import DType, Mode, MoEProblem
from moe_dispatch.registry import make_backend
from moe_dispatch.system.failures import lost_device, out_of_memory, summary
from moe_dispatch.workloads import RoutingDistribution, Workload, make_experts

Configs = Literal["default", "all", "chosen"]

SEED: Final = 0
# fp32 truths are the slow part at large M, and one of 2048 tokens checks as many rows as a hundred of 16. Where there
# are more, so many of them spread evenly are held against the truth, and the others must be finite.
CHECKED_TOKENS: Final = 2048
# Samples of each candidate at least; where one takes long, it hardly differs from the next.
LEAST_ROUNDS: Final = 3
# Of the device's memory, for the weights of layers that are visited in turn; a baseline may copy them.
WEIGHTS_SHARE: Final = 0.4


@dataclass(frozen=True)
class Plan:
    """What a sweep runs: every combination.

    Attributes:
        workloads: Layers.
        dtypes: Of their weights.
        tokens: M.
        routings: Distributions.
        modes: ``"graph"`` and ``"eager"``.
        backends: Ours, by the instances that run.
        baselines: Theirs.
        configs: Which configurations of ours: each one's default, all, or the one that this machine's calibration (else
            the shipped table) chooses, which is what `moe_forward` runs.
        inputs: Distinct inputs and routings per point.
        point_s: Seconds of timing per candidate.
        budget_s: Seconds after which no further point is started; None for no limit.
    """

    workloads: tuple[Workload, ...]
    dtypes: tuple[DType, ...]
    tokens: tuple[int, ...]
    routings: tuple[RoutingDistribution, ...]
    modes: tuple[Mode, ...]
    backends: tuple[Backend, ...]
    baselines: tuple[Baseline, ...] = ()
    configs: Configs = "default"
    inputs: int = 8
    point_s: float = 0.3
    budget_s: float | None = None

    @property
    def points(self) -> int:
        """Steps of progress: one per workload, dtype, M and mode."""
        return len(self.workloads) * len(self.dtypes) * len(self.tokens) * len(self.modes)


@dataclass(frozen=True)
class Candidate:
    """One thing to time at a point; `settle` gives the call that is timed eagerly, as its user makes it in the end."""

    routing: RoutingDistribution
    backend: str
    config: dict[str, int | str | bool]
    call: Call = field(compare=False)
    settle: Callable[[LayerInputs], Call] = field(compare=False)
    tolerance: float
    deterministic: bool


@dataclass(frozen=True)
class Provenance:
    """What every row says of the run that made it."""

    machine: Machine
    versions: dict[str, str]
    commit: str
    ceilings: Ceilings

    @classmethod
    def here(cls, machine: Machine) -> "Provenance":
        """Of a run that begins on this machine, from the working directory; measures the ceilings."""
        ceilings = measure_ceilings(torch.device(machine.device))
        return cls(machine, versions(machine), commit(Path.cwd()), ceilings)


@dataclass(frozen=True)
class _Drawn:
    """What a point's candidates run on under one distribution."""

    inputs: tuple[LayerInputs, ...]
    references: tuple[Tensor, ...]


@dataclass
class _Loaded:
    """A layer in memory, with what baselines made of its weights."""

    experts: ExpertWeights
    peer_calls: dict[str, Call] = field(default_factory=dict)


@dataclass
class Sweep:
    """A run of plans into a file.

    Attributes:
        plan: What to run.
        path: Where rows go.
        device: Where it runs.
        provenance: What the rows say of the run.
        done: Keys of rows that are there already.
        advance: Called with a description before each point, and with None after it.
        notes: Why something has no row, each once.
        written: Rows of this run.
        spent: Seconds, by kind of work.
    """

    plan: Plan
    path: Path
    device: torch.device
    provenance: Provenance
    done: set[RowKey] = field(default_factory=set)
    advance: Callable[[str | None], None] = lambda _: None
    notes: list[str] = field(default_factory=list)
    written: list[BenchRow] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=dict)
    _loaded: dict[tuple[Workload, DType], _Loaded] = field(default_factory=dict)

    @functools.cached_property
    def _measured(self) -> PolicyChain:
        return PolicyChain(self.provenance.machine, ("calibrated", "shipped"))

    def run(self, *further: Plan) -> list[BenchRow]:
        """Run the plan, then further ones on the same layers within its budget, and return this run's rows.

        Raises:
            RuntimeError: The CUDA context is lost; nothing further can run in this process.
        """
        budget_s = self.plan.budget_s
        deadline = math.inf if budget_s is None else time.perf_counter() + budget_s
        try:
            for plan in (self.plan, *further):
                self.plan = plan
                if not self._run(deadline):
                    self._note(f"stopped: the budget of {budget_s:g} s is spent; --resume goes on")
                    break
        finally:
            self._unload()
        return self.written

    def _run(self, deadline: float) -> bool:
        """The plan at work; False once the deadline has passed."""
        for layers in self._together():
            for M, layer in itertools.product(coarse_to_fine(self.plan.tokens), layers):
                if time.perf_counter() >= deadline:
                    return False
                if loaded := self._load(*layer):
                    self._point(*layer, M, loaded)
                else:
                    for _ in self.plan.modes:
                        self.advance(None)
        return True

    def _together(self) -> list[list[tuple[Workload, DType]]]:
        """The plan's layers in groups that fit in memory."""
        machine = self.provenance.machine
        groups: list[list[tuple[Workload, DType]]] = [[]]
        held = 0.0
        for workload, dtype in itertools.product(self.plan.workloads, self.plan.dtypes):
            problem = workload.problem(1, dtype, machine)
            needed = problem.E * problem.expert_bytes
            if groups[-1] and held + needed > WEIGHTS_SHARE * machine.memory_bytes:
                groups.append([])
                held = 0.0
            groups[-1].append((workload, dtype))
            held += needed
        return groups

    def _load(self, workload: Workload, dtype: DType) -> _Loaded | None:
        """A layer's weights; None where they do not fit."""
        layer = workload, dtype
        if layer in self._loaded:
            return self._loaded[layer]
        group = next(group for group in self._together() if layer in group)
        if any(other not in group for other in self._loaded):
            self._unload()
        self.advance(f"{workload.name} {dtype}: weights")
        generator = torch.Generator(self.device).manual_seed(SEED)
        try:
            with self._spending("weights"):
                self._loaded[layer] = _Loaded(make_experts(workload, dtype, self.device, generator))
        except Exception as error:
            if not out_of_memory(error):
                raise
            _release(self.device)
            self._note(f"{workload.name} {dtype}: the weights do not fit in memory ({summary(error)})")
            return None
        return self._loaded[layer]

    def _unload(self) -> None:
        self._loaded.clear()
        _release(self.device)

    @contextlib.contextmanager
    def _spending(self, what: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.spent[what] = self.spent.get(what, 0.0) + time.perf_counter() - begin

    def _point(self, workload: Workload, dtype: DType, M: int, loaded: _Loaded) -> None:
        """All distributions together: two that are to be compared must not meet the device in another state."""
        drawn: dict[RoutingDistribution, _Drawn] = {}
        for mode in self.plan.modes:
            problem = workload.problem(M, dtype, self.provenance.machine, mode)
            what = f"{workload.name} {dtype} M={M} {mode}"
            self.advance(what)
            candidates = [
                candidate
                for candidate in self._candidates(problem, loaded)
                if self._key(workload, problem, candidate) not in self.done
            ]
            try:
                for routing in dict.fromkeys(candidate.routing for candidate in candidates):
                    if routing not in drawn:
                        with self._spending("inputs and fp32 truths"):
                            drawn[routing] = self._draw(problem, routing, loaded.experts)
                if candidates:
                    self._measure(workload, problem, candidates, drawn)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                self._note(f"{what}: inputs and references do not fit in memory ({summary(error)})")
                _release(self.device)
            self.advance(None)

    def _draw(self, problem: MoEProblem, routing: RoutingDistribution, experts: ExpertWeights) -> _Drawn:
        inputs = make_inputs(problem, routing, self.device, self.plan.inputs, SEED)
        checked = max(1, min(len(inputs), CHECKED_TOKENS // problem.M))
        return _Drawn(inputs, reference_outputs(experts, inputs[:checked], tokens=CHECKED_TOKENS))

    def _candidates(self, problem: MoEProblem, loaded: _Loaded) -> Iterator[Candidate]:
        experts, peer_calls = loaded.experts, loaded.peer_calls
        for backend in self.plan.backends:
            if reasons := backend.unsupported_reasons(problem):
                self._note(f"{backend.name}: {'; '.join(reasons)}")
                continue
            for config, routing in itertools.product(self._configs(backend, problem), self.plan.routings):
                yield Candidate(
                    routing, backend.name, config.model_dump(mode="json"), backend_call(backend, experts, config),
                    functools.partial(fast_path_call, backend, experts, config),
                    backend.tolerance[problem.dtype], backend.deterministic(config),
                )  # fmt: skip
        for baseline in self.plan.baselines:
            if reasons := baseline.unsupported_reasons(problem):
                self._note(f"{baseline.name}: {'; '.join(reasons)}")
                continue
            if baseline.name not in peer_calls:
                try:
                    with self._spending("baselines' preparation"):
                        peer_calls[baseline.name] = baseline.prepare(experts, problem)
                except Exception as error:  # noqa: BLE001 - foreign code may raise anything, and is then left out
                    self._note(f"{baseline.name}: {summary(error)}")
                    continue
            call = peer_calls[baseline.name]
            tolerance = baseline.tolerance[problem.dtype]
            for routing in self.plan.routings:
                yield Candidate(routing, baseline.name, {}, call, _as_it_is(call), tolerance, deterministic=False)

    def _configs(self, backend: Backend, problem: MoEProblem) -> Sequence[BackendConfig]:
        if self.plan.configs == "all":
            return backend.configs(problem)
        if self.plan.configs == "chosen":
            for choice in self._measured.rank(problem):
                if choice.backend == backend.name and choice.config is not None:
                    return (backend.config_type.model_validate(dict(choice.config)),)
        return (backend.default_config(problem),)

    def _measure(
        self,
        workload: Workload,
        problem: MoEProblem,
        candidates: Sequence[Candidate],
        drawn: Mapping[RoutingDistribution, _Drawn],
    ) -> None:
        failures: dict[int, str] = {}
        verdicts: dict[int, Verdict] = {}
        for index, candidate in enumerate(candidates):
            try:
                with self._spending("checks"):
                    on = drawn[candidate.routing]
                    verdicts[index] = verify(
                        candidate.call, on.inputs, on.references, tolerance=candidate.tolerance, mode=problem.mode,
                        deterministic=candidate.deterministic,
                    )  # fmt: skip
            except Exception as error:  # noqa: BLE001 - a candidate may raise anything, and costs only itself
                self._fail(failures, index, error)
            else:
                if not verdicts[index].ok:
                    failures[index] = f"wrong result: {verdicts[index].reason}"
        with self._spending("timing"):
            timings: dict[int, Timing] = time_interleaved(
                {
                    index: candidate.call
                    if problem.mode == "graph"
                    else candidate.settle(drawn[candidate.routing].inputs[0])
                    for index, candidate in enumerate(candidates)
                    if index not in failures
                },
                {index: drawn[candidate.routing].inputs for index, candidate in enumerate(candidates)},
                mode=problem.mode,
                budget_s=self.plan.point_s,
                min_rounds=LEAST_ROUNDS,
                on_failure=lambda index, error: self._fail(failures, index, error),
            )
        for index, candidate in enumerate(candidates):
            row = self._row(
                workload, problem, candidate, drawn[candidate.routing].inputs, verdicts.get(index), timings.get(index),
                failures.get(index, ""),
            )  # fmt: skip
            append(self.path, row)
            self.written.append(row)
            self.done.add(row.key)

    def _fail(self, failures: dict[int, str], index: int, error: Exception) -> None:
        if lost_device(error):
            raise error
        failures[index] = f"out of memory: {summary(error)}" if out_of_memory(error) else summary(error)
        _release(self.device)

    def _row(
        self,
        workload: Workload,
        problem: MoEProblem,
        candidate: Candidate,
        inputs: tuple[LayerInputs, ...],
        verdict: Verdict | None,
        timing: Timing | None,
        reason: str,
    ) -> BenchRow:
        hits = sum(given.hit_experts for given in inputs) / len(inputs)
        known = known_ceilings(self.provenance.machine)
        roofline = (known or self.provenance.ceilings).roofline_us(problem, hits)
        error = None if verdict is None or verdict.error == float("inf") else verdict.error
        return BenchRow(
            workload=workload.name, E=workload.E, topk=workload.topk, K=workload.K, N=workload.N,
            dtype=problem.dtype, M=problem.M, backend=candidate.backend, config=candidate.config, mode=problem.mode,
            routing=candidate.routing.name,
            us=timing and timing.us, us_q1=timing and timing.us_q1, us_q3=timing and timing.us_q3,
            samples=timing.samples if timing else 0, inputs=len(inputs), hit_experts=hits, roofline_us=roofline,
            roofline_from="device" if known else "measured",
            fraction=roofline / timing.us if timing and roofline else None,
            error=error, deterministic=verdict.repeatable if verdict and timing else None, reason=reason,
            machine=self.provenance.machine.name, fingerprint=self.provenance.machine.fingerprint,
            versions=self.provenance.versions, commit=self.provenance.commit, ceilings=self.provenance.ceilings,
        )  # fmt: skip

    def _key(self, workload: Workload, problem: MoEProblem, candidate: Candidate) -> RowKey:
        return row_key(
            workload.name, problem.dtype, problem.M, candidate.backend, candidate.config, problem.mode,
            candidate.routing.name,
        )  # fmt: skip

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def available_backends(names: Sequence[str], machine: Machine, note: Callable[[str], None]) -> tuple[Backend, ...]:
    """The backends that can run on a machine; `note` takes, of each of the others, why it cannot.

    Raises:
        UnknownNameError: Nothing is registered under a name.
    """
    available = []
    for made in (make_backend(name, machine) for name in names):
        if made.registered and made.reasons:
            note(f"backend {made.name!r} is not available: {'; '.join(made.reasons)}")
        else:
            available.append(made.require())
    return tuple(available)


def _as_it_is(call: Call) -> Callable[[LayerInputs], Call]:
    return lambda _: call


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
