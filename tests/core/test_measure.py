"""The measuring itself: what it accepts, what it refuses, and the order in which candidates are timed."""

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine, current_machine
from moe_dispatch.measure import (
    H200_CEILINGS,
    Call,
    LayerInputs,
    Timing,
    Turns,
    backend_call,
    known_ceilings,
    make_inputs,
    measure_ceilings,
    reference_outputs,
    relative_error,
    time_interleaved,
    verify,
    worst_row_error,
)
from moe_dispatch.problem import DType, MoEProblem
from moe_dispatch.registry import BACKENDS
from moe_dispatch.workloads import ROUTINGS, Workload, make_experts

LAYER = Workload("tiny", E=4, topk=2, K=64, N=32)
TOKENS = 6


@dataclass
class Layer:
    experts: ExpertWeights
    inputs: tuple[LayerInputs, ...]
    truths: tuple[Tensor, ...]
    right: Call


def layer(dtype: DType = "fp32", device: str = "cpu") -> Layer:
    machine = current_machine(device)
    problem = LAYER.problem(TOKENS, dtype, machine)
    experts = make_experts(LAYER, dtype, device, torch.Generator(device).manual_seed(0))
    inputs = make_inputs(problem, ROUTINGS["uniform"], device, count=3)
    backend = BACKENDS.load("reference")(machine)
    call = backend_call(backend, experts, backend.default_config(problem))
    return Layer(experts, inputs, reference_outputs(experts, inputs), call)


@pytest.fixture(scope="module")
def tiny() -> Layer:
    return layer()


def test_inputs_are_distinct_and_reproducible() -> None:
    problem = LAYER.problem(16, "bf16", current_machine("cpu"))
    first, second = (make_inputs(problem, ROUTINGS["uniform"], "cpu", count=8, seed=3) for _ in range(2))
    assert len(first) == 8
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.topk_ids, b.topk_ids)
        assert torch.equal(a.hidden_states, b.hidden_states)
    assert len({tuple(given.topk_ids.flatten().tolist()) for given in first}) == 8
    assert first[0].hidden_states.dtype == torch.bfloat16
    assert first[0].hit_experts == len(set(first[0].topk_ids.flatten().tolist()))


def test_at_least_one_input_is_drawn() -> None:
    with pytest.raises(InvalidInputError, match="count must be at least 1"):
        make_inputs(LAYER.problem(1, "fp32", current_machine("cpu")), ROUTINGS["uniform"], "cpu", count=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_the_reference_is_right(dtype: DType) -> None:
    made = layer(dtype)
    verdict = verify(made.right, made.inputs, made.truths, tolerance=1e-2, deterministic=True)
    assert verdict.ok, verdict.reason
    assert verdict.repeatable
    assert made.truths[0].dtype == torch.float32


def _partly_unwritten(inputs: LayerInputs, right: Tensor) -> Tensor:
    out = torch.empty_like(inputs.hidden_states)
    out[:-1] = right[:-1]
    return out


def _changing_its_input(inputs: LayerInputs, right: Tensor) -> Tensor:
    inputs.hidden_states.mul_(1.0001)
    return right


# What a candidate makes of its inputs and of the right output, and what is said of it.
WRONG: dict[str, tuple[Callable[[LayerInputs, Tensor], Tensor], str]] = {
    "off by a fifth": (
        lambda _, right: right * 1.2,
        "input 0 has relative error 0.2 against fp32, at most 0.01 allowed",
    ),
    "partly unwritten": (_partly_unwritten, "relative error inf"),
    "adds to unset memory": (
        lambda inputs, right: torch.empty_like(inputs.hidden_states).add_(right),
        "relative error inf",
    ),
    "changes its input": (_changing_its_input, "it changes its inputs"),
    "another shape": (lambda _, right: right[:-1], r"has shape \[5, 64\], not \[6, 64\]"),
    "another dtype": (lambda _, right: right.double(), "the output is torch.float64"),
}


@pytest.mark.parametrize(("spoil", "reason"), WRONG.values(), ids=WRONG)
def test_a_wrong_candidate_is_refused(spoil: Callable[[LayerInputs, Tensor], Tensor], reason: str) -> None:
    made = layer()
    verdict = verify(lambda inputs: spoil(inputs, made.right(inputs)), made.inputs, made.truths, tolerance=1e-2)
    assert not verdict.ok
    assert re.search(reason, verdict.reason), verdict.reason


def test_a_missing_row_is_refused_though_the_error_of_the_whole_output_passes(tiny: Layer) -> None:
    inputs = make_inputs(LAYER.problem(400, "fp32", current_machine("cpu")), ROUTINGS["uniform"], "cpu", count=1)
    without_last = torch.ones(400, 1)
    without_last[-1] = 0
    truths = reference_outputs(tiny.experts, inputs)
    verdict = verify(lambda given: tiny.right(given) * without_last, inputs, truths, tolerance=0.1)
    assert not verdict.ok
    assert "a row with relative error" in verdict.reason


def test_a_promise_of_the_same_bits_is_kept(tiny: Layer) -> None:
    def noisy(last: float = 1 + 1e-6) -> Call:
        factors = iter([1.0, 1.0, 1.0, last])
        return lambda given: tiny.right(given) * next(factors)

    racing = verify(noisy(1.009), tiny.inputs, tiny.truths, tolerance=1e-2)
    assert not racing.ok
    assert "more than rounding, so probably a race" in racing.reason
    loose = verify(noisy(), tiny.inputs, tiny.truths, tolerance=1e-3)
    assert loose.ok
    assert not loose.repeatable
    strict = verify(noisy(), tiny.inputs, tiny.truths, tolerance=1e-3, deterministic=True)
    assert not strict.ok
    assert "promised the same bits" in strict.reason


def test_what_a_candidate_raises_surfaces_and_leaves_torch_as_it_was(tiny: Layer) -> None:
    def call(given: LayerInputs) -> Tensor:
        raise RuntimeError("launch failed")

    with pytest.raises(RuntimeError, match="launch failed"):
        verify(call, tiny.inputs, tiny.truths, tolerance=1)
    assert not torch.are_deterministic_algorithms_enabled()


def test_references_must_match_the_inputs(tiny: Layer) -> None:
    for truths in ((), (*tiny.truths, tiny.truths[0])):
        with pytest.raises(InvalidInputError, match="1 to 3 references"):
            verify(tiny.right, tiny.inputs, truths, tolerance=1)


# An output, the reference, and the relative errors of the whole and of the worst row.
ERRORS: dict[str, tuple[list[list[float]], list[list[float]], float, float]] = {
    "equal": ([[3.0, 4.0]], [[3.0, 4.0]], 0.0, 0.0),
    "a tenth": ([[3.3, 4.4]], [[3.0, 4.0]], 0.1, 0.1),
    "one row of two": ([[3.0, 4.0], [0.0, 0.0]], [[3.0, 4.0], [3.0, 4.0]], math.sqrt(0.5), 1.0),
    "NaN in the output": ([[math.nan, 4.0]], [[3.0, 4.0]], math.inf, math.inf),
    "infinity in the output": ([[math.inf, 4.0]], [[3.0, 4.0]], math.inf, math.inf),
    "NaN in both": ([[math.nan, 4.0]], [[math.nan, 4.0]], math.inf, math.inf),
    "zeros as they should be": ([[0.0, 0.0]], [[0.0, 0.0]], 0.0, 0.0),
    "not zeros": ([[0.0, 1.0]], [[0.0, 0.0]], math.inf, math.inf),
    "another shape": ([[1.0]], [[1.0, 1.0]], math.inf, math.inf),
}


@pytest.mark.parametrize(("out", "reference", "whole", "row"), ERRORS.values(), ids=ERRORS)
def test_errors(out: list[list[float]], reference: list[list[float]], whole: float, row: float) -> None:
    assert relative_error(torch.tensor(out), torch.tensor(reference)) == pytest.approx(whole, rel=1e-5)
    assert worst_row_error(torch.tensor(out), torch.tensor(reference)) == pytest.approx(row, rel=1e-5)


def _watched(name: str, seen: list[tuple[str, LayerInputs]]) -> Call:
    """Notes what it is called with; one repeat per sample, since it sleeps longer than a sample has to last."""

    def call(given: LayerInputs) -> Tensor:
        seen.append((name, given))
        return given.hidden_states

    return _sleeping(call, 0.001)


def _passes(seen: list[tuple[str, LayerInputs]], first: LayerInputs) -> str:
    """Whose passes there were, in order: each begins with the first inputs."""
    return "".join(name for name, given in seen if given is first)


def test_candidates_take_turns_and_none_always_comes_after_the_same_one(tiny: Layer) -> None:
    seen: list[tuple[str, LayerInputs]] = []
    slow = {name: _watched(name, seen) for name in "abc"}
    timings = time_interleaved(slow, tiny.inputs, mode="eager", budget_s=0.0, min_rounds=6)
    order = _passes(seen, tiny.inputs[0])
    assert list(timings) == ["a", "b", "c"]
    warm_up = 2 * 3  # to compile, and to see how long one pass takes
    assert order[:warm_up] == "aabbcc"
    assert order[warm_up:] == "abc" + "acb" + "cab" + "cba" + "bca" + "bac"
    assert all(timing.samples == 6 for timing in timings.values())


def test_candidates_may_have_inputs_of_their_own(tiny: Layer) -> None:
    seen: list[tuple[str, LayerInputs]] = []
    inputs = {"a": tiny.inputs[:1], "b": tiny.inputs[1:]}
    timings = time_interleaved({name: _watched(name, seen) for name in "ab"}, inputs, mode="eager", budget_s=0.0)
    assert list(timings) == ["a", "b"]
    for name, mine in inputs.items():
        assert {id(given) for by, given in seen if by == name} == {id(given) for given in mine}


def test_who_was_timed_before_is_ready_and_rounds_lie_side_by_side(tiny: Layer) -> None:
    seen: list[tuple[str, LayerInputs]] = []
    turns = Turns[str](tiny.inputs, mode="eager")
    turns.time({"a": _watched("a", seen)}, budget_s=0.0, min_rounds=1)
    seen.clear()
    timings = turns.time({"a": _watched("a", seen), "b": _watched("b", seen)}, budget_s=0.0, min_rounds=2)
    assert _passes(seen, tiny.inputs[0]) == "bb" + "ab" + "ab"  # only b is made ready
    assert [len(timing.rounds) for timing in timings.values()] == [2, 2]
    turns.close()


def _sleeping(call: Call, seconds: float) -> Call:
    def slept(given: LayerInputs) -> Tensor:
        time.sleep(seconds)
        return call(given)

    return slept


def test_times_are_those_of_one_call(tiny: Layer) -> None:
    begin = time.perf_counter()
    timing = time_interleaved({"": _sleeping(tiny.right, 0.05)}, tiny.inputs, mode="eager", budget_s=0.0, min_rounds=2)[
        ""
    ]
    elapsed_us = 1e6 * (time.perf_counter() - begin)
    assert 50_000 <= timing.us_q1 <= timing.us <= timing.us_q3
    # Two samples of one pass each: their mean is their median, and together they fit into the time that went by.
    assert timing.samples * timing.us * len(tiny.inputs) < elapsed_us


def test_a_failing_candidate_costs_only_itself(tiny: Layer) -> None:
    calls = 0

    def fails_later(given: LayerInputs) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 2 * len(tiny.inputs):
            raise RuntimeError("broke while it was timed")
        return tiny.right(given)

    def fails_at_once(given: LayerInputs) -> Tensor:
        raise MemoryError

    failed: dict[str, str] = {}
    timings = time_interleaved(
        {"later": fails_later, "good": tiny.right, "at once": fails_at_once}, tiny.inputs, mode="eager", budget_s=0.0,
        on_failure=lambda key, error: failed.update({key: type(error).__name__}),
    )  # fmt: skip
    assert list(timings) == ["good"]
    assert failed == {"at once": "MemoryError", "later": "RuntimeError"}
    with pytest.raises(MemoryError):
        time_interleaved({"": fails_at_once}, tiny.inputs, mode="eager")


def test_timing_refuses_what_it_cannot_do(tiny: Layer) -> None:
    with pytest.raises(InvalidInputError, match="CUDA graphs need a CUDA device"):
        time_interleaved({"": tiny.right}, tiny.inputs, mode="graph")
    with pytest.raises(InvalidInputError, match="at least one LayerInputs"):
        time_interleaved({"": tiny.right}, (), mode="eager")


def test_quartiles() -> None:
    timing = Timing.of([1e-6, 2e-6, 3e-6, 4e-6, 5e-6])
    assert (timing.us_q1, timing.us, timing.us_q3) == pytest.approx((2.0, 3.0, 4.0))
    alone = Timing.of([7e-6])
    assert (alone.us_q1, alone.us, alone.us_q3, alone.samples) == pytest.approx((7.0, 7.0, 7.0, 1))


def test_ceilings_of_a_cpu() -> None:
    ceilings = measure_ceilings("cpu")
    assert ceilings.bandwidth > 1e8
    assert ceilings.fp32_flops
    assert ceilings.fp32_flops > 1e8
    assert ceilings.fp8_flops is None
    problem = LAYER.problem(1, "fp8", current_machine("cpu"))
    assert ceilings.roofline_us(problem) is None, "no rate is known for FP8, so no fraction can be printed"
    problem = LAYER.problem(1, "fp32", current_machine("cpu"))
    assert ceilings.roofline_us(problem) == problem.roofline_us(ceilings.bandwidth, ceilings.fp32_flops)


def test_ceilings_are_known_of_measured_devices_alone() -> None:
    machine = Machine.load("h200")
    assert known_ceilings(machine) == H200_CEILINGS
    # A device of the same name with other limits is another device: half an H200 has half its ceilings.
    assert known_ceilings(machine.model_copy(update={"name": "NVIDIA H200 MIG 3g.71gb"})) is None
    for other in ("a100-80gb", "b200", "l40s"):
        assert known_ceilings(Machine.load(other)) is None


def test_the_roofline_explains_recorded_fractions() -> None:
    # One H200: vLLM takes 185 µs for DeepSeek-V3 in BF16 at M=1, .88 of the roofline; 13882 µs in FP8 at 16384, .64.
    problem = MoEProblem(M=1, K=7168, N=2048, E=256, topk=8)
    assert H200_CEILINGS.roofline_us(problem, experts=8) == pytest.approx(0.88 * 185, rel=0.01)
    large = MoEProblem(M=16384, K=7168, N=2048, E=256, topk=8, dtype="fp8")
    assert H200_CEILINGS.roofline_us(large) == pytest.approx(0.64 * 13882, rel=0.01)


@pytest.mark.gpu
def test_graph_replays_are_checked_and_timed() -> None:
    device = "cuda"
    problem = LAYER.problem(TOKENS, "bf16", current_machine(device))
    inputs = make_inputs(problem, ROUTINGS["uniform"], device)

    def copy(given: LayerInputs) -> Tensor:
        return given.hidden_states * given.topk_weights.sum(1, keepdim=True).to(given.hidden_states.dtype)

    truths = tuple(given.hidden_states.float() for given in inputs)
    assert verify(copy, inputs, truths, tolerance=1e-2, mode="graph", deterministic=True).ok
    timings = time_interleaved({"a": copy, "b": copy}, inputs, mode="graph", budget_s=0.05)
    assert timings["a"].us == pytest.approx(timings["b"].us, rel=0.5)
    turns = Turns[str](inputs, mode="graph")
    first, again = (turns.time({"a": copy}, budget_s=0.01, min_rounds=3)["a"] for _ in range(2))
    turns.close()
    assert first.us == pytest.approx(again.us, rel=0.5)

    # Right eagerly, wrong in a replay: it reads what was true at capture.
    frozen = inputs[0].hidden_states

    def remembers(given: LayerInputs) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            return frozen.clone()
        return given.hidden_states.clone()

    verdict = verify(remembers, inputs, truths, tolerance=1e-2, mode="graph")
    assert not verdict.ok
    assert "replay on input 1" in verdict.reason


@pytest.mark.gpu
def test_ceilings_of_a_gpu() -> None:
    ceilings = measure_ceilings("cuda")
    assert ceilings.bandwidth > 1e11
    assert ceilings.bf16_flops
    assert ceilings.bf16_flops > 1e13
