"""What a policy loses against the exhaustive best, with the model it is judged on left out of what it learned from.

    python -m moe_dispatch.benchmarks.regret benchmarks/results/nvidia_h200 --machine h200.json [--json]

Regret at a point is time of the choice / time of the fastest candidate − 1, times being geometric means over the
routing distributions. A rule that names a backend without a configuration gets the backend's default one, or where
that was never measured the backend's fastest. A choice that did not start at a token count, because it was far behind
on either side, has the time that lies between those two. Where it has none, the next one in the ranking counts.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from moe_dispatch.benchmarks.rows import BenchRow, load
from moe_dispatch.errors import InvalidInputError, MoEDispatchError
from moe_dispatch.machine import Machine
from moe_dispatch.policies.fit import Observation, fit_model
from moe_dispatch.policies.learned import LearnedPolicy
from moe_dispatch.policies.rules import RulesPolicy
from moe_dispatch.policies.table import Identity, curves, geometric_mean
from moe_dispatch.policy import Choice
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import BACKENDS
from moe_dispatch.workloads import WORKLOADS, Workload

# vLLM 0.20.2 with DeepGEMM for block FP8: `_valid_deep_gemm` in fused_moe/experts/deep_gemm_moe.py, which
# fused_moe/triton_deep_gemm_moe.py asks. Tokens at least, and K and N multiples of, DeepGEMM's alignment; N above 512.
VLLM_DEEP_GEMM_ALIGNMENT: Final = 128
VLLM_DEEP_GEMM_NARROW: Final = 512

Rank = Callable[[MoEProblem], Sequence[Choice]]


def bench_observations(rows: Iterable[BenchRow], machine: Machine) -> list[Observation]:
    """Times of dispatchable backends, one per problem and candidate.

    Who left a race early was timed on some of the routings: there it is compared with the fastest of those that were
    timed on all.
    """
    times: dict[MoEProblem, dict[Identity, dict[str, float]]] = {}
    for row in rows:
        if row.us is not None and row.backend in BACKENDS.names():
            identity: Identity = (row.backend, tuple(sorted(row.config.items())))
            times.setdefault(_problem(row, machine), {}).setdefault(identity, {})[row.routing] = row.us
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
            found.append(Observation(problem, identity, whole.get(identity, behind * whole[leader])))
    return found


def regrets(seen: Sequence[Observation], machine: Machine) -> dict[str, dict[str, float]]:
    """Mean, 95th percentile and worst regret of each policy, as fractions.

    Raises:
        InvalidInputError: Fewer than two models were measured.
    """
    layers = {row.problem.layer for row in seen}
    shapes = {_shape(layer) for layer in layers}
    if len(shapes) < 2:
        raise InvalidInputError(f"leaving one model out needs rows of two models at least, got {len(shapes)}")
    points: dict[MoEProblem, dict[Identity, float]] = {}
    for row in seen:
        points.setdefault(row.problem, {})[row.candidate] = row.us
    learned = {
        shape: LearnedPolicy(machine, fit_model([row for row in seen if _shape(row.problem) != shape], machine))
        for shape in shapes
    }
    policies: dict[str, Rank] = {
        "learned": lambda problem: learned[_shape(problem)].rank(problem),
        "rules": RulesPolicy(machine).rank,
        "always_vllm": lambda _: (Choice("vllm_fused_moe", ""),),
        "always_deep_gemm": lambda _: (Choice("deep_gemm", ""),),
        "vllm_rule": _vllm_rule,
        "vllm_deep_gemm_rule": _vllm_deep_gemm_rule,
        "oracle": lambda problem: _fastest(points[problem]),
    }

    known = _between(points)

    def regret(rank: Rank) -> list[float]:
        return [
            _regret(rank, problem, times | known.get(problem, {}), min(times.values()), machine)
            for problem, times in points.items()
        ]

    return {name: _summary(regret(rank)) for name, rank in policies.items()}


def _between(points: Mapping[MoEProblem, Mapping[Identity, float]]) -> dict[MoEProblem, dict[Identity, float]]:
    """Times of candidates that were measured below and above a token count and not there."""
    by_layer: dict[MoEProblem, dict[int, Mapping[Identity, float]]] = {}
    for problem, times in points.items():
        by_layer.setdefault(dataclasses.replace(problem, M=1), {})[problem.M] = times
    found: dict[MoEProblem, dict[Identity, float]] = {}
    for layer, by_tokens in by_layer.items():
        for curve in curves(by_tokens):
            for M in by_tokens:
                if curve.tokens[0] < M < curve.tokens[-1] and M not in curve.tokens:
                    found.setdefault(dataclasses.replace(layer, M=M), {})[curve.identity] = curve.at(M)
    return found


def _regret(rank: Rank, problem: MoEProblem, times: Mapping[Identity, float], least: float, machine: Machine) -> float:
    for choice in rank(problem):
        if (us := _time(choice, problem, times, machine)) is not None:
            return max(0.0, us / least - 1)
    # Nothing that it names was measured here: it would fall back to the slowest that was.
    return max(times.values()) / least - 1


def _time(choice: Choice, problem: MoEProblem, times: Mapping[Identity, float], machine: Machine) -> float | None:
    mine = {config: us for (backend, config), us in times.items() if backend == choice.backend}
    if not mine:
        return None
    if choice.config is not None:
        return mine.get(tuple(sorted(choice.config.items())))
    default = BACKENDS.load(choice.backend)(machine).default_config(problem).model_dump(mode="json")
    return mine.get(tuple(sorted(default.items())), min(mine.values()))


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


def _summary(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "mean": math.fsum(ordered) / len(ordered),
        "p95": ordered[math.ceil(0.95 * len(ordered)) - 1],
        "worst": ordered[-1],
    }


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
    try:
        machine = Machine.load(given.machine) if given.machine else Machine.inspect()
        summary = regrets(bench_observations(load(given.rows), machine), machine)
    except MoEDispatchError as error:
        parser.exit(2, f"error: {error}\n")
    if given.json:
        print(json.dumps(summary, indent=1))
        return
    print(f"{'policy':18}{'mean':>9}{'p95':>9}{'worst':>9}")
    for name, row in summary.items():
        print(f"{name:18}" + "".join(f"{row[key]:>9.2%}" for key in ("mean", "p95", "worst")))


if __name__ == "__main__":
    main()
