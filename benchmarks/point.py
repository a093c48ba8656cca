"""One point at work: candidates are checked against fp32, and those that are right are timed in turns."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from moe_dispatch.benchmarks.candidates import BenchCandidate
from moe_dispatch.benchmarks.stopwatch import Stopwatch
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.guard import foreign_errors
from moe_dispatch.measure import LayerInputs, Timing, Verdict, make_inputs, reference_outputs, time_interleaved, verify
from moe_dispatch.measure.energy import EnergyOf
from moe_dispatch.problem import Mode, MoEProblem
from moe_dispatch.system.failures import lost_device, out_of_memory, summary
from moe_dispatch.workloads import RoutingDistribution

SEED: Final = 0
# The fp32 reference is the slow part at large M, and one output of 2048 tokens checks as many rows as a hundred of 16.
# Beyond this many tokens, evenly spread rows are compared with the reference, and the others must be finite.
CHECKED_TOKENS: Final = 2048
# Least number of samples of each candidate; a candidate that takes long hardly differs from one sample to the next.
MIN_ROUNDS: Final = 3


@dataclass(frozen=True)
class PointInputs:
    """What a point's candidates run on under one routing distribution.

    Attributes:
        inputs: Distinct inputs, each with a routing of its own.
        references: fp32 reference outputs of the first of them, with activations quantised where the weights are FP8.
        unquantized: The same without, where a candidate needs them.
    """

    inputs: tuple[LayerInputs, ...]
    references: tuple[Tensor, ...]
    unquantized: tuple[Tensor, ...] = ()

    @classmethod
    def draw(
        cls,
        problem: MoEProblem,
        routing: RoutingDistribution,
        experts: ExpertWeights,
        count: int,
        *,
        unquantized: bool = False,
    ) -> "PointInputs":
        """Draw `count` inputs, the same ones in every run, and compute the references.

        With `unquantized`, the references without quantised activations are computed too.
        """
        inputs = make_inputs(problem, routing, experts.device, count, SEED)
        checked = inputs[: max(1, min(len(inputs), CHECKED_TOKENS // problem.M))]
        references, others = (
            reference_outputs(experts, checked, tokens=CHECKED_TOKENS, quantize_activations=quantized) if wanted else ()
            for quantized, wanted in ((True, True), (False, unquantized))
        )
        return cls(inputs, references, others)

    def references_of(self, candidate: BenchCandidate) -> tuple[Tensor, ...]:
        """What a candidate's results are compared with."""
        return self.references if candidate.quantizes_activations else self.unquantized

    @property
    def hit_experts(self) -> float:
        """Experts with at least one token, mean over the inputs."""
        return sum(inputs.hit_experts for inputs in self.inputs) / len(self.inputs)


@dataclass(frozen=True)
class Outcome:
    """What was seen of one candidate.

    Attributes:
        verdict: Result of its check; None if it raised.
        timing: Its time; None if it was wrong or raised.
        reason: Why there is no time; empty if there is one.
        joules: Energy of one call; None if it was not measured.
    """

    verdict: Verdict | None
    timing: Timing | None
    reason: str
    joules: float | None = None


def check_and_time(
    candidates: Sequence[BenchCandidate],
    drawn: Mapping[RoutingDistribution, PointInputs],
    mode: Mode,
    point_s: float,
    stopwatch: Stopwatch,
    energy: EnergyOf | None = None,
) -> list[Outcome]:
    """Check every candidate, then time those that are right, taking turns over all routing distributions.

    Timing the distributions together keeps their times comparable: the device is in the same state for all of them.
    Energy, if it is asked for, is measured afterwards, one candidate after another.

    Returns:
        One outcome per candidate, in their order.

    Raises:
        RuntimeError: The CUDA context is lost; nothing further can run in this process.
    """
    failures: dict[int, str] = {}
    verdicts: dict[int, Verdict] = {}

    def fail(index: int, error: BaseException) -> None:
        if lost_device(error):
            raise error
        failures[index] = f"out of memory: {summary(error)}" if out_of_memory(error) else summary(error)
        release_memory(drawn[candidates[index].routing].inputs[0].hidden_states.device)

    for index, candidate in enumerate(candidates):
        point = drawn[candidate.routing]
        try:
            with stopwatch.spending("checks"):
                verdicts[index] = verify(
                    candidate.call, point.inputs, point.references_of(candidate), tolerance=candidate.tolerance,
                    mode=mode, deterministic=candidate.deterministic,
                )  # fmt: skip
        except foreign_errors() as error:  # a candidate may raise anything, and loses only its own row
            fail(index, error)
        else:
            if not verdicts[index].ok:
                failures[index] = f"wrong result: {verdicts[index].reason}"
    with stopwatch.spending("timing"):
        calls = {
            index: candidate.call if mode == "graph" else candidate.eager_call(drawn[candidate.routing].inputs[0])
            for index, candidate in enumerate(candidates)
            if index not in failures
        }
        timings: dict[int, Timing] = time_interleaved(
            calls,
            {index: drawn[candidate.routing].inputs for index, candidate in enumerate(candidates)},
            mode=mode,
            budget_s=point_s,
            min_rounds=MIN_ROUNDS,
            on_failure=fail,
        )
    joules: dict[int, float] = {}
    if energy is not None:
        for index in timings:
            inputs = drawn[candidates[index].routing].inputs
            try:
                with stopwatch.spending("energy"):
                    joules[index] = energy(calls[index], inputs, mode)
            except foreign_errors() as error:
                if lost_device(error):
                    raise
                release_memory(inputs[0].hidden_states.device)  # the time stands, without an energy
    return [
        Outcome(verdicts.get(index), timings.get(index), failures.get(index, ""), joules.get(index))
        for index in range(len(candidates))
    ]


def release_memory(device: torch.device) -> None:
    """Collect unreachable tensors and give cached blocks back, so that the next candidate starts with free memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
