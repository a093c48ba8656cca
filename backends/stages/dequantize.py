"""A layer's MXFP4 weights as BF16 ones, for products of so many rows that the copy costs little beside them."""

import torch
from torch import Tensor

from moe_dispatch.experts import ExpertWeights
from moe_dispatch.numerics import dequantize

_WORDS = 2048  # of four codes, for each program


def dequantized(experts: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    """The layer with weights of this dtype in fresh memory; itself if they are not MXFP4.

    Args:
        experts: Checked weights.
        dtype: BF16, FP16 or FP32.
    """
    if experts.dtype != "mxfp4":
        return experts
    weights = []
    for name in ("gate_up", "down"):
        codes, exponents = getattr(experts, name), getattr(experts, f"{name}_scale")
        values = torch.empty(*codes.shape[:2], 2 * codes.shape[2], dtype=dtype, device=codes.device)
        write = dequantize_mxfp4_into if codes.is_cuda and dtype == torch.bfloat16 else dequantize_mxfp4_into_torch
        write(codes, exponents, values)
        weights.append(values)
    return ExpertWeights(
        *weights, gate_up_bias=experts.gate_up_bias, down_bias=experts.down_bias, activation=experts.activation,
        interleaved=experts.interleaved, routed_experts=experts.routed_experts,
    )  # fmt: skip


def dequantize_mxfp4_into(codes: Tensor, exponents: Tensor, values: Tensor) -> None:
    """Launch it.

    Args:
        codes: uint8 ``[E, R, C/2]``.
        exponents: uint8 ``[E, R, C/32]``.
        values: ``[E, R, C]`` in a dtype that `moe_mxfp4_values` has; written.
    """
    from moe_dispatch.backends.stages.dequantize_kernel import _moe_dequantize_mxfp4_kernel

    words = codes.view(torch.int16)
    _moe_dequantize_mxfp4_kernel[(-(-words.numel() // _WORDS),)](
        words, exponents, values, words.numel(), WORDS=_WORDS, num_warps=4
    )


def dequantize_mxfp4_into_torch(codes: Tensor, exponents: Tensor, values: Tensor) -> None:
    """The same in torch, into any dtype, one expert after another."""
    for e in range(codes.shape[0]):
        values[e] = dequantize(codes[e], exponents[e])
