"""Verification before timing: against fp32, on poisoned memory, run twice, and through a CUDA graph."""

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

# A single wrong row among 16384 hardly changes the norm of the whole output. Rounding spreads evenly over rows, so no
# row may exceed the tolerance for the whole output by more than this factor.
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
    """The fp32 output of each input, from the reference backend multiplying in fp32.

    Args:
        experts: The weights.
        inputs: The inputs, which are computed in one pass over the experts.
        quantize_activations: With FP8 weights, quantise activations as the fast backends do.
        tokens: Compute only this many tokens of each input, spread evenly (`spread_rows`); all of them if None.

    Returns:
        ``[M, K]``, or ``[tokens, K]`` where there are more tokens than that.
    """
    device = experts.device
    backend = BACKENDS.load("reference")(current_machine(device.type, device.index))
    config = backend.config_type.model_validate({"compute_fp32": True, "quantize_activations": quantize_activations})
    parts = [_some_tokens(each, tokens) for each in inputs]
    hidden = torch.cat([part.hidden_states for part in parts]).float()
    weights, ids = (torch.cat([getattr(part, name) for part in parts]) for name in ("topk_weights", "topk_ids"))
    with torch.no_grad():
        truth = backend.run(hidden, experts, weights, ids, config)
    return torch.split(truth, [part.hidden_states.shape[0] for part in parts])


def spread_rows(rows: int, count: int, device: torch.device) -> Tensor:
    """Indices of `count` of `rows` rows at even distances, the first and the last row included."""
    return torch.linspace(0, rows - 1, count, device=device, dtype=torch.float64).round_().long()


def _some_tokens(inputs: LayerInputs, tokens: int | None) -> LayerInputs:
    M = inputs.hidden_states.shape[0]
    if tokens is None or tokens >= M:
        return inputs
    kept = spread_rows(M, tokens, inputs.hidden_states.device)
    return LayerInputs(inputs.hidden_states[kept], inputs.topk_weights[kept], inputs.topk_ids[kept])


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate is correct and may be timed.

    Attributes:
        ok: Whether it passed.
        error: The greatest relative error; infinite where an output was not finite.
        reason: Why it failed; empty if it passed.
        repeatable: Whether the same inputs gave the same bits in every run.
    """

    ok: bool
    error: float
    reason: str = ""
    repeatable: bool = True


class _WrongError(Exception):
    """A failed check; its text is the verdict's reason."""


def verify(
    call: Call,
    inputs: Sequence[LayerInputs],
    references: Sequence[Tensor],
    *,
    tolerance: float,
    mode: Mode = "eager",
    deterministic: bool = False,
) -> Verdict:
    """Check a candidate against fp32, with fresh memory poisoned, and check that repeated runs agree.

    Args:
        call: The candidate; its exceptions propagate.
        inputs: The inputs that it will be timed on.
        references: fp32 outputs of the first inputs, at least one. A reference with fewer rows than the output holds
            the output's `spread_rows`; the other rows only have to be finite.
        tolerance: Greatest relative error of an output; a single row may be `ROW_FACTOR` times worse.
        mode: ``"graph"`` also captures the candidate and replays it on every checked input, copied into static buffers.
        deterministic: Whether the candidate promises the same bits for the same inputs, and is held to it.

    Raises:
        InvalidInputError: There are no references, or more than inputs.
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
    for index, (each, reference) in enumerate(zip(inputs, references, strict=False)):
        kept = each.clone()
        with _fresh_memory_is_nan():
            out = call(each)
        check.against(f"input {index}", out, reference)
        if out.dtype != each.hidden_states.dtype:
            raise _WrongError(f"the output is {out.dtype}, and hidden_states are {each.hidden_states.dtype}")
        if not _equal(kept, each):
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
            for index, (each, reference) in enumerate(zip(inputs, references, strict=False)):
                static.copy_(each)
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
