# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `combine`."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.device import moe_output_row, moe_output_token
from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.pdl import moe_pdl_wait_and_release


@fast_launch
@triton.jit
def _moe_combine_kernel(
    # inputs
    y_ptr,
    row_of_slot_ptr,
    weights_ptr,
    bias_ptr,
    ids_ptr,
    # outputs
    out_ptr,
    addresses_ptr,
    offset,
    peer_rows,
    # shapes
    K,
    # constants
    TOPK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    token = moe_output_token(addresses_ptr, peer_rows)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    moe_pdl_wait_and_release(PDL)
    acc = tl.zeros([BLOCK_K], tl.float32)
    for j in tl.static_range(TOPK):
        slot = token * TOPK + j
        row = tl.load(row_of_slot_ptr + slot).to(tl.int64)
        # Without a row neither is read, so that whatever they hold, NaN included, adds nothing.
        weight = 1.0
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + slot, mask=row >= 0, other=0.0)
        # A row is read once, so it makes room first: what the product before left of later rows stays in the L2.
        y = tl.load(y_ptr + row * K + offs_k, mask=mask_k & (row >= 0), other=0.0, eviction_policy="evict_first")
        y = y.to(tl.float32)
        if WEIGHTED:
            acc += tl.maximum(tl.abs(weight), 1.0) * y
            y = tl.zeros([BLOCK_K], tl.float32)  # what is still to be weighted: the bias
        if bias_ptr is not None:
            expert = tl.load(ids_ptr + slot, mask=row >= 0, other=0).to(tl.int64)
            y += tl.load(bias_ptr + expert * K + offs_k, mask=mask_k & (row >= 0), other=0.0).to(tl.float32)
        acc += weight * y
    out = moe_output_row(out_ptr, addresses_ptr, offset, peer_rows, token, K)
    tl.store(out + offs_k, acc.to(out_ptr.dtype.element_ty), mask=mask_k)
