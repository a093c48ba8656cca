# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `router_logits`."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.pdl import moe_pdl_wait_and_release


@fast_launch
@triton.jit
def _moe_router_logits_kernel(
    # inputs
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    # outputs
    logits_ptr,
    # shapes
    E,
    # constants
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program multiplies one expert's row with one token."""
    expert = tl.program_id(0)
    token = tl.program_id(1)
    offs_k = tl.arange(0, BLOCK_K)
    mask = offs_k < K
    # Not even the weight is read before the wait: the kernel before this one may be the copy that replaces it.
    moe_pdl_wait_and_release(PDL)
    row = tl.load(weight_ptr + expert * K + offs_k, mask=mask, other=0.0).to(tl.float32)
    hidden = tl.load(hidden_ptr + token * K + offs_k, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(row * hidden, 0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + expert).to(tl.float32)
    tl.store(logits_ptr + token * E + expert, total)
