"""Compiles what plans will run on all cores, before anything is timed: `compile_ahead`, as a calibration uses it."""

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any, ClassVar, Final, get_args

import torch
from torch import Tensor

from moe_dispatch.backend import Backend, BackendConfig, Requirements
from moe_dispatch.benchmarks.baselines import Baseline, Vllm, VllmDeepGemm, VllmTritonKernels
from moe_dispatch.benchmarks.candidates import CandidateFactory
from moe_dispatch.benchmarks.plan import BenchPlan
from moe_dispatch.benchmarks.rows import RowKey, row_key
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine
from moe_dispatch.measure import LayerInputs
from moe_dispatch.measure.provenance import commit
from moe_dispatch.policies.calibration.compile_ahead import (
    COMPILE_SHARE,
    LEAST_JOBS,
    Job,
    compile_ahead,
    compiled_path,
    libraries_of,
    usable_cores,
)
from moe_dispatch.policies.calibration.placeholder_weights import placeholder_weights
from moe_dispatch.policies.calibration.worker_process import StartWorker, Worker, WorkerProcess, worker_targets
from moe_dispatch.policies.measurements.schema import Candidate, LayerShape
from moe_dispatch.policies.measurements.versions import relevant_versions
from moe_dispatch.problem import DType, MoEProblem
from moe_dispatch.registry import BACKENDS
from moe_dispatch.system.version import installed_version
from moe_dispatch.workloads import Workload

# Seconds for one job: a library that loads while other processes keep the cores busy has not hung.
TIMEOUT_S: Final = 180.0


class _CompilingBaseline(Backend):
    """A baseline as a worker knows it, which compiles backends: a call that reads no weights but the first expert's.

    Attributes:
        baseline: The baseline, whose `prepare` reads no weights either.
        unused_id: The id that takes the place of -1.
    """

    requirements = Requirements(dtypes=dict.fromkeys(get_args(DType), (0, 0)))
    baseline: ClassVar[type[Baseline]]
    unused_id: ClassVar[int] = -1

    def measured_versions(self) -> dict[str, str]:
        """See `Backend.measured_versions`."""
        return {**self.machine.libraries, "triton": self.machine.triton}

    def run(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,  # noqa: ARG002 - a baseline has none
    ) -> Tensor:
        """See `Backend.run`."""
        M, topk = topk_ids.shape
        problem = experts.problem(M, topk, hidden_states.dtype, self.machine.capability)
        call = self.baseline(self.machine).prepare(experts, problem)
        return call(LayerInputs(hidden_states, topk_weights, topk_ids.clamp(min=self.unused_id)))


class CompilingVllm(_CompilingBaseline):
    """`Vllm`, which uses an id as an index unchecked."""

    name = Vllm.name
    baseline = Vllm
    unused_id = 0


class CompilingVllmDeepGemm(_CompilingBaseline):
    """`VllmDeepGemm`."""

    name = VllmDeepGemm.name
    baseline = VllmDeepGemm


class CompilingVllmTritonKernels(_CompilingBaseline):
    """`VllmTritonKernels`."""

    name = VllmTritonKernels.name
    baseline = VllmTritonKernels


# Not among them is what compiles nothing, or reads the whole layer.
COMPILING: Final[dict[str, type[_CompilingBaseline]]] = {
    compiling.name: compiling for compiling in (CompilingVllm, CompilingVllmDeepGemm, CompilingVllmTritonKernels)
}


def compile_plans(
    plans: Sequence[BenchPlan],
    factory: CandidateFactory,
    machine: Machine,
    device: torch.device,
    done: Set[RowKey],
    seconds: float,
    *,
    start_worker: StartWorker = WorkerProcess,
) -> list[str]:
    """Compile what plans will run, for at most `COMPILE_SHARE` of so many seconds.

    Few jobs are left to the first runs: another process takes as long to start as some of them.

    Returns:
        A line for each job that failed, with the reason.
    """
    jobs = jobs_of(plans, factory, machine, done)
    if len(jobs) < 2 * LEAST_JOBS or usable_cores() < 2:
        return []
    deadline = time.monotonic() + COMPILE_SHARE * seconds
    backends = {name: BACKENDS.load(name) for name in {job.candidate.backend for job in jobs} - COMPILING.keys()}
    targets = worker_targets(backends | COMPILING)

    def start() -> Worker:
        return start_worker(str(device), targets, TIMEOUT_S, deadline)

    return compile_ahead(
        jobs, start, compiled_path(machine), deadline,
        libraries=libraries_of(backends) | dict.fromkeys(COMPILING, "vllm"),
        meanwhile=lambda: _load_libraries(plans, factory, machine, device),
    )  # fmt: skip


def jobs_of(plans: Sequence[BenchPlan], factory: CandidateFactory, machine: Machine, done: Set[RowKey]) -> list[Job]:
    """What plans will run that has no row yet, and that compiles on weights without memory behind them."""
    package, sources = installed_version(), commit(Path(__file__).parent)
    jobs: dict[str, Job] = {}
    for backend, config, problem in _missing(plans, factory, machine, done):
        candidate = Candidate(
            backend=backend.name, config=config.model_dump(mode="json"), versions=relevant_versions(backend),
            package=package, commit=sources,
        )  # fmt: skip
        job = Job(LayerShape.of(problem), problem.M, candidate)
        jobs[job.digest] = job
    return list(jobs.values())


def _missing(
    plans: Sequence[BenchPlan], factory: CandidateFactory, machine: Machine, done: Set[RowKey]
) -> Iterator[tuple[Backend, BackendConfig, MoEProblem]]:
    for plan, workload, problem in _problems(plans, machine):
        for backend, config in factory.backends(plan, problem):
            keys = _keys(plan, workload, problem, backend.name, config.model_dump(mode="json"))
            if not (backend.reads_whole_layer(problem) or keys <= done):
                yield backend, config, problem
        for baseline in factory.baselines(plan, problem):
            if baseline.name in COMPILING and not _keys(plan, workload, problem, baseline.name, {}) <= done:
                yield COMPILING[baseline.name](machine), BackendConfig(), problem


def _keys(plan: BenchPlan, workload: Workload, problem: MoEProblem, name: str, config: dict[str, Any]) -> Set[RowKey]:
    """The keys of a candidate's rows, one for each distribution."""
    of_candidate = workload.name, problem.dtype, problem.M, name, config, problem.mode
    return {row_key(*of_candidate, routing.name) for routing in plan.routings}


def _problems(plans: Sequence[BenchPlan], machine: Machine) -> Iterator[tuple[BenchPlan, Workload, MoEProblem]]:
    for plan in plans:
        for M, workload, dtype, mode in itertools.product(plan.tokens, plan.workloads, plan.dtypes, plan.modes):
            yield plan, workload, workload.problem(M, dtype, machine, mode)


def _load_libraries(
    plans: Sequence[BenchPlan], factory: CandidateFactory, machine: Machine, device: torch.device
) -> None:
    """Have the baselines import their libraries, which takes this process tens of seconds."""
    loaded: set[str] = set()
    for plan, _, problem in _problems(plans, machine):
        for baseline in factory.baselines(plan, problem):
            if baseline.name in COMPILING.keys() - loaded:
                loaded.add(baseline.name)
                with contextlib.suppress(Exception):  # its first use raises it again, and reports it
                    baseline.prepare(placeholder_weights(problem, device), problem)
