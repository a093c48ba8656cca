# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `order_columns`."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.pdl import moe_pdl_wait_and_release


@fast_launch
@triton.jit
def _moe_order_columns_kernel(
    # inputs
    x_ptr,
    row_of_slot_ptr,
    # outputs
    out_ptr,
    # shapes
    K, WIDTH,
    # constants
    BLOCK: tl.constexpr, BY_THREADS: tl.constexpr, TOPK: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program reads some columns of a row once, and writes them to one or, with `row_of_slot_ptr`, TOPK rows."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    moe_pdl_wait_and_release(PDL)
    x = tl.load(x_ptr + row * K + offs, mask=offs < K, other=0.0)
    if BY_THREADS:
        # Bits of a column: 6 and 5, 4, 3, 2, 1 and 0.
        x = tl.permute(tl.reshape(x, [COLUMNS // 128, 4, 2, 2, 2, 4]), (0, 2, 5, 3, 1, 4))
    else:
        x = tl.permute(tl.reshape(x, [COLUMNS // BLOCK, BLOCK // 4, 4]), (0, 2, 1))
    x = tl.reshape(x, [COLUMNS])
    if row_of_slot_ptr is None:
        tl.store(out_ptr + row * WIDTH + offs, x, mask=offs < WIDTH)
    else:
        for j in tl.static_range(TOPK):
            out_row = tl.load(row_of_slot_ptr + row * TOPK + j).to(tl.int64)
            tl.store(out_ptr + out_row * WIDTH + offs, x, mask=(offs < WIDTH) & (out_row >= 0))
