"""Regret of policies: what their choices lose against the fastest candidate that was measured.

The learned policy is judged by leave-one-out: a model's layers are left out of what it learns from.

Regret at a point is the time of the choice over that of the fastest candidate, less 1. A candidate's time is the
geometric mean over the routing distributions, and a choice without a configuration stands for its backend's default.
Not every choice has a time:

- A candidate that a calibration did not start at a token count, because it was far behind at both neighbours, gets the
  time that is interpolated between the two.
- A candidate that a single run showed to be far behind gets that time, or the interpolated one if it is less: single
  runs are at times ten times too long.
- Any other choice without a time is counted as unmeasured. It is replaced by the fastest configuration of its backend,
  or else of its family (`rules.FAMILIES`), if it is a default, which may be newer than the measurements, and otherwise
  by the next choice of the ranking. If nothing that a policy ranks has a time, the policy is not judged at the point.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from moe_dispatch.benchmarks.rows import BenchRow
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.machine import Machine
from moe_dispatch.policies.calibration.request import DEFAULT_ROUTINGS
from moe_dispatch.policies.learned.defaults import completed, default_identity
from moe_dispatch.policies.learned.fit import Observation, fit_model
from moe_dispatch.policies.learned.policy import LearnedPolicy
from moe_dispatch.policies.measurements.schema import Identity
from moe_dispatch.policies.measurements.table import geometric_mean, share_between
from moe_dispatch.policies.rules import FAMILIES, RulesPolicy
from moe_dispatch.policy import Choice
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import BACKENDS, make_backend
from moe_dispatch.workloads import WORKLOADS, Workload

# When vLLM 0.20.2 gives a block FP8 layer to DeepGEMM (`_valid_deep_gemm` in fused_moe/experts/deep_gemm_moe.py, called
# by fused_moe/triton_deep_gemm_moe.py): K and N are multiples of the alignment, M is at least that, and N is above 512.
VLLM_DEEP_GEMM_ALIGNMENT: Final = 128
VLLM_DEEP_GEMM_NARROW: Final = 512

Rank = Callable[[MoEProblem], Sequence[Choice]]
Times = Mapping[Identity, float]


@dataclass(frozen=True)
class Judged:
    """A policy's choice at a point.

    Attributes:
        regret: Time of the choice over the least time, less 1; None if nothing that the policy ranks was measured.
        unmeasured: Whether the policy's first choice has no time and another one stands for it.
    """

    regret: float | None
    unmeasured: bool


def bench_observations(rows: Iterable[BenchRow], machine: Machine) -> list[Observation]:
    """Times of dispatchable backends, one per problem and candidate.

    A candidate that left successive halving early was timed on some of the routing distributions only. On those it is
    compared with the fastest of the candidates that were timed on all, and its time never passes that one's.

    Raises:
        InvalidInputError: A row was measured on another machine.
    """
    times: dict[MoEProblem, dict[Identity, dict[str, float]]] = {}
    repeated: set[tuple[MoEProblem, Identity]] = set()
    for row in rows:
        if row.machine != machine.name:
            raise InvalidInputError(
                f"a row was measured on {row.machine!r}, and this is {machine.name!r}; give rows of one machine, and "
                "--machine FILE with its description (`moe-dispatch doctor --json` there) if it is another than this"
            )
        if row.us is not None and row.backend in BACKENDS.names():
            identity: Identity = (row.backend, tuple(sorted(row.config.items())))
            times.setdefault(_problem(row, machine), {}).setdefault(identity, {})[row.routing] = row.us
            if row.us_q1 is None or row.us_q1 != row.us_q3:
                repeated.add((_problem(row, machine), identity))
    observations = []
    for problem, by_candidate in times.items():
        routings = set().union(*by_candidate.values())
        complete = {
            identity: geometric_mean(list(us.values())) for identity, us in by_candidate.items() if set(us) == routings
        }
        if not complete:
            continue
        leader = min(complete, key=lambda identity: complete[identity])
        for identity, us in by_candidate.items():
            behind = geometric_mean([time / by_candidate[leader][routing] for routing, time in us.items()])
            score = complete.get(identity, max(1.0, behind) * complete[leader])
            once = identity != leader and (problem, identity) not in repeated
            observations.append(Observation(problem, identity, score, once, us.get("uniform")))
    return observations


def judge(observations: Sequence[Observation], machine: Machine) -> dict[str, dict[MoEProblem, Judged]]:
    """Judge every policy at every point.

    Raises:
        InvalidInputError: Fewer than two models were measured.
    """
    shapes = {_shape(observation.problem) for observation in observations}
    if len(shapes) < 2:
        raise InvalidInputError(f"leaving one model out needs rows of two models at least, got {len(shapes)}")
    points: dict[MoEProblem, dict[Identity, float]] = {}
    single_runs: dict[MoEProblem, dict[Identity, float]] = {}
    for observation in observations:
        times_of = single_runs if observation.once else points
        times_of.setdefault(observation.problem, {})[completed(observation.candidate)] = observation.us
    learned = {
        shape: _learned([row for row in observations if _shape(row.problem) != shape], machine) for shape in shapes
    }
    rules = RulesPolicy(machine).rank
    policies: dict[str, Rank] = {
        # The rules answer what the learned policy does not know, as they do in the dispatcher.
        "learned": lambda problem: (*learned[_shape(problem)](problem), *rules(problem)),
        "rules": rules,
        # Which is what vLLM 0.20.2 chooses, too, with its default settings on one GPU, without FlashInfer:
        # `_get_priority_backends` in fused_moe/oracle/fp8.py puts Triton first for block FP8 on capability 9.0 without
        # expert parallelism, and on others DeepGEMM, which the backend `deep_gemm` does not run there.
        "always_vllm": lambda _: (Choice("vllm_fused_moe", ""),),
        "always_deep_gemm": lambda _: (Choice("deep_gemm", ""),),
        "vllm_deep_gemm_rule": _vllm_deep_gemm_rule,
        "oracle": lambda problem: _fastest(points[problem]),
    }
    known = {problem: dict(times) for problem, times in points.items()}
    for further in (_between(points), single_runs):
        for problem, times in further.items():
            for candidate, us in times.items():
                known[problem][candidate] = min(us, known[problem].get(candidate, us))
    return {
        name: {
            problem: _judged(rank(problem), problem, known[problem], min(times.values()), machine)
            for problem, times in points.items()
        }
        for name, rank in policies.items()
    }


def by_routing(rows: Iterable[BenchRow]) -> dict[str, list[Judged]]:
    """What a choice that does not know the routing loses under each routing distribution: a bound for one that does.

    The choice is the candidate with the least geometric mean over those distributions that a calibration measures by
    default, or the one of them that the rows have. Candidates count that were timed under every distribution of their
    point.
    """
    points: dict[tuple[str, str, int, str], dict[Identity, dict[str, float]]] = {}
    for row in rows:
        if row.us is not None and row.backend in BACKENDS.names():
            identity: Identity = (row.backend, tuple(sorted(row.config.items())))
            at = points.setdefault((row.workload, row.dtype, row.M, row.mode), {})
            at.setdefault(identity, {})[row.routing] = row.us
    judged: dict[str, list[Judged]] = {}
    for at in points.values():
        routings = set().union(*at.values())
        complete = [times for times in at.values() if set(times) == routings]
        default = [name for name in DEFAULT_ROUTINGS if name in routings]
        if complete and default:
            chosen = min(complete, key=lambda times: geometric_mean([times[name] for name in default]))
            for name in sorted(routings):
                least = min(times[name] for times in complete)
                judged.setdefault(name, []).append(Judged(chosen[name] / least - 1, unmeasured=False))
    return judged


def summary(judged: Iterable[Judged]) -> dict[str, Any]:
    """Mean, 95th percentile and worst regret as fractions, the number of points, and of unmeasured choices.

    The fractions are None where no point is judged: JSON, which the commands print, has no NaN.
    """
    judged = list(judged)
    ordered = sorted(choice.regret for choice in judged if choice.regret is not None)
    counts = {"points": len(ordered), "unmeasured": sum(choice.unmeasured for choice in judged)}
    if not ordered:
        return {"mean": None, "p95": None, "worst": None, **counts}
    return {
        "mean": math.fsum(ordered) / len(ordered),
        "p95": ordered[math.ceil(0.95 * len(ordered)) - 1],
        "worst": ordered[-1],
        **counts,
    }


def _learned(observations: Sequence[Observation], machine: Machine) -> Rank:
    try:
        learned = LearnedPolicy(machine, fit_model(observations, machine))
    except InvalidInputError:  # too few layers are left to learn from
        return lambda _: ()
    rank: Rank = learned.rank
    return rank


def _between(points: Mapping[MoEProblem, Times]) -> dict[MoEProblem, dict[Identity, float]]:
    """Times of candidates that were measured below and above a token count and not at it, as powers of M."""
    by_layer: dict[MoEProblem, dict[int, Times]] = {}
    for problem, times in points.items():
        by_layer.setdefault(dataclasses.replace(problem, M=1), {})[problem.M] = times
    interpolated: dict[MoEProblem, dict[Identity, float]] = {}
    for layer, by_tokens in by_layer.items():
        measured: dict[Identity, list[tuple[int, float]]] = {}
        for M, times in sorted(by_tokens.items()):
            for identity, us in times.items():
                measured.setdefault(identity, []).append((M, math.log(us)))
        for identity, logs in measured.items():
            for (lower, log), (upper, upper_log) in itertools.pairwise(logs):
                for M in filter(range(lower + 1, upper).__contains__, by_tokens):
                    share = share_between(lower, M, upper)
                    us = math.exp((1 - share) * log + share * upper_log)
                    interpolated.setdefault(dataclasses.replace(layer, M=M), {})[identity] = us
    return interpolated


def _judged(ranking: Sequence[Choice], problem: MoEProblem, times: Times, least: float, machine: Machine) -> Judged:
    unmeasured = False
    for choice in ranking:
        backend = make_backend(choice.backend, machine).backend
        if backend is None or backend.unsupported_reasons(problem):
            continue
        default = default_identity(backend, problem)
        us = times.get(default if choice.config is None else (choice.backend, tuple(sorted(choice.config.items()))))
        if us is None:
            unmeasured = True
            if choice.config is None:
                us = _least(times, {choice.backend}) or _least(times, _family(choice.backend))
        if us is not None:
            return Judged(max(0.0, us / least - 1), unmeasured)
    return Judged(None, unmeasured)


def _least(times: Times, backends: Container[str]) -> float | None:
    return min((us for (name, _), us in times.items() if name in backends), default=None)


def _family(backend: str) -> set[str]:
    family = FAMILIES.get(backend, backend)
    return {family, *(member for member, of in FAMILIES.items() if of == family)}


def _vllm_deep_gemm_rule(problem: MoEProblem) -> tuple[Choice, ...]:
    """The choice of vLLM 0.20.2 with ``VLLM_USE_DEEP_GEMM=1 VLLM_USE_DEEP_GEMM_E8M0=0``: DeepGEMM if the shape fits."""
    aligned = problem.K % VLLM_DEEP_GEMM_ALIGNMENT == 0 and problem.N % VLLM_DEEP_GEMM_ALIGNMENT == 0
    wide = aligned and problem.N > VLLM_DEEP_GEMM_NARROW and problem.M >= VLLM_DEEP_GEMM_ALIGNMENT
    first = "deep_gemm" if problem.dtype == "fp8" and wide else "vllm_fused_moe"
    return (Choice(first, ""), Choice("vllm_fused_moe", ""))


def _fastest(times: Mapping[Identity, float]) -> tuple[Choice, ...]:
    backend, config = min(times, key=lambda identity: times[identity])
    return (Choice(backend, "", dict(config)),)


def _shape(problem: MoEProblem) -> tuple[int, int, int, int]:
    return problem.E, problem.topk, problem.K, problem.N


def _problem(row: BenchRow, machine: Machine) -> MoEProblem:
    layer = WORKLOADS.get(row.workload, Workload(row.workload, E=row.E, topk=row.topk, K=row.K, N=row.N))
    return layer.problem(row.M, row.dtype, machine, row.mode)
