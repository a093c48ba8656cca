"""What the arguments of a call must be, what its result must be, and the words for what they are not."""

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_dispatch.backend import Inputs
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights, tensors_of
from moe_dispatch.tensor_memory import address, tensor_fault

ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)
_IDS = (torch.int32, torch.int64)


def check(
    hidden_states: object, experts: object, topk_weights: object, topk_ids: object, backend: object = None
) -> None:
    """Refuse what no backend could take; nothing is launched.

    Raises:
        InvalidInputError: Its message says what was given and what is allowed.
    """
    if complaint := _complaint(hidden_states, experts, topk_weights, topk_ids):
        raise InvalidInputError(complaint)
    if backend is not None and not isinstance(backend, str):
        raise InvalidInputError(f"backend must be a registered name or None, got {type(backend).__name__}")


def check_layer(experts: object) -> None:
    """Refuse what are no weights.

    Raises:
        InvalidInputError: Its message says what was given.
    """
    if not isinstance(experts, ExpertWeights):
        raise InvalidInputError(_no_layer(experts))


def check_act_dtype(act_dtype: object) -> None:
    """Refuse a dtype that no hidden_states have.

    Raises:
        InvalidInputError: Its message says what was given and what is allowed.
    """
    if not any(act_dtype is each for each in (None, *ACTIVATIONS)):
        raise InvalidInputError(f"act_dtype must be torch.bfloat16, float16, float32 or None, got {act_dtype!r}")


def _no_layer(experts: object) -> str:
    return f"experts must be ExpertWeights(gate_up, down), got {type(experts).__name__}"


def _complaint(hidden_states: object, experts: object, topk_weights: object, topk_ids: object) -> str:
    """The first fault of a call's arguments, in their order; empty if there is none."""
    if not isinstance(experts, ExpertWeights):
        return _no_layer(experts)
    experts.check_unchanged()
    for name, tensor in (("hidden_states", hidden_states), ("topk_weights", topk_weights), ("topk_ids", topk_ids)):
        if fault := _fault(name, tensor, experts):
            return fault
    assert isinstance(hidden_states, Tensor)  # noqa: S101 - checked above, repeated for the type checker
    assert isinstance(topk_weights, Tensor)  # noqa: S101
    assert isinstance(topk_ids, Tensor)  # noqa: S101
    if topk_ids.dtype in ACTIVATIONS and topk_weights.dtype in _IDS:
        return "topk_weights and topk_ids are swapped: the order is hidden_states, experts, topk_weights, topk_ids"
    if topk_ids.dtype not in _IDS:
        return f"topk_ids must be int32 or int64, got {topk_ids.dtype}"
    if topk_weights.dtype not in ACTIVATIONS:
        return f"topk_weights must be float32 (bfloat16 and float16 are converted), got {topk_weights.dtype}"
    if hidden_states.shape[1] != experts.K:
        return f"hidden_states must be [M, K={experts.K}] for {experts}, got {list(hidden_states.shape)}"
    if topk_weights.shape != topk_ids.shape:
        return f"topk_weights {list(topk_weights.shape)} and topk_ids {list(topk_ids.shape)} must both be [M, topk]"
    if topk_ids.shape[0] != hidden_states.shape[0]:
        return (
            f"hidden_states has M={hidden_states.shape[0]} tokens and topk_ids routes {topk_ids.shape[0]}; "
            "both must be [M, …]"
        )
    if topk_ids.shape[1] == 0:
        return "topk_ids must be [M, topk] with topk at least 1, got topk=0"
    if hidden_states.dtype not in (ACTIVATIONS if experts.quantized else (experts.gate_up.dtype,)):
        return (
            f"hidden_states is {hidden_states.dtype} and the experts are {experts.dtype}; they must share a dtype, "
            "except that FP8 and MXFP4 experts take bfloat16, float16 or float32 activations"
        )
    return ""


def _fault(name: str, tensor: object, experts: ExpertWeights) -> str:
    if fault := tensor_fault(name, tensor):
        return fault
    assert isinstance(tensor, Tensor)  # noqa: S101 - what is none has a fault
    if tensor.dim() != 2:
        return f"{name} must be two-dimensional, got shape {list(tensor.shape)}; flatten batch and sequence first"
    if tensor.device != experts.device:
        return f"{name} is on {tensor.device} and the experts are on {experts.device}; move one of them"
    return ""


def check_out(out: object, inputs: Inputs, *, needs_grad: bool) -> None:
    """Refuse memory for the output that no backend could fill.

    Raises:
        InvalidInputError: Its message says what was given and what is allowed.
    """
    if fault := _out_fault(out, inputs[0], needs_grad=needs_grad):
        raise InvalidInputError(fault)
    assert isinstance(out, Tensor)  # noqa: S101 - what is none has a fault
    for name, tensor in _named(inputs):
        if overlap(out, tensor):
            raise InvalidInputError(f"out shares memory with {name}, which is read while out is written")


def _out_fault(out: object, hidden_states: Tensor, *, needs_grad: bool) -> str:
    if fault := tensor_fault("out", out):
        return fault
    assert isinstance(out, Tensor)  # noqa: S101 - what is none has a fault
    if needs_grad or out.requires_grad:
        return "out cannot be given where a gradient is needed; call under torch.no_grad(), or leave it out"
    if _of_inference_mode(out):
        return "out was made in inference mode and cannot be written to outside of it; make it outside, or call inside"
    return layout_fault(out, hidden_states)


def layout_fault(out: Tensor, hidden_states: Tensor) -> str:
    """Why memory for the output does not lie as the result does; empty if it does. A trace may ask, too."""
    if (out.shape, out.dtype, out.device) != (hidden_states.shape, hidden_states.dtype, hidden_states.device):
        allowed, got = (f"{list(tensor.shape)} in {tensor.dtype} on {tensor.device}" for tensor in (hidden_states, out))
        return f"out must be as hidden_states, {allowed}, got {got}"
    if not out.is_contiguous():
        return f"out must be contiguous, got strides {list(out.stride())}; out[:M] of a larger buffer is"
    return ""


def kind_of_out(out: Tensor) -> tuple[object, ...]:
    """All that `check_out` asks of memory for the output but its address."""
    return type(out), out.shape, out.stride(), out.dtype, out.device, out.requires_grad, _of_inference_mode(out)


def _of_inference_mode(out: Tensor) -> bool:
    """Whether a tensor was made in inference mode, which has been left: it cannot be written to, nor recorded."""
    return out.is_inference() and not torch.is_inference_mode_enabled()


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors have elements in the same memory; fake, empty and transformed ones have none."""
    first, second = address(a), address(b)
    if not first or not second:
        return False
    return first < second + b.nbytes and second < first + a.nbytes


def may_overlap(out: Tensor, inputs: Inputs) -> bool:
    """Whether a tensor may have elements in the memory of an input; `check_out` says so for sure, and takes longer."""
    hidden_states, experts, topk_weights, topk_ids = inputs
    if not (first := address(out)):
        return False
    end = first + out.nbytes
    for tensor in (hidden_states, topk_weights, topk_ids, *tensors_of(experts)):
        if tensor is not None and tensor.data_ptr() < end and first < tensor.data_ptr() + tensor.nbytes:
            return True
    return False


def have_memory(inputs: Inputs) -> bool:
    """Whether the tensors have memory that a kernel could read; inside of torch.func's transforms they have none."""
    hidden_states, experts, topk_weights, topk_ids = inputs
    try:
        # Without the generator of `_named`: every new token count asks this.
        for tensor in (hidden_states, topk_weights, topk_ids, *tensors_of(experts)):
            if tensor is not None:
                tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def result_fault(out: object, inputs: Inputs) -> str:
    """What is wrong with the result of `Backend.run`, seen without looking at its values; empty if nothing is."""
    hidden_states = inputs[0]
    if not isinstance(out, Tensor):
        return f"it returned {type(out).__name__} in place of a tensor"
    if (out.dtype, out.shape, out.device) != (hidden_states.dtype, hidden_states.shape, hidden_states.device):
        returned, expected = (
            f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}" for tensor in (out, hidden_states)
        )
        return f"it returned {returned} for hidden_states of {expected}: dtype, shape and device must be the same"
    if not out.is_contiguous():
        return f"it returned a tensor of strides {list(out.stride())}, which is not contiguous"
    if out.requires_grad:
        return "it returned a tensor that requires a gradient, where none is asked for"
    if _of_inference_mode(out):
        return "it returned a tensor that was made in inference mode, which autograd and in-place operations refuse"
    for name, tensor in _named(inputs):
        if shares_memory(out, tensor):
            return f"it returned memory of {name}, and its output must be fresh memory"
    return ""


def _named(inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    hidden_states, experts, topk_weights, topk_ids = inputs
    yield from (("hidden_states", hidden_states), ("topk_weights", topk_weights), ("topk_ids", topk_ids))
    yield from experts.tensors()


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in one allocation."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
