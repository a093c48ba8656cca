# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `mark_nan_tokens`."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.fast_launch import fast_launch


@fast_launch
@triton.jit
def _moe_mark_nan_tokens_kernel(
    # inputs
    x_ptr,
    weights_ptr,
    ids_ptr,
    # outputs
    out_weights_ptr,
    out_ids_ptr,
    # shapes
    K,
    E,
    masked,
    # constants
    INFINITE: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token."""
    token = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK)
    spoilt = tl.zeros([BLOCK], tl.int32)
    for first in range(0, K, BLOCK):
        x = tl.load(x_ptr + token * K + first + offs_k, mask=first + offs_k < K, other=0.0).to(tl.float32)
        spoilt |= (x != x).to(tl.int32)  # noqa: PLR0124 - a NaN is not itself
        if INFINITE:
            spoilt |= (tl.abs(x) == float("inf")).to(tl.int32)
    offs_j = tl.arange(0, TOPK_POW2)
    mask_j = offs_j < TOPK
    # Compared before it is narrowed: an int64 id may be a valid one modulo 2^32.
    ids = tl.load(ids_ptr + token * TOPK + offs_j, mask=mask_j, other=0)
    ours = (ids >= 0) & (ids < E)
    tl.store(out_ids_ptr + token * TOPK + offs_j, tl.where(ours, ids, masked).to(tl.int32), mask=mask_j)
    weights = tl.load(weights_ptr + token * TOPK + offs_j, mask=mask_j, other=0.0)
    weights = tl.where(tl.max(spoilt, 0) > 0, float("nan"), weights)
    tl.store(out_weights_ptr + token * TOPK + offs_j, weights, mask=mask_j)
