# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `route`: one launch for few slots, a counting sort in three for many."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.pdl import moe_pdl_wait_and_release


@fast_launch
@triton.jit(do_not_specialize=["slots", "rows"])
def _moe_route_kernel(
    # inputs
    ids_ptr,
    # outputs
    slot_of_row_ptr,
    row_of_slot_ptr,
    starts_ptr,
    ends_ptr,
    # shapes
    slots,
    rows,
    E,
    # constants
    TOPK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CAPACITY: tl.constexpr,
    E_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program per expert reads all ids, so that no program depends on another and nothing is added atomically.

    BLOCK is at least the number of slots.
    """
    e = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    offs_e = tl.arange(0, E_POW2)
    moe_pdl_wait_and_release(PDL)

    ids = _load_ids(ids_ptr, offs, slots, E)
    hit = ids == e
    # A slot that repeats its token's expert shares the row of the slot before.
    new = hit & ~_repeats(ids_ptr, offs, ids, hit, TOPK) if CAPACITY > 0 else hit
    count = tl.sum(new.to(tl.int32))
    if e == 0:
        tl.store(row_of_slot_ptr + offs, -1, mask=(ids < 0) & (offs < slots))
    if CAPACITY > 0:
        start = e * CAPACITY
        end = start + CAPACITY
        count = tl.minimum(count, CAPACITY)
    else:
        if ALIGNMENT == 1:
            start = tl.sum(((ids >= 0) & (ids < e)).to(tl.int32))
        else:
            counts = tl.histogram(tl.maximum(ids, 0), E_POW2, mask=ids >= 0)
            spans = (counts + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
            start = tl.sum(tl.where(offs_e < e, spans, 0))
        end = start + (count + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        if e == E - 1:
            end = rows
    tl.store(starts_ptr + e, start)
    tl.store(ends_ptr + e, start + count)
    if slot_of_row_ptr is not None:
        for first in range(start + count, end, BLOCK):
            tl.store(slot_of_row_ptr + first + offs, -1, mask=first + offs < end)

    rank = tl.cumsum(new.to(tl.int32), 0) - 1  # the row of each slot among its expert's
    fits = rank < count  # a row past the capacity would be the next expert's
    if slot_of_row_ptr is not None:
        tl.store(slot_of_row_ptr + start + rank, offs, mask=new & fits)
    tl.store(row_of_slot_ptr + offs, tl.where(fits, start + rank, -1), mask=hit)


@fast_launch
@triton.jit(do_not_specialize=["slots", "rows"])
def _moe_route_count_kernel(
    # inputs
    ids_ptr,
    # outputs
    counts_ptr,
    slot_of_row_ptr,
    # shapes
    slots,
    rows,
    E,
    # constants
    TOPK: tl.constexpr,
    CAPACITY: tl.constexpr,
    E_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Counts each expert's slots in one block of slots, and marks this program's share of the rows as empty."""
    block = tl.program_id(0)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    offs_e = tl.arange(0, E_POW2)
    moe_pdl_wait_and_release(PDL)
    ids = _load_ids(ids_ptr, offs, slots, E)
    new = _holds_row(ids_ptr, offs, ids, TOPK, CAPACITY)
    counts = tl.histogram(tl.maximum(ids, 0), E_POW2, mask=new)
    tl.store(counts_ptr + block * E + offs_e, counts, mask=offs_e < E)
    if slot_of_row_ptr is not None:
        for first in range(block * BLOCK, rows, tl.num_programs(0) * BLOCK):
            offs_r = first + tl.arange(0, BLOCK)
            tl.store(slot_of_row_ptr + offs_r, -1, mask=offs_r < rows)


@fast_launch
@triton.jit(do_not_specialize=["blocks"])
def _moe_route_scan_kernel(
    # inputs and outputs
    counts_ptr,
    # shapes
    blocks,
    E,
    # constants
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Turns counts ``[blocks, E]`` of BLOCK_E experts into sums over earlier blocks; row `blocks` gets the totals."""
    offs_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    moe_pdl_wait_and_release(PDL)
    total = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, blocks, CHUNK):
        offs_b = first + tl.arange(0, CHUNK)
        mask = (offs_b < blocks)[:, None] & (offs_e < E)[None, :]
        ptrs = counts_ptr + offs_b[:, None] * E + offs_e[None, :]
        counts = tl.load(ptrs, mask=mask, other=0)  # [CHUNK, BLOCK_E]
        tl.store(ptrs, total[None, :] + tl.cumsum(counts, 0) - counts, mask=mask)
        total += tl.sum(counts, 0)
    tl.store(counts_ptr + blocks * E + offs_e, total, mask=offs_e < E)


@fast_launch
@triton.jit(do_not_specialize=["slots"])
def _moe_route_place_kernel(
    # inputs
    ids_ptr,
    before_ptr,
    # outputs
    slot_of_row_ptr,
    row_of_slot_ptr,
    starts_ptr,
    ends_ptr,
    # shapes
    slots,
    E,
    # constants
    TOPK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CAPACITY: tl.constexpr,
    E_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Gives one block of slots their rows, after those of the same experts in earlier blocks."""
    block = tl.program_id(0)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    offs_e = tl.arange(0, E_POW2)
    mask_e = offs_e < E
    moe_pdl_wait_and_release(PDL)
    total = tl.load(before_ptr + tl.num_programs(0) * E + offs_e, mask=mask_e, other=0)
    before = tl.load(before_ptr + block * E + offs_e, mask=mask_e, other=0)
    ids = _load_ids(ids_ptr, offs, slots, E)
    if CAPACITY > 0:
        starts = offs_e * CAPACITY
        ends = starts + tl.minimum(total, CAPACITY)
    else:
        spans = (total + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        starts = tl.cumsum(spans, 0) - spans
        ends = starts + total
    if block == 0:
        tl.store(starts_ptr + offs_e, starts, mask=mask_e)
        tl.store(ends_ptr + offs_e, ends, mask=mask_e)

    new = _holds_row(ids_ptr, offs, ids, TOPK, CAPACITY)
    # How many rows of its expert this block has up to each slot's own; a slot that shares a row counts up to that.
    upto = tl.zeros([BLOCK], tl.int32)
    for first in range(0, BLOCK, CHUNK):
        offs_o = block * BLOCK + first + tl.arange(0, CHUNK)
        others = _load_ids(ids_ptr, offs_o, slots, E)
        others = tl.where(_holds_row(ids_ptr, offs_o, others, TOPK, CAPACITY), others, E)
        counted = (ids[:, None] == others[None, :]) & (offs_o[None, :] <= offs[:, None])  # [BLOCK, CHUNK]
        upto += tl.sum(counted.to(tl.int32), 1)
    expert = tl.maximum(ids, 0)
    row = tl.gather(starts + before, expert, 0) + upto - 1
    fits = (ids >= 0) & (row < tl.gather(ends, expert, 0))
    if slot_of_row_ptr is not None:
        tl.store(slot_of_row_ptr + row, offs, mask=fits & new)
    tl.store(row_of_slot_ptr + offs, tl.where(fits, row, -1), mask=offs < slots)


@triton.jit
def _load_ids(ids_ptr, offs, slots, E):
    ids = tl.load(ids_ptr + offs, mask=offs < slots, other=-1)
    # Compared before narrowing: an int64 id outside 0…E-1 may be inside modulo 2^32.
    return tl.where((ids >= 0) & (ids < E), ids, -1).to(tl.int32)


@triton.jit
def _holds_row(ids_ptr, offs, ids, TOPK: tl.constexpr, CAPACITY: tl.constexpr):
    """Whether each slot has a row that no earlier slot has."""
    holds = ids >= 0
    if CAPACITY > 0:
        holds = holds & ~_repeats(ids_ptr, offs, ids, holds, TOPK)
    return holds


@triton.jit
def _repeats(ids_ptr, offs, ids, mask, TOPK: tl.constexpr):
    """Whether, under the mask, an earlier slot of the same token has the same id."""
    first = offs // TOPK * TOPK
    repeated = mask & (ids < 0)
    for j in tl.static_range(TOPK - 1):
        earlier = mask & (first + j < offs)
        repeated = repeated | (earlier & (tl.load(ids_ptr + first + j, mask=earlier, other=-1) == ids))
    return repeated
