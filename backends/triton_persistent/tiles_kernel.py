# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Which tiles a grouped product has, and in which order they are computed."""

import triton
import triton.language as tl


@triton.jit
def count_blocks(starts_ptr, ends_ptr, E, E_POW2: tl.constexpr, BLOCK_M: tl.constexpr):
    """Each expert's first row, the end of its rows, its number of row blocks, and their running count, ``[E_POW2]``."""
    offs_e = tl.arange(0, E_POW2)
    starts = tl.load(starts_ptr + offs_e, mask=offs_e < E, other=0)
    ends = tl.load(ends_ptr + offs_e, mask=offs_e < E, other=0)
    blocks = (ends - starts + BLOCK_M - 1) // BLOCK_M
    return starts, ends, blocks, tl.cumsum(blocks, 0)


@triton.jit
def _locate(block_m, starts, ends, blocks, blocks_up_to, BLOCK_M: tl.constexpr):
    """The expert that a row block belongs to, the block's first row, and the end of the expert's rows.

    From registers: loads here would be waited for at the beginning of every tile.
    """
    before = blocks_up_to - blocks
    here = (before <= block_m) & (block_m < blocks_up_to)
    e = tl.where(here, tl.arange(0, starts.shape[0]), 0)
    row = tl.where(here, starts + (block_m - before) * BLOCK_M, 0)
    return tl.reduce((e, row, tl.where(here, ends, 0)), 0, _sum_of_three)


@triton.jit
def _sum_of_three(a0, b0, c0, a1, b1, c1):
    return a0 + a1, b0 + b1, c0 + c1


@triton.jit
def _order(tile, m_blocks, n_blocks, ORDER: tl.constexpr, GROUP_M: tl.constexpr):
    """The row block and column block of a tile; tiles that run at the same time share inputs in the L2 cache."""
    if ORDER == "row_major":
        block_m = tile // n_blocks
        block_n = tile % n_blocks
    else:
        tl.static_assert(ORDER == "grouped", "unknown order")
        first = tile // (GROUP_M * n_blocks) * GROUP_M
        height = tl.maximum(tl.minimum(m_blocks - first, GROUP_M), 1)  # past the last tile there is no block
        inside = tile % (GROUP_M * n_blocks)
        block_m = first + inside % height
        block_n = inside // height
    return block_m, block_n


@triton.jit
def find_tile(
    tile, m_blocks, n_blocks, starts, ends, blocks, blocks_up_to, slot_of_row_ptr,
    ORDER: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A tile's expert, column block, first row, the end of its expert's rows, and the slots of its rows.

    Without `slot_of_row_ptr` the last is the first row again. Past the last tile, whatever comes out may be loaded and
    means nothing.
    """
    block_m, block_n = _order(tile, m_blocks, n_blocks, ORDER, GROUP_M)
    e, row, end = _locate(block_m, starts, ends, blocks, blocks_up_to, BLOCK_M)
    source = row
    if slot_of_row_ptr is not None:
        offs_m = row + tl.arange(0, BLOCK_M)
        source = tl.load(slot_of_row_ptr + offs_m, mask=offs_m < end, other=0)
    return e, block_n, row, end, source
