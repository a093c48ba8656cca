# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The end of a decode layer: each token's experts summed with their weights, in an order that never changes."""

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.fast_launch import fast_launch

if TYPE_CHECKING:
    from torch import Tensor

    from moe_dispatch.backends.triton_splitk.config import SplitKConfig
    from moe_dispatch.experts import ExpertWeights

_BLOCK = 256


@fast_launch
@triton.jit(do_not_specialize=["S"])
def _moe_splitk_reduce_kernel(
    # inputs
    partial_ptr, topk_weights_ptr, ids_ptr, bias_ptr,
    # outputs
    out_ptr,
    # shapes
    S, K, E,
    # constants
    TOPK: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    offs_k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_k = offs_k < K
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for j in tl.static_range(TOPK):
        slot = token * TOPK + j
        e = tl.load(ids_ptr + slot)
        # What an invalid slot left in the workspace, and its weight, may be NaN: neither is read.
        mine = (e >= 0) & (e < E)
        mask = mask_k & mine
        row = tl.zeros([BLOCK], dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            row += tl.load(partial_ptr + (split * S + slot).to(tl.int64) * K + offs_k, mask=mask, other=0.0)
        if HAS_BIAS:
            row += tl.load(bias_ptr + e.to(tl.int64) * K + offs_k, mask=mask, other=0.0).to(tl.float32)
        acc += row * tl.load(topk_weights_ptr + slot, mask=mine, other=0.0)
    tl.store(out_ptr + token.to(tl.int64) * K + offs_k, acc.to(out_ptr.dtype.element_ty), mask=mask_k)


def splitk_reduce(
    partial: "Tensor",
    experts: "ExpertWeights",
    topk_weights: "Tensor",
    topk_ids: "Tensor",
    out: "Tensor",
    config: "SplitKConfig",
) -> None:
    """Launch the weighted sum.

    Args:
        partial: fp32 ``[splits, M·topk, K]`` from `splitk_down` in deterministic mode.
        experts: Checked weights; their down_bias is added here.
        topk_weights: fp32 ``[M, topk]``.
        topk_ids: int32 or int64 ``[M, topk]``.
        out: ``[M, K]``, written.
        config: What `splitk_down` ran with.
    """
    M, topk = topk_ids.shape
    launch = {"launch_pdl": True} if config.pdl else {}
    _moe_splitk_reduce_kernel[(M, triton.cdiv(experts.K, _BLOCK))](
        partial, topk_weights, topk_ids, experts.down_bias,
        out,
        M * topk, experts.K, experts.E,
        TOPK=topk, SPLITS=config.splits_down, HAS_BIAS=experts.down_bias is not None, PDL=config.pdl, BLOCK=_BLOCK,
        num_warps=2, **launch,
    )  # fmt: skip
