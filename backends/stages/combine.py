"""The weighted sum of the rows that a token's experts computed."""

import math
from typing import TypeVar

import torch
from torch import Tensor

from moe_dispatch.arrived_rows import PeerRows
from moe_dispatch.backends.triton_common.features import on_triton
from moe_dispatch.backends.triton_common.launch_options import next_power_of_2, pdl_option

Out = TypeVar("Out", bound=Tensor | PeerRows)


def combine(
    y: Tensor,
    row_of_slot: Tensor,
    topk_weights: Tensor | None,
    out: Out,
    *,
    down_bias: Tensor | None = None,
    topk_ids: Tensor | None = None,
    weighted: bool = False,
    pdl: bool = False,
) -> Out:
    """Sum each token's rows with their weights, in fp32 and in the order of its slots.

    Args:
        y: ``[rows, K]``, contiguous, in any float dtype. What an expert puts out may exceed FP16's range (65504) where
            the weighted sum does not, so the rows of FP16 layers come in FP32 or weighted.
        row_of_slot: int32 ``[M·topk]``; a slot whose row is -1 adds nothing, whatever its weight, NaN included.
        topk_weights: fp32 ``[M, topk]``; None to sum the rows as they are, into a tensor.
        out: ``[M, K]``, contiguous, in any float dtype, or memory of several ranks; written.
        down_bias: ``[E, K]``, added to each row before it is weighted; needs `topk_ids`.
        topk_ids: int32 or int64 ``[M, topk]``; read only with a bias.
        weighted: Whether `y` was multiplied by topk_weights before, as far as they are between -1 and 1 (`activate`);
            the bias was not.
        pdl: Launch as a programmatic dependent of the kernel before (sm_90 and newer).

    Returns:
        `out`.
    """
    if topk_weights is None:
        assert not isinstance(out, PeerRows)  # noqa: S101 - see above
        M, topk = out.shape[0], row_of_slot.shape[0] // max(out.shape[0], 1)
    else:
        M, topk = topk_weights.shape
    if not on_triton(y):
        assert not isinstance(out, PeerRows)  # noqa: S101 - only kernels write to peers' memory
        weights = torch.ones(M, topk, dtype=torch.float32, device=y.device) if topk_weights is None else topk_weights
        combined = combine_torch(
            y, row_of_slot, weights, out.dtype, down_bias=down_bias, topk_ids=topk_ids, weighted=weighted
        )
        out.copy_(combined)
        return out
    from moe_dispatch.backends.stages.combine_kernel import _moe_combine_kernel

    K = y.shape[1]
    # At few tokens each is spread over several programs, as the device would otherwise be mostly idle.
    block_k = min(1024 if M > 256 else 256, next_power_of_2(K))
    if M:
        _moe_combine_kernel[(M, math.ceil(K / block_k))](
            # inputs
            y, row_of_slot, topk_weights, down_bias, None if down_bias is None else topk_ids,
            # outputs
            *destination(out),
            # shapes
            K,
            # constants
            TOPK=topk, WEIGHTED=weighted, BLOCK_K=block_k, PDL=pdl, num_warps=4 if block_k > 256 else 1,
            **pdl_option(pdl),
        )  # fmt: skip
    return out


def destination(out: Tensor | PeerRows) -> tuple[Tensor, Tensor | None, int, int]:
    """The arguments of `moe_output_row`: a tensor of the output's dtype, and peers' addresses, offset and rows."""
    return (out.like, out.addresses, out.offset, out.rows) if isinstance(out, PeerRows) else (out, None, 0, 0)


def combine_torch(
    y: Tensor,
    row_of_slot: Tensor,
    topk_weights: Tensor,
    out_dtype: torch.dtype,
    *,
    down_bias: Tensor | None = None,
    topk_ids: Tensor | None = None,
    weighted: bool = False,
) -> Tensor:
    """As `combine`, in torch and into fresh memory."""
    M, topk = topk_weights.shape
    present = (row_of_slot >= 0).view(M, topk, 1)
    rows = y.float()[row_of_slot.clamp(min=0).long()].view(M, topk, -1)
    unweighted = torch.zeros_like(rows) if weighted else rows
    if down_bias is not None and topk_ids is not None:
        unweighted = unweighted + down_bias.float()[topk_ids.long().clamp(0, down_bias.shape[0] - 1)]
    shares = unweighted * topk_weights[:, :, None]
    if weighted:
        shares = shares + rows * topk_weights.abs().clamp(min=1.0)[:, :, None]
    return torch.where(present, shares, 0.0).sum(dim=1).to(out_dtype)


def rows_dtype(out_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a product stores its rows for `combine`; see there."""
    return torch.float32 if out_dtype == torch.float16 else out_dtype
