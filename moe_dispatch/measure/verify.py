"""Right before fast: compare with the truth, on poisoned memory, twice, and through a CUDA graph."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import current_machine
from moe_dispatch.measure.inputs import Call, LayerInputs, synchronize
from moe_dispatch.problem import Mode
from moe_dispatch.registry import BACKENDS

# One wrong row among 16384 hides in the norm of the whole output; rounding spreads evenly, so a row may only be
# somewhat worse than all of them.
ROW_FACTOR: Final = 5.0


def relative_error(out: Tensor, reference: Tensor) -> float:
    """‖out − reference‖ / ‖reference‖; infinite for another shape and wherever either holds NaN or infinity."""
    if out.shape != reference.shape:
        return float("inf")
    if not out.numel():
        return 0.0
    difference = torch.linalg.vector_norm(out.float() - reference.float(), dtype=torch.float64)
    return _ratio(difference.item(), torch.linalg.vector_norm(reference.float(), dtype=torch.float64).item())


def worst_row_error(out: Tensor, reference: Tensor) -> float:
    """The greatest error of one token's row ``[K]``, over the rows' mean norm, so that a row of zeros may be zero."""
    if out.shape != reference.shape:
        return float("inf")
    if not out.numel():
        return 0.0
    rows = torch.linalg.vector_norm(out.float() - reference.float(), dim=-1)
    scale = torch.linalg.vector_norm(reference.float(), dim=-1).mean()
    return _ratio(rows.max().item(), scale.item())


def _ratio(difference: float, scale: float) -> float:
    if not (difference < float("inf") and scale < float("inf")):  # NaN included
        return float("inf")
    if scale == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / scale


def reference_outputs(
    experts: ExpertWeights,
    inputs: Sequence[LayerInputs],
    *,
    quantize_activations: bool = True,
    tokens: int | None = None,
) -> tuple[Tensor, ...]:
    """The truth, fp32 ``[M, K]`` for each input, from the reference backend multiplying in fp32.

    Args:
        experts: The weights.
        inputs: What to compute, in one pass over the experts.
        quantize_activations: With block FP8 weights, quantise activations as the fast backends do.
        tokens: Compute so many tokens of each input, spread evenly (`spread_rows`); all if None.

    Returns:
        ``[M, K]``, or ``[tokens, K]`` where there are more tokens than that.
    """
    device = experts.device
    backend = BACKENDS.load("reference")(current_machine(device.type, device.index))
    config = backend.config_type.model_validate({"compute_fp32": True, "quantize_activations": quantize_activations})
    parts = [_some_tokens(given, tokens) for given in inputs]
    hidden = torch.cat([part.hidden_states for part in parts]).float()
    weights, ids = (torch.cat([getattr(part, name) for part in parts]) for name in ("topk_weights", "topk_ids"))
    with torch.no_grad():
        truth = backend.run(hidden, experts, weights, ids, config)
    return torch.split(truth, [part.hidden_states.shape[0] for part in parts])


def spread_rows(rows: int, count: int, device: torch.device) -> Tensor:
    """`count` of `rows` indices at even distances, the first and the last among them."""
    return torch.linspace(0, rows - 1, count, device=device, dtype=torch.float64).round_().long()


def _some_tokens(given: LayerInputs, tokens: int | None) -> LayerInputs:
    M = given.hidden_states.shape[0]
    if tokens is None or tokens >= M:
        return given
    kept = spread_rows(M, tokens, given.hidden_states.device)
    return LayerInputs(given.hidden_states[kept], given.topk_weights[kept], given.topk_ids[kept])


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate may be timed.

    Attributes:
        ok: Whether it may.
        error: The greatest relative error seen; infinite where something was not finite.
        reason: Why not; empty if it may.
        repeatable: Whether the same inputs gave the same bits again.
    """

    ok: bool
    error: float
    reason: str = ""
    repeatable: bool = True


class _WrongError(Exception):
    """What a check found."""


def verify(
    call: Call,
    inputs: Sequence[LayerInputs],
    references: Sequence[Tensor],
    *,
    tolerance: float,
    mode: Mode = "eager",
    deterministic: bool = False,
) -> Verdict:
    """Check a candidate against the truth, on memory that was poisoned first, and again for stability.

    Args:
        call: The candidate. What it raises propagates.
        inputs: As for timing.
        references: fp32 truths of the first of them, at least one; of fewer rows than the output they hold its
            `spread_rows`, and the other rows must be finite.
        tolerance: Greatest relative error; one row may be 5 times worse.
        mode: ``"graph"`` also captures it and replays it on every checked input, copied into static buffers.
        deterministic: Whether it promised the same bits for the same inputs, and is held to it.
    """
    if not references or len(references) > len(inputs):
        raise InvalidInputError(f"verify needs 1 to {len(inputs)} references (one per input), got {len(references)}")
    check = _Check(tolerance)
    try:
        with torch.no_grad():
            eager = _check_eager(call, inputs, references, check)
            with _fresh_memory_is_nan():
                again = call(inputs[0])
            check.stable("a second run", again, eager[0], deterministic=deterministic)
            if mode == "graph":
                _check_replays(call, inputs, references, eager, check, deterministic=deterministic)
    except _WrongError as wrong:
        return Verdict(ok=False, error=check.error, reason=str(wrong), repeatable=check.repeatable)
    return Verdict(ok=True, error=check.error, repeatable=check.repeatable)


class _Check:
    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.error = 0.0
        self.repeatable = True

    def against(self, what: str, out: Tensor, reference: Tensor) -> None:
        if out.dim() == reference.dim() and out.shape[0] > reference.shape[0] > 1:
            if not out.isfinite().all():
                self.error = float("inf")
                raise _WrongError(f"{what} has elements that are not finite")
            out = out[spread_rows(out.shape[0], reference.shape[0], out.device)]
        if out.shape != reference.shape:
            self.error = float("inf")
            raise _WrongError(f"{what} has shape {list(out.shape)}, not {list(reference.shape)}")
        error = relative_error(out, reference)
        self.error = max(self.error, error)
        if not error <= self.tolerance:
            raise _WrongError(f"{what} has relative error {error:.3g} against fp32, at most {self.tolerance:g} allowed")
        row = worst_row_error(out, reference)
        if not row <= ROW_FACTOR * self.tolerance:
            self.error = max(self.error, row)
            raise _WrongError(
                f"{what} has a row with relative error {row:.3g}, at most {ROW_FACTOR * self.tolerance:g} allowed"
            )

    def stable(self, what: str, again: Tensor, first: Tensor, *, deterministic: bool) -> None:
        if torch.equal(again, first):
            return
        self.repeatable = False
        drift = relative_error(again, first)
        if deterministic:
            raise _WrongError(f"{what} differs from the first by {drift:.3g}, and it promised the same bits")
        if not drift <= self.tolerance / 2:
            self.error = max(self.error, drift)
            raise _WrongError(f"{what} differs from the first by {drift:.3g}: more than rounding, so probably a race")


def _check_eager(
    call: Call, inputs: Sequence[LayerInputs], references: Sequence[Tensor], check: _Check
) -> list[Tensor]:
    outs = []
    for index, (given, reference) in enumerate(zip(inputs, references, strict=False)):
        kept = given.clone()
        with _fresh_memory_is_nan():
            out = call(given)
        check.against(f"input {index}", out, reference)
        if out.dtype != given.hidden_states.dtype:
            raise _WrongError(f"the output is {out.dtype}, and hidden_states are {given.hidden_states.dtype}")
        if not _equal(kept, given):
            raise _WrongError("it changes its inputs")
        outs.append(out)
    return outs


def _check_replays(
    call: Call,
    inputs: Sequence[LayerInputs],
    references: Sequence[Tensor],
    eager: Sequence[Tensor],
    check: _Check,
    *,
    deterministic: bool,
) -> None:
    static = inputs[-1].clone()
    call(static)
    synchronize(static.hidden_states.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(static.hidden_states.device):
        with torch.cuda.graph(graph):
            out = call(static)
        try:
            for index, (given, reference) in enumerate(zip(inputs, references, strict=False)):
                static.copy_(given)
                out.fill_(torch.nan)
                graph.replay()
                check.against(f"the graph's replay on input {index}", out, reference)
                kept = out.clone()
                out.fill_(torch.nan)
                graph.replay()
                check.stable(f"a second replay on input {index}", out, kept, deterministic=deterministic)
                check.stable(f"eager on input {index}", eager[index], kept, deterministic=deterministic)
        finally:
            synchronize(static.hidden_states.device)
            graph.reset()


def _equal(one: LayerInputs, other: LayerInputs) -> bool:
    return (
        torch.equal(one.hidden_states, other.hidden_states)
        and torch.equal(one.topk_weights, other.topk_weights)
        and torch.equal(one.topk_ids, other.topk_ids)
    )


@contextlib.contextmanager
def _fresh_memory_is_nan() -> Iterator[None]:
    """Have torch fill every new tensor with NaN (the greatest integer), so that reading unwritten memory shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic", category=UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
            deterministic.fill_uninitialized_memory = fill
