# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `pack_tokens` and `unpack_slots`."""

import triton
import triton.language as tl

from moe_dispatch.backends.exchange.wire_kernel import moe_travelling_id, moe_words
from moe_dispatch.backends.triton_common.fast_launch import fast_launch


@fast_launch
@triton.jit(do_not_specialize=["M", "capacity"])
def _moe_pack_tokens_kernel(
    # inputs
    hidden_ptr,
    weights_ptr,
    ids_ptr,
    # outputs
    segment_ptr,
    # shapes
    M,
    capacity,
    row_words,
    topk,
    E,
    # constants
    BLOCK: tl.constexpr,
):
    hidden, segment = moe_words(hidden_ptr), moe_words(segment_ptr)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0) * BLOCK
    words = M.to(tl.int64) * row_words
    for start in range(first, words, step):
        offs = start + tl.arange(0, BLOCK)
        tl.store(segment + offs, tl.load(hidden + offs, mask=offs < words), mask=offs < words)
    slots = capacity.to(tl.int64) * topk
    ids = (segment + capacity.to(tl.int64) * row_words).to(tl.pointer_type(tl.int32))
    weights = (ids + slots).to(tl.pointer_type(tl.float32))
    for start in range(first, slots, step):
        offs = start + tl.arange(0, BLOCK)
        mask, mine = offs < slots, offs < M * topk
        tl.store(ids + offs, moe_travelling_id(tl.load(ids_ptr + offs, mask=mine, other=-1), E), mask=mask)
        tl.store(weights + offs, tl.load(weights_ptr + offs, mask=mine, other=0.0).to(tl.float32), mask=mask)


@fast_launch
@triton.jit(do_not_specialize=["rows", "capacity", "segment_rows", "first_expert"])
def _moe_unpack_slots_kernel(
    # inputs
    wire_ptr,
    # outputs
    weights_ptr,
    ids_ptr,
    # shapes
    rows,
    capacity,
    segment_rows,
    row_words,
    topk,
    first_expert,
    # constants
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < rows.to(tl.int64) * topk
    row = offs // topk
    segment, token = row // segment_rows, row % segment_rows
    holds = mask & (token < capacity)
    slots = wire_ptr.to(tl.pointer_type(tl.int32)) + (segment * segment_rows + capacity) * row_words * 2
    slots += token * topk + offs % topk
    ids = tl.load(slots, mask=holds, other=-1)
    ids = tl.where(ids < 0, -1, ids - first_expert)
    weights = tl.load((slots + capacity * topk).to(tl.pointer_type(tl.float32)), mask=holds, other=0.0)
    tl.store(ids_ptr + offs, ids, mask=mask)
    tl.store(weights_ptr + offs, weights, mask=mask)
