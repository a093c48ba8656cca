"""What `moe-dispatch demo` does: calibrate, generate with and without dispatch, compare, and time one layer."""

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch

from moe_dispatch.commands.demo_model import build_model, compare_logits, first_experts, generate
from moe_dispatch.commands.layer import dispatched
from moe_dispatch.commands.progress import Show, progress
from moe_dispatch.dispatch.dispatcher import Dispatcher
from moe_dispatch.dispatch.process import get_dispatcher, reset_dispatchers, stats
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine, present_device
from moe_dispatch.measure import make_inputs, relative_error, time_interleaved, with_truths
from moe_dispatch.problem import DType
from moe_dispatch.workloads import ROUTINGS, Workload, workload

NAIVE: Final = "reference"
PROMPT_TOKENS: Final = 64
DISTINCT_INPUTS: Final = 4
TIMED_S: Final = 0.4  # for each figure
CALIBRATION_S: Final = {"cpu": 60.0, "cuda": 60.0}  # at most; an idle CPU needs 10
# Logits of two right implementations differ by rounding alone.
LOGITS_TOLERANCE: Final = {"fp32": 1e-4, "bf16": 3e-2}
SMALL: Final = Workload("qwen3-moe, small", E=32, topk=4, K=256, N=128)


@dataclass(frozen=True)
class DemoSize:
    """The model that the demo runs.

    Attributes:
        dtype: Dtype of the model: fp32 on a CPU, since not every CPU multiplies BF16 fast.
    """

    layer: Workload
    layers: int
    dtype: DType


@dataclass(frozen=True)
class LayerRow:
    """One token count of the demo's layer.

    Attributes:
        why: The policy's reason.
        error: ‖out − fp32‖ / ‖fp32‖.
        us: Median time of `moe_forward` in µs.
        naive_us: Median time of the naive loop in µs.
    """

    M: int
    backend: str
    why: str
    error: float
    us: float
    naive_us: float


@dataclass(frozen=True)
class DemoReport:
    """The demo's result.

    Attributes:
        same: How many of the generated tokens equal those of the model's own experts.
        logits_error: ‖dispatched − own‖ / ‖own‖ over the model's own sequence.
        logits_gap: Where the generated tokens first differ, how much the model's own logits prefer its own token, as a
            share of their root mean square; 0 where none differ.
        bound: Greatest `logits_error` and `logits_gap` that rounding explains.
        rows: One decode and one prefill step of a single layer.
        missing: Backends that cannot run the layer, with their reasons.
        ran: How many layer calls each backend ran.
    """

    machine: Machine
    size: DemoSize
    tokens: int
    same: int
    logits_error: float
    logits_gap: float
    bound: float
    rows: tuple[LayerRow, ...]
    missing: dict[str, tuple[str, ...]]
    ran: dict[str, int]

    @property
    def right(self) -> bool:
        """Whether the tokens agree; where the model's own logits nearly tie, rounding may decide otherwise."""
        return self.logits_error <= self.bound and self.logits_gap <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        data = asdict(self) | {"machine": self.machine.model_dump(mode="json"), "right": self.right}
        return {"model": data.pop("size"), **data}


def run(device: str | None, model: str, tokens: int, *, keep: bool) -> DemoReport:
    """Run the demo.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``; the current GPU, else the CPU, if None.
        model: Workload whose MoE layer the model gets; empty for the device's default.
        tokens: Number of tokens to generate.
        keep: Whether the calibration goes to the machine's own cache.

    Raises:
        InvalidInputError: There is no such device or model, or the model is no Qwen3-MoE.
    """
    place = present_device(device)
    size = _size(place, model)
    with progress() as show, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers")
        with nullcontext() if keep else _temporary_cache():
            return _run(place, size, tokens, show)


def _run(place: torch.device, size: DemoSize, tokens: int, show: Show) -> DemoReport:
    steps = 2 * tokens + 5
    done = 0

    def step(what: str) -> None:
        nonlocal done
        show(what, done, steps)
        done += 1

    step("calibrate")
    _calibrate(size, place)
    dispatcher = get_dispatcher(place)
    step("build the model")
    built = build_model(size.layer, size.layers, size.dtype, place)
    prompt = torch.randint(1, built.config.vocab_size, (1, PROMPT_TOKENS), device=place)
    ours = generate(built, prompt, tokens, "moe_dispatch", lambda: step("generate, dispatched"))
    theirs = generate(built, prompt, tokens, "eager", lambda: step("generate, model's own"))
    step("compare logits")
    logits_error, logits_gap = compare_logits(built, ours, theirs)
    experts = first_experts(built)
    rows = []
    for M in (1, PROMPT_TOKENS):
        step(f"measure M={M}")
        rows.append(_measure(experts, size.layer, M, dispatcher))
    show("done", steps, steps)
    return DemoReport(
        machine=dispatcher.machine,
        size=size,
        tokens=tokens,
        same=int((ours[:, PROMPT_TOKENS:] == theirs[:, PROMPT_TOKENS:]).sum()),
        logits_error=logits_error,
        logits_gap=logits_gap,
        bound=LOGITS_TOLERANCE[size.dtype],
        rows=tuple(rows),
        missing=_missing(dispatcher, size),
        ran={name: counts["ran"] for name, counts in stats().items() if counts["ran"]},
    )


def _size(place: torch.device, model: str) -> DemoSize:
    on_gpu = place.type == "cuda"
    layer = workload(model or "qwen3-30b-a3b") if model or on_gpu else SMALL
    if layer.activation != "silu" or layer.bias:
        raise InvalidInputError(
            f"the demo's model is a Qwen3-MoE, whose gate is silu without biases, and {layer.name} has "
            f"{layer.activation}{' and biases' if layer.bias else ''}; choose another --model"
        )
    return DemoSize(layer, layers=4, dtype="bf16" if on_gpu else "fp32")


@contextmanager
def _temporary_cache() -> Iterator[None]:
    """A cache directory for the demo alone: a few quick measurements of a toy layer are no calibration to keep."""
    before = os.environ.get("MOE_DISPATCH_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="moe_dispatch-demo-") as directory:
        os.environ["MOE_DISPATCH_CACHE_DIR"] = directory
        reset_dispatchers()
        try:
            yield
        finally:
            reset_dispatchers()
            if before is None:
                del os.environ["MOE_DISPATCH_CACHE_DIR"]
            else:
                os.environ["MOE_DISPATCH_CACHE_DIR"] = before


def _calibrate(size: DemoSize, place: torch.device) -> None:
    from moe_dispatch.policies.calibration.calibrate import calibrate

    budget = CALIBRATION_S[place.type]
    calibrate([size.layer], [size.dtype], tokens=[1, PROMPT_TOKENS], budget_s=budget, device=place)


def _measure(experts: ExpertWeights, layer: Workload, M: int, dispatcher: Dispatcher) -> LayerRow:
    problem = layer.problem(M, experts.dtype, dispatcher.machine)
    chosen = dispatcher.planner.explain(problem).chosen
    assert chosen is not None  # noqa: S101 - the model has just run
    inputs = make_inputs(problem, ROUTINGS["uniform"], experts.device, count=DISTINCT_INPUTS)
    quantizes = dispatcher.planner.backend(chosen.choice.backend).quantizes_activations(problem)
    sample = with_truths(experts, inputs, quantize_activations=quantizes)
    call = dispatched(experts)
    with torch.no_grad():
        outputs = [call(inputs) for inputs in sample.inputs]
    error = max(relative_error(out, truth) for out, truth in zip(outputs, sample.truths, strict=True))
    calls = {NAIVE: dispatched(experts, NAIVE)}
    if chosen.choice.backend != NAIVE:
        calls["chosen"] = call
    times = time_interleaved(calls, sample.inputs, mode="eager", budget_s=TIMED_S)
    us = times["chosen" if "chosen" in times else NAIVE].us
    return LayerRow(M, chosen.choice.backend, chosen.choice.reason, error, us, times[NAIVE].us)


def _missing(dispatcher: Dispatcher, size: DemoSize) -> dict[str, tuple[str, ...]]:
    explanation = dispatcher.planner.explain(size.layer.problem(PROMPT_TOKENS, size.dtype, dispatcher.machine))
    against = {candidate.choice.backend: candidate.against for candidate in explanation.candidates}
    return {name: reasons for name, reasons in {**against, **explanation.unranked}.items() if reasons}
