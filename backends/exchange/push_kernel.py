# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `push_tokens` and `push_results`.

Program p of a kernel on one rank works with program p of the same kernel on the others: it stores its share of the
bytes in their memory, sets its flag there, waits for their flags p, and then reads what they stored. So a program waits
for others only after it has done everything that others wait for, and never for a program of another number.
"""

import triton
import triton.language as tl

from moe_dispatch.backends.exchange.wire_kernel import moe_travelling_id, moe_words
from moe_dispatch.backends.triton_common.fast_launch import fast_launch


@fast_launch
@triton.jit(do_not_specialize=["M", "capacity", "rank", "polls"])
def _moe_push_tokens_kernel(
    # inputs
    hidden_ptr,
    weights_ptr,
    ids_ptr,
    first_experts_ptr,
    # the memory of all ranks
    addresses_ptr,
    epochs_ptr,
    lost_ptr,
    lost_on_host,
    # shapes
    M,
    capacity,
    row_words,
    topk,
    E,
    rank,
    flags_at,
    counts_at,
    rows_at,
    ids_at,
    weights_at,
    polls,
    # constants
    RANKS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    first = program.to(tl.int64) * BLOCK
    step = tl.num_programs(0) * BLOCK
    epoch = tl.load(epochs_ptr + program) + 1
    hidden = moe_words(hidden_ptr)
    words = M.to(tl.int64) * row_words
    mine = rank.to(tl.int64) * capacity  # where this rank's tokens begin in everyone's memory
    for start in range(first, words, step):
        offs = start + tl.arange(0, BLOCK)
        values = tl.load(hidden + offs, mask=offs < words)
        for turn in range(RANKS):  # every rank begins with itself, so that no two store to one rank at a time
            peer = (rank + turn) % RANKS
            rows = moe_words(tl.load(addresses_ptr + peer) + rows_at + mine * row_words * 8)
            tl.store(rows + offs, values, mask=offs < words)
    slots = capacity.to(tl.int64) * topk
    for start in range(first, slots, step):
        offs = start + tl.arange(0, BLOCK)
        mask, present = offs < slots, offs < M * topk
        ids = moe_travelling_id(tl.load(ids_ptr + offs, mask=present, other=-1), E)
        weights = tl.load(weights_ptr + offs, mask=present, other=0.0).to(tl.float32)
        for turn in range(RANKS):
            peer = (rank + turn) % RANKS
            base = tl.load(addresses_ptr + peer) + mine * topk * 4
            local = tl.where(ids < 0, -1, ids - tl.load(first_experts_ptr + peer))
            tl.store((base + ids_at).to(tl.pointer_type(tl.int32)) + offs, local, mask=mask)
            tl.store((base + weights_at).to(tl.pointer_type(tl.float32)) + offs, weights, mask=mask)
    for peer in range(RANKS):
        # By every program, so that the flag of each covers it.
        counts = (tl.load(addresses_ptr + peer) + counts_at).to(tl.pointer_type(tl.int64))
        tl.store(counts + rank, M.to(tl.int64))
    _moe_meet(addresses_ptr, flags_at, epoch, rank, lost_ptr, lost_on_host, polls, RANKS, PROGRAMS)
    tl.store(epochs_ptr + program, epoch)


@fast_launch
@triton.jit(do_not_specialize=["M", "capacity", "rank", "polls"])
def _moe_push_results_kernel(
    # inputs
    partial_ptr,
    # outputs
    out_ptr,
    # the memory of all ranks
    addresses_ptr,
    epochs_ptr,
    lost_ptr,
    lost_on_host,
    # shapes
    M,
    capacity,
    row_words,
    rank,
    flags_at,
    counts_at,
    results_at,
    polls,
    # constants
    RANKS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_WORD: tl.constexpr,
):
    program = tl.program_id(0)
    first = program.to(tl.int64) * BLOCK
    step = tl.num_programs(0) * BLOCK
    epoch = tl.load(epochs_ptr + program) + 1
    partial = moe_words(partial_ptr)
    own = tl.load(addresses_ptr + rank)
    block = capacity.to(tl.int64) * row_words  # words of one rank's rows
    counts = (own + counts_at).to(tl.pointer_type(tl.int64))
    lost = tl.load(lost_ptr)
    for turn in range(1, RANKS):
        peer = (rank + turn) % RANKS
        words = tl.load(counts + peer) * row_words
        results = moe_words(tl.load(addresses_ptr + peer) + results_at + rank * block * 8)
        for start in range(first, words, step):
            offs = start + tl.arange(0, BLOCK)
            values = tl.load(partial + peer * block + offs, mask=offs < words)
            # All ones are NaN in every float dtype. A rank that came too late is not to take this for its results.
            tl.store(results + offs, tl.where(lost != 0, -1, values), mask=offs < words)
    lost = _moe_meet(addresses_ptr, flags_at, epoch, rank, lost_ptr, lost_on_host, polls, RANKS, PROGRAMS)
    tl.store(epochs_ptr + program, epoch)

    # The same bytes again, as elements.
    element = out_ptr.dtype.element_ty
    results = tl.multiple_of((own + results_at).to(tl.pointer_type(element)), 16)
    for start in range(first * PER_WORD, M.to(tl.int64) * row_words * PER_WORD, step * PER_WORD):
        offs = start + tl.arange(0, BLOCK * PER_WORD)
        mask = offs < M.to(tl.int64) * row_words * PER_WORD
        total = tl.zeros([BLOCK * PER_WORD], tl.float32)
        for origin in range(RANKS):
            # In the order of ranks on every rank, so that the same inputs give the same bits.
            place = origin * block * PER_WORD + offs
            if origin == rank:
                total += tl.load(partial_ptr + place, mask=mask, other=0.0).to(tl.float32)
            else:
                total += tl.load(results + place, mask=mask, other=0.0).to(tl.float32)
        total = tl.where(lost != 0, float("nan"), total)
        tl.store(out_ptr + offs, total.to(element), mask=mask)


@triton.jit
def _moe_meet(
    addresses_ptr, flags_at, epoch, rank, lost_ptr, lost_on_host, polls, RANKS: tl.constexpr, PROGRAMS: tl.constexpr
):
    """Set this program's flag on every other rank, and wait for theirs.

    Everything that the program stored before is visible where its flag is seen: the barrier orders the stores of its
    threads before the one that sets the flag, and that releases at the scope of the system.

    Returns:
        Not 0 where a rank did not come, now or in an earlier call: what was to be read is not there.
    """
    program = tl.program_id(0)
    tl.debug_barrier()
    for turn in range(1, RANKS):
        peer = (rank + turn) % RANKS
        flags = (tl.load(addresses_ptr + peer) + flags_at).to(tl.pointer_type(tl.int64))
        tl.atomic_xchg(flags + rank * PROGRAMS + program, epoch, sem="release", scope="sys")
    lost = tl.load(lost_ptr)
    left = tl.where(lost != 0, 0, polls)  # once is long enough to have waited for a rank that is gone
    flags = (tl.load(addresses_ptr + rank) + flags_at).to(tl.pointer_type(tl.int64))
    for turn in range(1, RANKS):
        peer = (rank + turn) % RANKS
        flag = flags + peer * PROGRAMS + program
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        while (seen < epoch) & (left > 0):
            seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            left -= 1
        if (seen < epoch) & (lost == 0):
            lost = (peer + 1).to(tl.int64)
            tl.store(lost_ptr, lost)
            tl.store(lost_on_host.to(tl.int64).to(tl.pointer_type(tl.int64)), lost)
    tl.debug_barrier()
    return lost
