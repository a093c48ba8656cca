"""What a call's arguments must be, and the words for what they are not."""

import torch
from torch import Tensor

from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights

_ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)
_IDS = (torch.int32, torch.int64)


def check(hidden_states: Tensor, experts: ExpertWeights, topk_weights: Tensor, topk_ids: Tensor) -> None:
    """Refuse what no backend could take.

    Raises:
        InvalidInputError: Its message says what was given and what is allowed.
    """
    if (
        isinstance(experts, ExpertWeights)
        and isinstance(hidden_states, Tensor)
        and isinstance(topk_weights, Tensor)
        and isinstance(topk_ids, Tensor)
        and hidden_states.dim() == topk_ids.dim() == 2
        and hidden_states.shape[1] == experts.K
        and topk_weights.shape == topk_ids.shape
        and topk_ids.shape[0] == hidden_states.shape[0]
        and topk_ids.shape[1] > 0
        and hidden_states.dtype in (_ACTIVATIONS if experts.dtype == "fp8" else (experts.gate_up.dtype,))
        and topk_weights.dtype in _ACTIVATIONS
        and topk_ids.dtype in _IDS
        and hidden_states.device == topk_weights.device == topk_ids.device == experts.device
    ):
        return
    raise InvalidInputError(_complaint(hidden_states, experts, topk_weights, topk_ids))


def _complaint(hidden_states: object, experts: object, topk_weights: object, topk_ids: object) -> str:
    """What is wrong with the arguments of a call, in their order; the first fault found."""
    if not isinstance(experts, ExpertWeights):
        return f"experts must be ExpertWeights(gate_up, down), got {type(experts).__name__}"
    tensors = {"hidden_states": hidden_states, "topk_weights": topk_weights, "topk_ids": topk_ids}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            return f"{name} must be a torch.Tensor, got {type(tensor).__name__}"
        if tensor.dim() != 2:
            return f"{name} must be two-dimensional, got shape {list(tensor.shape)}; flatten batch and sequence first"
        if tensor.device != experts.device:
            return f"{name} is on {tensor.device} and the experts are on {experts.device}; move one of them"
    assert isinstance(hidden_states, Tensor)  # noqa: S101 - checked above, repeated for the type checker
    assert isinstance(topk_weights, Tensor)  # noqa: S101
    assert isinstance(topk_ids, Tensor)  # noqa: S101
    if topk_ids.dtype in _ACTIVATIONS and topk_weights.dtype in _IDS:
        return "topk_weights and topk_ids are swapped: the order is hidden_states, experts, topk_weights, topk_ids"
    if topk_ids.dtype not in _IDS:
        return f"topk_ids must be int32 or int64, got {topk_ids.dtype}"
    if topk_weights.dtype not in _ACTIVATIONS:
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
    return (
        f"hidden_states is {hidden_states.dtype} and the experts are {experts.dtype}; they must share a dtype, "
        "except that block FP8 experts take bfloat16, float16 or float32 activations"
    )
