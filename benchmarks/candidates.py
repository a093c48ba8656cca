"""The candidates of a point: backends in their configurations, and baselines, each with the calls to check and time."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from moe_dispatch.backend import Backend, BackendConfig
from moe_dispatch.benchmarks.baselines import Baseline
from moe_dispatch.benchmarks.plan import BenchPlan
from moe_dispatch.benchmarks.rows import RowKey, row_key
from moe_dispatch.benchmarks.stopwatch import Stopwatch
from moe_dispatch.dispatch.policy_chain import PolicyChain
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.guard import foreign_errors
from moe_dispatch.machine import Machine
from moe_dispatch.measure import Call, LayerInputs, backend_call, fast_path_call
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import make_backend
from moe_dispatch.system.failures import summary
from moe_dispatch.workloads import RoutingDistribution, Workload

Note = Callable[[str], None]


@dataclass
class LoadedLayer:
    """A layer in memory.

    Attributes:
        prepared: What each baseline made of the weights, by the baseline's name.
    """

    workload: Workload
    experts: ExpertWeights
    prepared: dict[str, Call] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class BenchCandidate:
    """A backend in one configuration, or a baseline, on one routing distribution.

    Attributes:
        call: Runs the layer; checked, and captured for graph timings.
        eager_call: Given inputs that `call` has run on, the call that is timed eagerly: what `moe_forward` makes of a
            backend once a kind of call has come back a few times.
        deterministic: Whether it promises the same bits for the same inputs.
    """

    routing: RoutingDistribution
    backend: str
    config: dict[str, int | str | bool]
    call: Call
    eager_call: Callable[[LayerInputs], Call]
    tolerance: float
    deterministic: bool
    quantizes_activations: bool = True

    def key(self, workload: Workload, problem: MoEProblem) -> RowKey:
        """Key of its row at a point."""
        return row_key(
            workload.name, problem.dtype, problem.M, self.backend, self.config, problem.mode, self.routing.name
        )


class CandidateFactory:
    """Makes the candidates of points.

    The policies of ``configs="chosen"`` rank for the machine, which measures. `note` takes the reason of each backend
    or baseline that is left out, and the stopwatch counts the time that baselines take to prepare their weights.
    """

    def __init__(self, machine: Machine, note: Note, stopwatch: Stopwatch) -> None:
        self._machine, self._note, self._stopwatch = machine, note, stopwatch

    @functools.cached_property
    def _measured(self) -> PolicyChain:
        return PolicyChain(self._machine, ("calibrated", "shipped"))

    def candidates(self, plan: BenchPlan, problem: MoEProblem, layer: LoadedLayer) -> Iterator[BenchCandidate]:
        """Every candidate of a plan at a point that can run there."""
        for backend, config in self.backends(plan, problem):
            for routing in plan.routings:
                yield _of_backend(backend, layer.experts, config, routing, problem)
        for baseline in self.baselines(plan, problem):
            if call := self._prepared(baseline, problem, layer):
                for routing in plan.routings:
                    yield _of_baseline(baseline, call, routing, baseline.tolerance[problem.dtype])

    def backends(self, plan: BenchPlan, problem: MoEProblem) -> Iterator[tuple[Backend, BackendConfig]]:
        """A plan's backends that can run a problem, in each configuration that the plan wants there."""
        for backend in plan.backends:
            if self._supports(backend, problem):
                yield from ((backend, config) for config in self._configs(plan, backend, problem))

    def baselines(self, plan: BenchPlan, problem: MoEProblem) -> Iterator[Baseline]:
        """A plan's baselines that can run a problem."""
        return (baseline for baseline in plan.baselines if self._supports(baseline, problem))

    def _supports(self, runner: Backend | Baseline, problem: MoEProblem) -> bool:
        reasons = runner.unsupported_reasons(problem)
        if reasons:
            self._note(f"{runner.name}: {'; '.join(reasons)}")
        return not reasons

    def _prepared(self, baseline: Baseline, problem: MoEProblem, layer: LoadedLayer) -> Call | None:
        if baseline.name not in layer.prepared:
            try:
                with self._stopwatch.spending("baselines' preparation"):
                    layer.prepared[baseline.name] = baseline.prepare(layer.experts, problem)
            except foreign_errors() as error:  # a foreign library may raise anything, and is then left out
                self._note(f"{baseline.name}: {summary(error)}")
                return None
        return layer.prepared[baseline.name]

    def _configs(self, plan: BenchPlan, backend: Backend, problem: MoEProblem) -> Sequence[BackendConfig]:
        if plan.configs == "all":
            return backend.configs(problem)
        if plan.configs == "chosen":
            for choice in self._measured.rank(problem):
                if choice.backend == backend.name and choice.config is not None:
                    return (backend.config_type.model_validate(dict(choice.config)),)
        return (backend.default_config(problem),)


def available_backends(names: Sequence[str], machine: Machine, note: Note) -> tuple[Backend, ...]:
    """The backends that a machine has; `note` takes the reason of each one that is not available.

    Raises:
        UnknownNameError: A name is not registered.
    """
    backends = []
    for made in (make_backend(name, machine) for name in names):
        if made.registered and made.reasons:
            note(f"backend {made.name!r} is not available: {'; '.join(made.reasons)}")
        else:
            backends.append(made.require())
    return tuple(backends)


def _of_backend(
    backend: Backend, experts: ExpertWeights, config: BackendConfig, routing: RoutingDistribution, problem: MoEProblem
) -> BenchCandidate:
    return BenchCandidate(
        routing, backend.name, config.model_dump(mode="json"), backend_call(backend, experts, config),
        functools.partial(fast_path_call, backend, experts, config), backend.tolerance[problem.dtype],
        backend.deterministic(config), backend.quantizes_activations(problem),
    )  # fmt: skip


def _of_baseline(baseline: Baseline, call: Call, routing: RoutingDistribution, tolerance: float) -> BenchCandidate:
    return BenchCandidate(routing, baseline.name, {}, call, lambda _: call, tolerance, deterministic=False)
