# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `splitk_reduce`."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.device import moe_output_row, moe_output_token
from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.pdl import moe_pdl_wait_and_release


@fast_launch
@triton.jit(do_not_specialize=["S"])
def _moe_splitk_reduce_kernel(
    # inputs
    partial_ptr, topk_weights_ptr, ids_ptr, bias_ptr,
    # outputs
    out_ptr, addresses_ptr, offset, peer_rows,
    # shapes
    S, K, E,
    # constants
    TOPK: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = moe_output_token(addresses_ptr, peer_rows)
    offs_k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_k = offs_k < K
    moe_pdl_wait_and_release(PDL)
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for j in tl.static_range(TOPK):
        slot = token * TOPK + j
        e = tl.load(ids_ptr + slot)
        # Nothing was written for an invalid slot, and its weight may be NaN: neither is read.
        mine = (e >= 0) & (e < E)
        mask = mask_k & mine
        row = tl.zeros([BLOCK], dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            row += tl.load(partial_ptr + (split * S + slot).to(tl.int64) * K + offs_k, mask=mask, other=0.0)
        if HAS_BIAS:
            row += tl.load(bias_ptr + e.to(tl.int64) * K + offs_k, mask=mask, other=0.0).to(tl.float32)
        acc += row * tl.load(topk_weights_ptr + slot, mask=mine, other=0.0)
    out = moe_output_row(out_ptr, addresses_ptr, offset, peer_rows, token, K)
    tl.store(out + offs_k, acc.to(out_ptr.dtype.element_ty), mask=mask_k)
