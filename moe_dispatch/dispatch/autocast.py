"""A call under torch.autocast: in which dtype it is computed, and the casts, which autograd records."""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from moe_dispatch.dispatch.checks import ACTIVATIONS
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.tensor_memory import tensor_fault

_HALVES: Final = (torch.bfloat16, torch.float16)
Cast = Callable[[Tensor, torch.dtype], Tensor]


def autocasts(device: torch.device) -> bool:
    """Whether autocast is enabled for tensors of this device."""
    return torch.is_autocast_enabled(device.type)


def computed_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a layer of such weights is computed now: autocast's where they are FP32, else their own.

    torch's own products turn BF16 into FP16 as well where autocast asks for that. Here weights in half precision stay
    as they are: FP16 has no room for what BF16 holds, and each call would copy all experts.
    """
    if weight.dtype == torch.float32 and autocasts(weight.device):
        dtype = torch.get_autocast_dtype(weight.device.type)
        return dtype if dtype in _HALVES else weight.dtype
    return weight.dtype


def cast_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, or a copy in the dtype, whose gradient arrives in the tensor's own."""
    return tensor.to(dtype)


def shaped_as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What `cast_to` would return, without its values."""
    return torch.empty_like(tensor, dtype=dtype).requires_grad_(tensor.requires_grad)


def cast_layer(experts: ExpertWeights, cast: Cast = cast_to) -> ExpertWeights:
    """The layer as autocast has it computed: itself, or with both weights cast.

    Not by autocast's cache, which torch offers to its own operators alone. A layer's weights are read once in a
    forward, so it would save nothing there, and without a gradient it would hold copies of all layers. Biases are added
    in fp32 whatever their dtype.

    Raises:
        InvalidInputError: The weights are no longer what they were when they were wrapped.
    """
    if experts.dtype != "fp32":
        return experts
    if not torch.compiler.is_compiling():
        experts.check_unchanged()
    dtype = computed_dtype(experts.gate_up)
    if dtype == torch.float32:
        return experts
    return ExpertWeights(
        cast(experts.gate_up, dtype),
        cast(experts.down, dtype),
        gate_up_bias=experts.gate_up_bias,
        down_bias=experts.down_bias,
        activation=experts.activation,
        interleaved=experts.interleaved,
        transposed=experts.transposed,
        routed_experts=experts.routed_experts,
    )


def cast_tokens(hidden_states: Tensor, experts: ExpertWeights) -> Tensor:
    """hidden_states in the dtype of the weights; quantised weights take any, and what no call takes is not cast."""
    if experts.quantized or tensor_fault("", hidden_states) or hidden_states.dtype not in ACTIVATIONS:
        return hidden_states
    return hidden_states.to(experts.gate_up.dtype)
