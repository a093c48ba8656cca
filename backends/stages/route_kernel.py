# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Device code of `route`: one launch for few slots, two for many."""

import triton
import triton.language as tl


@triton.jit
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
    ALIGNMENT: tl.constexpr,
    CAPACITY: tl.constexpr,
    E_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per expert. Each reads all ids, so none waits for another: no scan across programs, no atomics."""
    e = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    offs_e = tl.arange(0, E_POW2)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    count = 0
    start = 0
    counts = tl.zeros([E_POW2], tl.int32)
    for first in range(0, slots, BLOCK):
        ids = _load_ids(ids_ptr, first + offs, slots, E)
        count += tl.sum((ids == e).to(tl.int32))
        if CAPACITY == 0:
            if ALIGNMENT == 1:
                start += tl.sum(((ids >= 0) & (ids < e)).to(tl.int32))
            else:
                counts += tl.histogram(tl.maximum(ids, 0), E_POW2, mask=ids >= 0)
        if e == 0:
            tl.store(row_of_slot_ptr + first + offs, -1, mask=(ids < 0) & (first + offs < slots))
    if CAPACITY > 0:
        start = e * CAPACITY
        end = start + CAPACITY
        count = tl.minimum(count, CAPACITY)
    else:
        if ALIGNMENT > 1:
            spans = (counts + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
            start = tl.sum(tl.where(offs_e < e, spans, 0))
        end = start + (count + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        if e == E - 1:
            end = rows
    tl.store(starts_ptr + e, start)
    tl.store(ends_ptr + e, start + count)
    for first in range(start + count, end, BLOCK):
        tl.store(slot_of_row_ptr + first + offs, -1, mask=first + offs < end)

    seen = 0
    for first in range(0, slots, BLOCK):
        ids = _load_ids(ids_ptr, first + offs, slots, E)
        hit = (ids == e).to(tl.int32)
        rank = seen + tl.cumsum(hit, 0) - hit
        seen += tl.sum(hit)
        # A row past the capacity would be the next expert's.
        fits = rank < count
        tl.store(slot_of_row_ptr + start + rank, first + offs, mask=(hit > 0) & fits)
        tl.store(row_of_slot_ptr + first + offs, tl.where(fits, start + rank, -1), mask=hit > 0)


@triton.jit
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
    E_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Counts each expert's slots in one block of slots, and blanks this program's share of the rows."""
    block = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    offs_e = tl.arange(0, E_POW2)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    ids = _load_ids(ids_ptr, block * BLOCK + offs, slots, E)
    counts = tl.histogram(tl.maximum(ids, 0), E_POW2, mask=ids >= 0)
    tl.store(counts_ptr + block * E + offs_e, counts, mask=offs_e < E)
    for first in range(block * BLOCK, rows, tl.num_programs(0) * BLOCK):
        tl.store(slot_of_row_ptr + first + offs, -1, mask=first + offs < rows)


@triton.jit
def _moe_route_place_kernel(
    # inputs
    ids_ptr,
    counts_ptr,
    # outputs
    slot_of_row_ptr,
    row_of_slot_ptr,
    starts_ptr,
    ends_ptr,
    # shapes
    slots,
    E,
    # constants
    ALIGNMENT: tl.constexpr,
    CAPACITY: tl.constexpr,
    E_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Places one block of slots; every program adds up the counts of all blocks for itself."""
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    offs_e = tl.arange(0, E_POW2)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    total = tl.zeros([E_POW2], tl.int32)
    before = tl.zeros([E_POW2], tl.int32)  # slots of each expert in earlier blocks
    for first in range(0, blocks, CHUNK):
        offs_b = first + tl.arange(0, CHUNK)
        mask = (offs_b < blocks)[:, None] & (offs_e < E)[None, :]
        counts = tl.load(counts_ptr + offs_b[:, None] * E + offs_e[None, :], mask=mask, other=0)  # [CHUNK, E_POW2]
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where((offs_b < block)[:, None], counts, 0), 0)
    if CAPACITY > 0:
        starts = offs_e * CAPACITY
        ends = starts + tl.minimum(total, CAPACITY)
    else:
        spans = (total + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        starts = tl.cumsum(spans, 0) - spans
        ends = starts + total
    if block == 0:
        tl.store(starts_ptr + offs_e, starts, mask=offs_e < E)
        tl.store(ends_ptr + offs_e, ends, mask=offs_e < E)

    ids = _load_ids(ids_ptr, offs, slots, E)
    rank = tl.zeros([BLOCK], tl.int32)  # equal ids before it in this block: keeps slots in order
    for first in range(0, BLOCK, CHUNK):
        offs_o = block * BLOCK + first + tl.arange(0, CHUNK)
        others = _load_ids(ids_ptr, offs_o, slots, E)
        earlier = (ids[:, None] == others[None, :]) & (offs_o[None, :] < offs[:, None])  # [BLOCK, CHUNK]
        rank += tl.sum(earlier.to(tl.int32), 1)
    expert = tl.maximum(ids, 0)
    row = tl.gather(starts + before, expert, 0) + rank
    fits = (ids >= 0) & (row < tl.gather(ends, expert, 0))
    tl.store(slot_of_row_ptr + row, offs, mask=fits)
    tl.store(row_of_slot_ptr + offs, tl.where(fits, row, -1), mask=offs < slots)


@triton.jit
def _load_ids(ids_ptr, offs, slots, E):
    ids = tl.load(ids_ptr + offs, mask=offs < slots, other=-1)
    # Compared before it is narrowed: an int64 id may be any number.
    return tl.where((ids >= 0) & (ids < E), ids, -1).to(tl.int32)
