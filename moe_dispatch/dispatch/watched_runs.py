"""The first run of a backend on a kind of call: watched, awaited and looked at before it is trusted."""

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from moe_dispatch.arrived_rows import TravellingRows
from moe_dispatch.dispatch.checks import result_fault
from moe_dispatch.dispatch.first_calls import FIRST_CALLS
from moe_dispatch.dispatch.plan import Plan
from moe_dispatch.dispatch.quarantine import Quarantine
from moe_dispatch.dispatch.torch_state import KeptState
from moe_dispatch.guard import foreign_errors
from moe_dispatch.numerics import QuantizedRows
from moe_dispatch.registry import LAST_RESORT

# Copies of more than this are not made: memory may be short, and a first run at as many tokens takes long.
MAX_COPIED_BYTES: Final = 64 << 20


class ContractError(Exception):
    """A backend did something else than `Backend.run` promises."""


def first_run(plan: Plan, arguments: tuple[Any, ...], quarantine: Quarantine) -> tuple[Any, bool]:
    """Run a plan for the first time, so that whatever goes wrong is this backend's doing.

    What it writes to its inputs is undone: another backend may compute the call after it. So is what it changes of
    this thread's settings of torch, which are the program's.

    Args:
        plan: Its `run` is called.
        arguments: Those of `Backend.run`, or of `Backend.run_into`, whose rows may have come from several ranks.
        quarantine: Remembers the backend if the process dies in the run.

    Returns:
        The result, and whether the run has ended: while a CUDA graph is captured nothing can be awaited.

    Raises:
        ContractError: The result is not what `Backend.run` promises, an input was written to, or a setting changed.
    """
    name = plan.choice.backend
    if name == LAST_RESORT:
        return plan.run(*arguments), True
    device = arguments[1].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        result = plan.run(*arguments)
        check_result(result, arguments)
        return result, False
    inputs, state = _KeptInputs(arguments), KeptState(device)
    try:
        with FIRST_CALLS.running(name), quarantine.first_run(name, plan.problem):
            result = plan.run(*arguments)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    except foreign_errors():
        with contextlib.suppress(RuntimeError):  # as where the device is lost
            state.restore()
            inputs.restore()
        raise
    changed, written = state.restore(), inputs.restore()
    check_result(result, arguments)
    if written:
        raise ContractError(f"it wrote to {written}")
    if changed:
        raise ContractError(f"it changed {changed}")
    return result, True


def check_result(result: object, arguments: tuple[Any, ...]) -> None:
    """Refuse a result that is not what `Backend.run` promises for the arguments, or `Backend.run_into` for its own.

    Raises:
        ContractError: It says what the result is.
    """
    hidden_states, experts, topk_weights, topk_ids, _config, *out = arguments
    if not out:
        fault = result_fault(result, (hidden_states, experts, topk_weights, topk_ids))
    else:  # which has been checked, and may lie in one allocation with the inputs
        fault = "" if result is out[0] else "it returned another tensor than the one it was to write into"
    if fault:
        raise ContractError(fault)


class _KeptInputs:
    """Copies of a call's rows, topk_weights and topk_ids, to compare with and to restore. Weights are not copied.

    All are contiguous.
    """

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        rows, _, topk_weights, topk_ids, *_ = arguments
        self._tensors = [*tensors_of_rows(rows), ("topk_weights", topk_weights), ("topk_ids", topk_ids)]
        self._copies: list[Tensor] = []
        if sum(tensor.nbytes for _, tensor in self._tensors) <= MAX_COPIED_BYTES:
            self._copies = [tensor.detach().clone() for _, tensor in self._tensors]
        self._layouts = [(tensor.shape, tensor.stride()) for _, tensor in self._tensors]

    def restore(self) -> str:
        """Undo what was written; waits for the device.

        Returns:
            The names of the tensors that had been written to; empty if none had been.
        """
        written = []
        with torch.inference_mode():  # in which tensors of either kind may be written to
            for (name, tensor), copy, layout in zip(self._tensors, self._copies, self._layouts, strict=False):
                if (tensor.shape, tensor.stride()) != layout:
                    tensor.data = copy
                elif not same_bits(tensor, copy):
                    tensor.copy_(copy)
                else:
                    continue
                written.append(name)
        return " and ".join(written)


def tensors_of_rows(rows: Tensor | QuantizedRows | TravellingRows) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a call's rows are made of, by name."""
    if isinstance(rows, TravellingRows):
        yield "this rank's hidden_states", rows.own
        rows = rows.wait()
    if isinstance(rows, QuantizedRows):
        yield "the codes of hidden_states", rows.codes
        yield "the scales of hidden_states", rows.scale
    else:
        yield "hidden_states", rows


def same_bits(tensor: Tensor, copy: Tensor) -> bool:
    """Whether two contiguous tensors of one shape are equal bit for bit, NaN included."""
    # A dimension of one may have any stride, and another dtype's view needs a last one of 1.
    first, second = (each.as_strided((each.numel(),), (1,)).view(torch.uint8) for each in (tensor, copy))
    return torch.equal(first, second)
