"""The activation between two products of which the first left fp32 partial sums.

It leaves them where a CTA does not hold everything that bias, activation or quantisation need: where several CTAs share
a tile along K, or where a CTA's columns are not whole groups of the quantisation.
"""

import math
from typing import Final

import torch
from torch import Tensor

from moe_dispatch.backends.triton_common.features import on_triton
from moe_dispatch.backends.triton_common.launch_options import next_power_of_2, pdl_option
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.numerics import FP8, activate_torch, quantize_rows_torch
from moe_dispatch.problem import QUANT_BLOCK

_BLOCK: Final = 512


def activate_partial(
    partial: Tensor, experts: ExpertWeights, topk_ids: Tensor, dtype: torch.dtype | None = None, *, pdl: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Add the splits in fixed order, then bias; activate; for e4m3 quantise.

    Args:
        partial: fp32 ``[splits, 2, M·topk, N]`` (``1`` for ``2`` without a gate), contiguous; all of gate before all of
            up whatever the weights' row order. What it holds for a slot with an invalid id is not read.
        experts: Checked weights, of which gate_up_bias and activation are used.
        topk_ids: int32 or int64 ``[M, topk]``.
        dtype: Of the result; that of `experts.down` if None.
        pdl: Launch as a programmatic dependent of the kernel before (sm_90).

    Returns:
        ``[M·topk, N]``, and for e4m3 its fp32 multipliers (else None): ``[M·topk, ⌈N/128⌉]``, with weights that have a
        scale per row ``[M·topk, 1]``. A slot with an invalid id holds anything.
    """
    dtype = dtype or experts.down.dtype
    if not on_triton(partial):
        return activate_partial_torch(partial, experts, topk_ids, dtype)
    from moe_dispatch.backends.stages.activate_partial_kernel import _moe_activate_partial_kernel

    S, N = topk_ids.numel(), experts.N
    inner = partial.new_empty(S, N, dtype=dtype)
    whole = max(QUANT_BLOCK, next_power_of_2(N))
    quantizes = dtype == FP8
    width = whole if quantizes and experts.dtype == "fp8_channel" else QUANT_BLOCK
    scale = partial.new_empty(S, math.ceil(N / width)) if quantizes else None
    block = max(width, min(_BLOCK, whole))  # a program has all columns that share a multiplier
    _moe_activate_partial_kernel[(S, math.ceil(N / block))](
        # inputs
        partial, experts.gate_up_bias, topk_ids,
        # outputs
        inner, scale,
        # shapes
        S, N, experts.E,
        # constants
        SPLITS=partial.shape[0], GATED=experts.gated, INTERLEAVED=experts.interleaved,
        ACTIVATION=experts.activation, PDL=pdl, BLOCK=block, WIDTH=width, num_warps=min(16, block // 128),
        **pdl_option(pdl),
    )  # fmt: skip
    return inner, scale


def activate_partial_torch(
    partial: Tensor, experts: ExpertWeights, topk_ids: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """The same in torch; the reference of `activate_partial`."""
    dtype = dtype or experts.down.dtype
    wide = partial.sum(0).permute(1, 0, 2).flatten(1)  # [S, 2N], gate first
    if experts.gate_up_bias is not None:
        bias = experts.gate_up_bias.float()
        if experts.interleaved:
            bias = bias.view(experts.E, experts.N, 2).transpose(1, 2).reshape(experts.E, -1)
        wide = wide + bias[topk_ids.flatten().long().clamp(0, experts.E - 1)]
    inner = activate_torch(wide, experts.activation)
    if dtype == FP8:
        return quantize_rows_torch(inner, per_token=experts.dtype == "fp8_channel")
    return inner.to(dtype), None
