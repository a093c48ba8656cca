# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Lists the row blocks of all experts."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.pdl import moe_pdl_wait_and_release


@fast_launch
@triton.jit
def _moe_row_blocks_kernel(
    # inputs
    starts_ptr,
    ends_ptr,
    # outputs
    blocks_ptr,
    counts_ptr,
    # shapes
    E,
    # constants
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    TALL_BLOCKS: tl.constexpr,
    GROUP_M: tl.constexpr,
    E_POW2: tl.constexpr,
):
    """One program per expert lists its row blocks; the first also counts all of them and resets the schedulers.

    Blocks have BLOCK_M rows. What is left over of an expert's is spread over up to TALL_BLOCKS of them, its last ones,
    TAIL_M more rows for each; if it is more, it is a block of its own. An expert's blocks are a group, or several about
    as large where they are more than GROUP_M.
    """
    e = tl.program_id(0)
    moe_pdl_wait_and_release(True)
    offs_e = tl.arange(0, E_POW2)
    starts = tl.load(starts_ptr + offs_e, mask=offs_e < E, other=0)
    ends = tl.load(ends_ptr + offs_e, mask=offs_e < E, other=0)
    rows = ends - starts
    taller = tl.cdiv(rows % BLOCK_M, TAIL_M)
    taller = tl.where((taller <= TALL_BLOCKS) & (taller <= rows // BLOCK_M), taller, 0)
    blocks = tl.where(taller > 0, rows // BLOCK_M, tl.cdiv(rows, BLOCK_M))
    if e == 0:
        tl.store(counts_ptr, tl.sum(blocks, 0))
        tl.store(counts_ptr + 1 + tl.arange(0, 2), tl.zeros([2], tl.int32))
    # Experts with a tall block come first: started last, it would be waited for.
    tall = taller > 0
    am_tall = tl.sum((tall & (offs_e == e)).to(tl.int32), 0) > 0
    before = (tall & (not am_tall)) | ((tall == am_tall) & (offs_e < e))
    first = tl.sum(tl.where(before, blocks, 0), 0)
    start = tl.load(starts_ptr + e)
    end = tl.load(ends_ptr + e)
    count = tl.sum(tl.where(offs_e == e, blocks, 0), 0)
    plain = count - tl.sum(tl.where(offs_e == e, taller, 0), 0)
    group_m = tl.cdiv(count, tl.maximum(tl.cdiv(count, GROUP_M), 1))
    for i in range(count):
        row = start + i * BLOCK_M + tl.maximum(i - plain, 0) * TAIL_M
        height = BLOCK_M + tl.where(i >= plain, TAIL_M, 0)
        group = i // group_m * group_m
        block = blocks_ptr + (first + i) * 5
        tl.store(block, e)
        tl.store(block + 1, row)
        tl.store(block + 2, tl.minimum(row + height, end))
        tl.store(block + 3, first + group)
        tl.store(block + 4, tl.minimum(count - group, group_m))
