# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""What the kernels for Hopper share: their lists of tiles, their barriers, and all warps but those that multiply.

    scheduler   one warp: takes the next tile from a counter in global memory, when the loader is almost done with the
                last one, so that cheap tiles leave no gaps
    loader      fills a ring of stages, and runs ahead into the next tile: weights by TMA, rows by TMA or gathered
    consumers   two warp groups: multiply and store, see `hopper_kernel` and `hopper_fp8_kernel`

They meet at barriers in shared memory, each with a phase that flips when all its expected arrivals are in. A stage is
128 bytes of columns of a tile's rows and weights.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from ..launch import fast_launch

# Tiles that the scheduler is ahead.
_SLOTS = gl.constexpr(2)
# So many steps before the end of a tile's loads the next tile is looked for. Had it been taken earlier, a program that
# falls behind would keep what others could do.
LEAD = gl.constexpr(4)
_STAGE_BYTES = gl.constexpr(64 * 128)


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
    TALLER: tl.constexpr,
    E_POW2: tl.constexpr,
):
    """One program per expert lists its row blocks; the first also counts all of them and resets the schedulers.

    Blocks have BLOCK_M rows. What is left over of an expert's is spread over up to TALLER of them, its last ones,
    TAIL_M more rows for each; if it is more, it is a block of its own.
    """
    e = tl.program_id(0)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    offs_e = tl.arange(0, E_POW2)
    starts = tl.load(starts_ptr + offs_e, mask=offs_e < E, other=0)
    ends = tl.load(ends_ptr + offs_e, mask=offs_e < E, other=0)
    rows = ends - starts
    taller = tl.cdiv(rows % BLOCK_M, TAIL_M)
    taller = tl.where((taller <= TALLER) & (taller <= rows // BLOCK_M), taller, 0)
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
    for i in range(count):
        row = start + i * BLOCK_M + tl.maximum(i - plain, 0) * TAIL_M
        height = BLOCK_M + tl.where(i >= plain, TAIL_M, 0)
        block = blocks_ptr + (first + i) * 3
        tl.store(block, e)
        tl.store(block + 1, row)
        tl.store(block + 2, tl.minimum(row + height, end))


@gluon.jit
def make_barriers(STAGES: gl.constexpr, COPIES: gl.constexpr):
    """What is known of the next tiles, and the barriers: (tiles, known, taken, wanted), (full, empty)."""
    tiles = gl.allocate_shared_memory(gl.int32, [4 * _SLOTS, 1], mbarrier.MBarrierLayout())
    known = gl.allocate_shared_memory(gl.int64, [_SLOTS, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [_SLOTS, 1], mbarrier.MBarrierLayout())
    wanted = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(_SLOTS):
        mbarrier.init(known.index(i), count=1)
        mbarrier.init(taken.index(i), count=3)
    mbarrier.init(wanted.index(0), count=1)
    for i in gl.static_range(STAGES):
        # Where the loader copies by itself, each of its 64 threads arrives when its copies have.
        mbarrier.init(full.index(i), count=65 if COPIES else 1)
        mbarrier.init(empty.index(i), count=2)
    return (tiles, known, taken, wanted), (full, empty)


@gluon.jit
def schedule_tiles(queue, blocks_ptr, counts_ptr, n_blocks, COUNTER: gl.constexpr, GROUP_M: gl.constexpr):
    """The scheduler: publishes this program's tiles when they are wanted, and then one that ends at row 0."""
    _tiles, _known, _taken, wanted = queue
    m_blocks = gl.load(counts_ptr)
    tile = gl.program_id(0)
    i = 0
    while tile < m_blocks * n_blocks:
        # Tiles that run at the same time share rows and weights in the L2 cache.
        first = tile // (GROUP_M * n_blocks) * GROUP_M
        height = gl.minimum(m_blocks - first, GROUP_M)
        inside = tile % (GROUP_M * n_blocks)
        block = blocks_ptr + (first + inside % height) * 3
        _publish_tile(queue, i, gl.load(block), gl.load(block + 1), gl.load(block + 2), inside // height)
        mbarrier.wait(wanted.index(0), i & 1)
        i += 1
        tile = gl.num_programs(0) + gl.atomic_add(counts_ptr + COUNTER, 1)
    _publish_tile(queue, i, 0, 0, 0, 0)


@gluon.jit
def _publish_tile(queue, i, e, row, end, block_n):
    tiles, known, taken, _wanted = queue
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    slot = i % _SLOTS
    mbarrier.wait(taken.index(slot), (i // _SLOTS & 1) ^ 1)
    tiles.index(slot * 4).store(gl.full([1], e, gl.int32, ONE))
    tiles.index(slot * 4 + 1).store(gl.full([1], row, gl.int32, ONE))
    tiles.index(slot * 4 + 2).store(gl.full([1], end, gl.int32, ONE))
    tiles.index(slot * 4 + 3).store(gl.full([1], block_n, gl.int32, ONE))
    mbarrier.arrive(known.index(slot))


@gluon.jit
def receive_tile(queue, i):
    """Tile number `i` of this program: expert, first row, end of its rows, and which columns."""
    tiles, known, taken, _wanted = queue
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    slot = i % _SLOTS
    mbarrier.wait(known.index(slot), i // _SLOTS & 1)
    e = gl.max(tiles.index(slot * 4).load(ONE), 0)
    row = gl.max(tiles.index(slot * 4 + 1).load(ONE), 0)
    end = gl.max(tiles.index(slot * 4 + 2).load(ONE), 0)
    block_n = gl.max(tiles.index(slot * 4 + 3).load(ONE), 0)
    mbarrier.arrive(taken.index(slot))
    return e, row, end, block_n


@gluon.jit
def load_tiles(
    queue, ring, a, tail_desc, w_desc, slot_of_row_ptr, a_bufs, tail_bufs, w_bufs, w_rows, w_second, w_step, depth,
    a_columns, TOPK: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loader.

    `w_second` is how far the second 128 rows of weights are from the first, `w_step` one tile from the next. `a` is a
    descriptor of rows in expert order, or with TOPK > 0 a pointer to tokens. With TAIL tiles have up to 160 rows, else
    128; what a tile does not need of its last rows is not loaded.
    """
    full, empty = ring
    _tiles, _known, _taken, wanted = queue
    GATHER: gl.constexpr = TOPK > 0
    BLOCK_K: gl.constexpr = a_bufs.type.shape[2]
    W_BYTES: gl.constexpr = 4 * _STAGE_BYTES
    i = 0
    step = 0
    e, row, end, block_n = receive_tile(queue, i)
    while end > 0:
        lower = end - row > 64
        tail = end - row > 128
        w_row = e * w_rows + block_n * w_step
        if GATHER:
            upper_rows = _token_vectors(a, slot_of_row_ptr, row, end, a_columns, TOPK, 64)
            lower_rows = _token_vectors(a, slot_of_row_ptr, row + 64, end, a_columns, TOPK, 64)
            if TAIL:
                tail_rows = _token_vectors(a, slot_of_row_ptr, row + 128, end, a_columns, TOPK, 32)
        ask = gl.maximum(depth - LEAD, 0)
        for k in range(depth):
            if k == ask:
                mbarrier.arrive(wanted.index(0))
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            bar = full.index(stage)
            if GATHER:
                mbarrier.expect(bar, W_BYTES)
            else:
                mbarrier.expect(bar, W_BYTES + _STAGE_BYTES, pred=not lower)
                mbarrier.expect(bar, W_BYTES + 2 * _STAGE_BYTES, pred=lower & (not tail))
                mbarrier.expect(bar, W_BYTES + 2 * _STAGE_BYTES + _STAGE_BYTES // 2, pred=tail)
            tma.async_copy_global_to_shared(w_desc, [w_row, k * BLOCK_K], bar, w_bufs.index(2 * stage))
            tma.async_copy_global_to_shared(w_desc, [w_row + w_second, k * BLOCK_K], bar, w_bufs.index(2 * stage + 1))
            upper_buf = a_bufs.index(2 * stage)
            lower_buf = a_bufs.index(2 * stage + 1)
            if GATHER:
                _copy_tokens(a, upper_rows, k, upper_buf)
                if lower:
                    _copy_tokens(a, lower_rows, k, lower_buf)
                if TAIL:  # noqa: SIM102 - one is known when compiling, the other when running
                    if tail:
                        _copy_tokens(a, tail_rows, k, tail_bufs.index(stage))
                async_copy.mbarrier_arrive(bar, increment_count=False)
            else:
                tma.async_copy_global_to_shared(a, [row, k * BLOCK_K], bar, upper_buf)
                tma.async_copy_global_to_shared(a, [row + 64, k * BLOCK_K], bar, lower_buf, pred=lower)
                if TAIL:
                    tma.async_copy_global_to_shared(
                        tail_desc, [row + 128, k * BLOCK_K], bar, tail_bufs.index(stage), pred=tail
                    )
            step += 1
        i += 1
        e, row, end, block_n = receive_tile(queue, i)


@gluon.jit
def _token_vectors(x_ptr, slot_of_row_ptr, row, end, columns, TOPK: gl.constexpr, ROWS: gl.constexpr):
    """Where some rows' tokens start, counted in vectors of 16 bytes; -1 for rows past the end."""
    VECTOR: gl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    COPY: gl.constexpr = gl.BlockedLayout([1, VECTOR], [4, 8], [2, 1], [1, 0])
    offs_m = row + gl.arange(0, ROWS, gl.SliceLayout(1, COPY))
    slot = gl.load(slot_of_row_ptr + offs_m, mask=offs_m < end, other=-1)
    return gl.where(slot >= 0, slot // TOPK * (columns // VECTOR), -1)


@gluon.jit
def _copy_tokens(x_ptr, vectors, k, buf):
    """Block `k` of columns of the rows that are there.

    The others become zeros, for which nothing is read: any one row in their place would be asked for by all programs.
    """
    VECTOR: gl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    COPY: gl.constexpr = gl.BlockedLayout([1, VECTOR], [4, 8], [2, 1], [1, 0])
    offs_k = gl.arange(0, 8 * VECTOR, gl.SliceLayout(0, COPY))
    ptrs = x_ptr + (vectors + k * 8).to(gl.int64)[:, None] * VECTOR + offs_k[None, :]
    async_copy.async_copy_global_to_shared(buf, ptrs, mask=(vectors >= 0)[:, None])
