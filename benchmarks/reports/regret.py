"""What a policy loses against the exhaustive best, with the model it is judged on left out of what it learned from.

    python -m moe_dispatch.benchmarks.reports.regret benchmarks/results/nvidia_h200 --machine h200.json [--json]

Regret at a point is time of the choice / time of the fastest candidate − 1, times being geometric means over the
routing distributions. A choice without a configuration is its backend's default. A choice that did not start at a
token count, because it was far behind on either side, has the time that lies between those two; so has one that a
single run found far behind, if that is less: runs that are alone are at times ten times too long. One that has no time
at all is counted as unmeasured. In its place stands its backend's fastest if it is a default, which the sweep may be
older than, and else the next in the ranking. Where there is none, the policy is not judged at the point.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moe_dispatch.benchmarks.command import mistakes_exit
from moe_dispatch.benchmarks.rows import BenchRow, load
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.machine import Machine
from moe_dispatch.policies.learned.defaults import default_identity, find_backend
from moe_dispatch.policies.learned.fit import Observation, fit_model
from moe_dispatch.policies.learned.policy import LearnedPolicy
from moe_dispatch.policies.measurements.schema import Identity
from moe_dispatch.policies.measurements.table import curves, geometric_mean
from moe_dispatch.policies.rules import RulesPolicy
from moe_dispatch.policy import Choice
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import BACKENDS
from moe_dispatch.workloads import WORKLOADS, Workload

# vLLM 0.20.2 with DeepGEMM for block FP8: `_valid_deep_gemm` in fused_moe/experts/deep_gemm_moe.py, which
# fused_moe/triton_deep_gemm_moe.py asks. Tokens at least, and K and N multiples of, DeepGEMM's alignment; N above 512.
VLLM_DEEP_GEMM_ALIGNMENT: Final = 128
VLLM_DEEP_GEMM_NARROW: Final = 512

Rank = Callable[[MoEProblem], Sequence[Choice]]
Times = Mapping[Identity, float]


@dataclass(frozen=True)
class Judged:
    """A policy at a point.

    Attributes:
        regret: Time of the choice / least time − 1; None where nothing that it ranks was measured.
        unmeasured: Whether it stands in for a choice that has no time.
    """

    regret: float | None
    unmeasured: bool


def bench_observations(rows: Iterable[BenchRow], machine: Machine) -> list[Observation]:
    """Times of dispatchable backends, one per problem and candidate.

    Who left a race early was timed on some of the routings: there it is compared with the fastest of those that were
    timed on all, and does not pass it.

    Raises:
        InvalidInputError: A row is of another machine.
    """
    times: dict[MoEProblem, dict[Identity, dict[str, float]]] = {}
    spread: set[tuple[MoEProblem, Identity]] = set()
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
                spread.add((_problem(row, machine), identity))
    found = []
    for problem, by_candidate in times.items():
        routings = set().union(*by_candidate.values())
        whole = {
            identity: geometric_mean(list(us.values())) for identity, us in by_candidate.items() if set(us) == routings
        }
        if not whole:
            continue
        leader = min(whole, key=lambda one: whole[one])
        for identity, us in by_candidate.items():
            behind = geometric_mean([time / by_candidate[leader][routing] for routing, time in us.items()])
            score = whole.get(identity, max(1.0, behind) * whole[leader])
            once = identity != leader and (problem, identity) not in spread
            found.append(Observation(problem, identity, score, once))
    return found


def judge(seen: Sequence[Observation], machine: Machine) -> dict[str, dict[MoEProblem, Judged]]:
    """Every policy at every point.

    Raises:
        InvalidInputError: Fewer than two models were measured.
    """
    shapes = {_shape(row.problem) for row in seen}
    if len(shapes) < 2:
        raise InvalidInputError(f"leaving one model out needs rows of two models at least, got {len(shapes)}")
    points: dict[MoEProblem, dict[Identity, float]] = {}
    once: dict[MoEProblem, dict[Identity, float]] = {}
    for row in seen:
        (once if row.once else points).setdefault(row.problem, {})[row.candidate] = row.us
    learned = {shape: _learned([row for row in seen if _shape(row.problem) != shape], machine) for shape in shapes}
    rules = RulesPolicy(machine).rank
    policies: dict[str, Rank] = {
        # What it does not know is left to the rules, as the dispatcher does.
        "learned": lambda problem: (*learned[_shape(problem)](problem), *rules(problem)),
        "rules": rules,
        "always_vllm": lambda _: (Choice("vllm_fused_moe", ""),),
        "always_deep_gemm": lambda _: (Choice("deep_gemm", ""),),
        "vllm_rule": _vllm_rule,
        "vllm_deep_gemm_rule": _vllm_deep_gemm_rule,
        "oracle": lambda problem: _fastest(points[problem]),
    }
    known = {problem: dict(times) for problem, times in points.items()}
    for more in (_between(points), once):
        for problem, times in more.items():
            for candidate, us in times.items():
                known[problem][candidate] = min(us, known[problem].get(candidate, us))
    return {
        name: {
            problem: _judged(rank(problem), problem, known[problem], min(times.values()), machine)
            for problem, times in points.items()
        }
        for name, rank in policies.items()
    }


def summary(judged: Iterable[Judged]) -> dict[str, float]:
    """Mean, 95th percentile and worst regret as fractions, over how many points, and how many choices had no time."""
    everything = list(judged)
    ordered = sorted(one.regret for one in everything if one.regret is not None)
    counts = {"points": len(ordered), "unmeasured": sum(one.unmeasured for one in everything)}
    if not ordered:
        return {"mean": math.nan, "p95": math.nan, "worst": math.nan, **counts}
    return {
        "mean": math.fsum(ordered) / len(ordered),
        "p95": ordered[math.ceil(0.95 * len(ordered)) - 1],
        "worst": ordered[-1],
        **counts,
    }


def _learned(seen: Sequence[Observation], machine: Machine) -> Rank:
    try:
        learned = LearnedPolicy(machine, fit_model(seen, machine))
    except InvalidInputError:  # too few layers are left
        return lambda _: ()
    rank: Rank = learned.rank
    return rank


def _between(points: Mapping[MoEProblem, Times]) -> dict[MoEProblem, dict[Identity, float]]:
    """Times of candidates that were measured below and above a token count and not there."""
    by_layer: dict[MoEProblem, dict[int, Times]] = {}
    for problem, times in points.items():
        by_layer.setdefault(dataclasses.replace(problem, M=1), {})[problem.M] = times
    found: dict[MoEProblem, dict[Identity, float]] = {}
    for layer, by_tokens in by_layer.items():
        for curve in curves(by_tokens):
            for M in by_tokens:
                if curve.tokens[0] < M < curve.tokens[-1] and M not in curve.tokens:
                    found.setdefault(dataclasses.replace(layer, M=M), {})[curve.identity] = curve.at(M)
    return found


def _judged(ranking: Sequence[Choice], problem: MoEProblem, times: Times, least: float, machine: Machine) -> Judged:
    unmeasured = False
    for choice in ranking:
        backend = find_backend(choice.backend, machine)
        if backend is None or backend.unsupported_reasons(problem):
            continue
        default = default_identity(backend, problem)
        us = times.get(default if choice.config is None else (choice.backend, tuple(sorted(choice.config.items()))))
        if us is None:
            unmeasured = True
            if choice.config is None:
                us = min((us for (name, _), us in times.items() if name == choice.backend), default=None)
        if us is not None:
            return Judged(max(0.0, us / least - 1), unmeasured)
    return Judged(None, unmeasured)


def _vllm_rule(problem: MoEProblem) -> tuple[Choice, ...]:
    """What vLLM 0.20.2 runs by itself on one GPU, where FlashInfer is not installed.

    `_get_priority_backends` in fused_moe/oracle/fp8.py puts Triton first for block FP8 on capability 9.0 without expert
    parallelism, at every token count. Elsewhere DeepGEMM comes before Triton, and with its E8M0 scales, which are the
    default, its shape is not asked about.
    """
    deep_gemm = problem.dtype == "fp8" and problem.capability != (9, 0)
    return (Choice("deep_gemm" if deep_gemm else "vllm_fused_moe", ""), Choice("vllm_fused_moe", ""))


def _vllm_deep_gemm_rule(problem: MoEProblem) -> tuple[Choice, ...]:
    """What it runs with ``VLLM_USE_DEEP_GEMM=1 VLLM_USE_DEEP_GEMM_E8M0=0``: DeepGEMM where it takes the shape."""
    aligned = problem.K % VLLM_DEEP_GEMM_ALIGNMENT == 0 and problem.N % VLLM_DEEP_GEMM_ALIGNMENT == 0
    wide = aligned and problem.N > VLLM_DEEP_GEMM_NARROW and problem.M >= VLLM_DEEP_GEMM_ALIGNMENT
    first = "deep_gemm" if problem.dtype == "fp8" and wide else "vllm_fused_moe"
    return (Choice(first, ""), Choice("vllm_fused_moe", ""))


def _fastest(times: Mapping[Identity, float]) -> tuple[Choice, ...]:
    backend, config = min(times, key=lambda one: times[one])
    return (Choice(backend, "", dict(config)),)


def _shape(problem: MoEProblem) -> tuple[int, int, int, int]:
    return problem.E, problem.topk, problem.K, problem.N


def _problem(row: BenchRow, machine: Machine) -> MoEProblem:
    known = WORKLOADS.get(row.workload, Workload(row.workload, E=row.E, topk=row.topk, K=row.K, N=row.N))
    return known.problem(row.M, row.dtype, machine, row.mode)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the regrets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", type=Path, help="JSON Lines of `moe-dispatch bench`, or folders of them")
    parser.add_argument("--machine", type=Path, help="machine that was measured, as JSON; this one if left out")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    given: Any = parser.parse_args(arguments)
    with mistakes_exit(parser):
        machine = Machine.load(given.machine) if given.machine else Machine.inspect()
        judged = judge(bench_observations(load(given.rows), machine), machine)
    found = {name: summary(at.values()) for name, at in judged.items()}
    if given.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{'policy':20}{'mean':>9}{'p95':>9}{'worst':>9}{'points':>8}{'unmeasured':>12}")
    for name, row in found.items():
        regrets = "".join(f"{row[key]:>9.2%}" for key in ("mean", "p95", "worst"))
        print(f"{name:20}{regrets}{row['points']:>8}{row['unmeasured']:>12}")


if __name__ == "__main__":
    main()
