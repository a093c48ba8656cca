# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `order_columns`."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.mxfp4 import moe_every_fourth
from moe_dispatch.backends.triton_common.pdl import moe_pdl_wait_and_release


@fast_launch
@triton.jit
def _moe_order_columns_kernel(
    # inputs
    x_ptr,
    # outputs
    ordered_ptr,
    # shapes
    K, WIDTH,
    # constants
    BLOCK: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs_w = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    mask = offs_w < K // 4
    moe_pdl_wait_and_release(PDL)
    words = tl.load((x_ptr + row * K).to(tl.pointer_type(tl.int64)) + offs_w, mask=mask, other=0)
    first, second, third, fourth = moe_every_fourth(words, x_ptr.dtype.element_ty)
    quarter: tl.constexpr = BLOCK // 4
    out = ordered_ptr + row * WIDTH + offs_w // quarter * BLOCK + offs_w % quarter
    tl.store(out, first, mask=mask)
    tl.store(out + quarter, second, mask=mask)
    tl.store(out + 2 * quarter, third, mask=mask)
    tl.store(out + 3 * quarter, fourth, mask=mask)
