# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `push_tokens` and `push_results`.

Program p of a kernel on one rank works with program p of the same kernel on the others: it stores its share of the
bytes in their memory, sets its flag there, waits for their flags p, and then reads what they stored. So a program waits
for others only after it has done everything that others wait for, and never for a program of another number. What comes
after on the stream may be launched once all programs run, and so takes none of them its place on the device.
"""

import triton
import triton.language as tl

from moe_dispatch.backends.exchange.wire_kernel import moe_travelling_id, moe_words
from moe_dispatch.backends.triton_common.device import moe_fp8_amax, moe_fp8_codes, moe_fp8_scale
from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.pdl import moe_pdl_wait_and_release


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
    scales_at,
    polls,
    # constants
    RANKS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sends ids and weights (SLOTS), rows (ROWS), or both.

    A row is `row_words` words as it travels; with QUANTIZE those are e4m3 codes of as many elements as bytes.
    """
    program = tl.program_id(0)
    first = program.to(tl.int64) * BLOCK
    step = tl.num_programs(0) * BLOCK
    moe_pdl_wait_and_release(PDL)
    epoch = tl.load(epochs_ptr + program) + 1
    words = M.to(tl.int64) * row_words
    slots = capacity.to(tl.int64) * topk
    mine = rank.to(tl.int64) * capacity  # where this rank's tokens begin in everyone's memory
    rows_at += mine * row_words * 8
    if not ROWS:
        words = tl.zeros_like(words)
    if not SLOTS:
        slots = tl.zeros_like(slots)
    for start in range(first, tl.maximum(words, slots), step):
        # Rows are loaded before slots are stored, as with few tokens a call takes no longer than its loads in a row.
        if QUANTIZE:
            # Rows are whole groups of 128 columns, so that groups follow each other as if there were a single row.
            offs = start * 8 + tl.arange(0, BLOCK * 8)
            values = tl.load(hidden_ptr + offs, mask=offs < words * 8, other=0.0)
        else:
            offs = start + tl.arange(0, BLOCK)
            values = tl.load(moe_words(hidden_ptr) + offs, mask=offs < words)
        if SLOTS and start < slots:
            _moe_push_slots(
                weights_ptr, ids_ptr, first_experts_ptr, addresses_ptr, ids_at + mine * topk * 4,
                weights_at + mine * topk * 4, start, M * topk, slots, E, rank, RANKS, BLOCK,
            )  # fmt: skip
        if QUANTIZE:
            _moe_push_codes(
                values, addresses_ptr, rows_at, scales_at + mine * row_words // 4, start, words, rank, RANKS, BLOCK
            )
        else:
            for turn in range(RANKS):  # every rank begins with itself, so that no two store to one rank at a time
                rows = moe_words(tl.load(addresses_ptr + (rank + turn) % RANKS) + rows_at)
                tl.store(rows + offs, values, mask=offs < words)
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
    STORED: tl.constexpr,
    PDL: tl.constexpr,
):
    """With STORED, the kernels before have put this rank's results where they belong; `partial_ptr` has its dtype."""
    program = tl.program_id(0)
    first = program.to(tl.int64) * BLOCK
    step = tl.num_programs(0) * BLOCK
    moe_pdl_wait_and_release(PDL)
    epoch = tl.load(epochs_ptr + program) + 1
    own = tl.load(addresses_ptr + rank)
    block = capacity.to(tl.int64) * row_words  # words of one rank's rows
    counts = (own + counts_at).to(tl.pointer_type(tl.int64))
    lost = tl.load(lost_ptr)
    for turn in range(1, RANKS):
        peer = (rank + turn) % RANKS
        words = tl.load(counts + peer) * row_words
        if STORED:
            words = tl.where(lost != 0, words, 0)
        results = moe_words(tl.load(addresses_ptr + peer) + results_at + rank * block * 8)
        for start in range(first, words, step):
            offs = start + tl.arange(0, BLOCK)
            # All ones are NaN in every float dtype. A rank that came too late is not to take this for its results.
            values = tl.full([BLOCK], -1, tl.int64)
            if not STORED:
                stored = tl.load(moe_words(partial_ptr) + peer * block + offs, mask=offs < words)
                values = tl.where(lost != 0, values, stored)
            tl.store(results + offs, values, mask=offs < words)
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
            if STORED:
                total += tl.load(results + place, mask=mask, other=0.0).to(tl.float32)
            elif origin == rank:
                total += tl.load(partial_ptr + place, mask=mask, other=0.0).to(tl.float32)
            else:
                total += tl.load(results + place, mask=mask, other=0.0).to(tl.float32)
        total = tl.where(lost != 0, float("nan"), total)
        tl.store(out_ptr + offs, total.to(element), mask=mask)


@triton.jit
def _moe_push_slots(
    weights_ptr, ids_ptr, first_experts_ptr, addresses_ptr, ids_at, weights_at, start, present, slots, E, rank,
    RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store BLOCK ids and weights at these places of every rank; slots from `present` on have no expert."""
    offs = start + tl.arange(0, BLOCK)
    mask = offs < slots
    ids = moe_travelling_id(tl.load(ids_ptr + offs, mask=offs < present, other=-1), E)
    weights = tl.load(weights_ptr + offs, mask=offs < present, other=0.0).to(tl.float32)
    for turn in range(RANKS):
        peer = (rank + turn) % RANKS
        base = tl.load(addresses_ptr + peer)
        local = tl.where(ids < 0, -1, ids - tl.load(first_experts_ptr + peer))
        tl.store((base + ids_at).to(tl.pointer_type(tl.int32)) + offs, local, mask=mask)
        tl.store((base + weights_at).to(tl.pointer_type(tl.float32)) + offs, weights, mask=mask)


@triton.jit
def _moe_push_codes(
    values, addresses_ptr, codes_at, scales_at, start, words, rank, RANKS: tl.constexpr, BLOCK: tl.constexpr
):
    """Quantise the elements of BLOCK words of codes, and store codes and multipliers at these places of every rank."""
    GROUPS: tl.constexpr = BLOCK // 16
    offs = start * 8 + tl.arange(0, BLOCK * 8)
    offs_g = start // 16 + tl.arange(0, GROUPS)
    x = tl.reshape(values.to(tl.float32), [GROUPS, 128])
    scale = moe_fp8_scale(moe_fp8_amax(x, 1))
    codes = moe_fp8_codes(x, tl.broadcast_to(scale[:, None], [GROUPS, 128]))
    codes = tl.reshape(codes, [BLOCK * 8])
    for turn in range(RANKS):
        base = tl.load(addresses_ptr + (rank + turn) % RANKS)
        rows = tl.multiple_of((base + codes_at).to(tl.pointer_type(tl.float8e4nv)), 16)
        tl.store(rows + offs, codes, mask=offs < words * 8)
        tl.store((base + scales_at).to(tl.pointer_type(tl.float32)) + offs_g, scale, mask=offs_g < words // 16)


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
