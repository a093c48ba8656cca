# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""What the kernels for Hopper share: lists of tiles, barriers, how tiles are handed out and how results are stored.

    scheduler   one warp: takes the next tile from a counter in global memory, when the loader is almost done with the
                last one, so that cheap tiles leave no gaps
    loader      fills a ring of stages, and runs ahead into the next tile: see `hopper_loader` and `hopper_fp8_loader`
    consumers   two warp groups: multiply and store, see `hopper_kernel` and `hopper_fp8_kernel`

They meet at barriers in shared memory, each with a phase that flips when all its expected arrivals are in. A stage is
128 bytes of columns of a tile's rows and weights.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from moe_dispatch.backends.triton_common.fast_launch import fast_launch

# Tiles that the scheduler is ahead.
_SLOTS = gl.constexpr(2)
# So many steps before the end of a tile's loads the next tile is looked for. Had it been taken earlier, a program that
# falls behind would keep what others could do.
_LEAD = gl.constexpr(4)


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
    GROUP_M: tl.constexpr,
    E_POW2: tl.constexpr,
):
    """One program per expert lists its row blocks; the first also counts all of them and resets the schedulers.

    Blocks have BLOCK_M rows. What is left over of an expert's is spread over up to TALLER of them, its last ones,
    TAIL_M more rows for each; if it is more, it is a block of its own. An expert's blocks are a group, or several about
    as large where they are more than GROUP_M.
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
        # From the scheduler; from two consumers of 128 threads and the loader: see `arrive`.
        mbarrier.init(known.index(i), count=1 + 32)
        mbarrier.init(taken.index(i), count=3 + 2 * 128 + (64 if COPIES else 32))
    mbarrier.init(wanted.index(0), count=1)
    for i in gl.static_range(STAGES):
        # Where the loader copies by itself, each of its 64 threads arrives when its copies have.
        mbarrier.init(full.index(i), count=65 if COPIES else 1)
        mbarrier.init(empty.index(i), count=2)
    return (tiles, known, taken, wanted), (full, empty)


@gluon.jit
def schedule_tiles(queue, blocks_ptr, counts_ptr, n_blocks, COUNTER: gl.constexpr):
    """The scheduler: publishes this program's tiles when they are wanted, and then one that ends at row 0.

    Tiles of a group take turns over its row blocks: those that run at the same time share an expert's weights in the L2
    cache, and few rows.
    """
    _tiles, _known, _taken, wanted = queue
    m_blocks = gl.load(counts_ptr)
    tile = gl.program_id(0)
    i = 0
    while tile < m_blocks * n_blocks:
        # A group's tiles begin where its first block's would, so that this is some block of the tile's group.
        member = blocks_ptr + tile // n_blocks * 5
        first = gl.load(member + 3)
        height = gl.load(member + 4)
        inside = tile - first * n_blocks
        block = blocks_ptr + (first + inside % height) * 5
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
    arrive(known.index(slot))


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
    arrive(taken.index(slot))
    return e, row, end, block_n


@gluon.jit
def arrive(bar):
    """Arrive once for all threads, when they are here, and with each of them.

    The first suffices. But racecheck takes what a thread did for unordered where only another one arrives.
    """
    mbarrier.arrive(bar)
    async_copy.mbarrier_arrive(bar, increment_count=False)


@gluon.jit
def free_stage(queue, ring, k, depth, step, STAGES: gl.constexpr):
    """The stage for block `k` of a tile's columns, once its consumers have left it, and its barrier.

    Near the tile's end the next one is asked for.
    """
    _tiles, _known, _taken, wanted = queue
    full, empty = ring
    if k == gl.maximum(depth - _LEAD, 0):
        mbarrier.arrive(wanted.index(0))
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
    return stage, full.index(stage)


@gluon.jit
def load_stage(a_desc, tail_desc, w_desc, a_bufs, tail_bufs, w_bufs, stage, bar, row, end, w_row, w_second, column):
    """Have TMA copy a stage: a tile's rows, as far as it has more than 64 and 128, and twice 128 rows of weights."""
    ROW_BYTES: gl.constexpr = 128
    lower = end - row > 64
    tail = end - row > 128
    mbarrier.expect(bar, (256 + 64) * ROW_BYTES, pred=not lower)
    mbarrier.expect(bar, (256 + 128) * ROW_BYTES, pred=lower & (not tail))
    mbarrier.expect(bar, (256 + 128 + tail_bufs.shape[1]) * ROW_BYTES, pred=tail)
    load_weights(w_desc, w_bufs, stage, bar, w_row, w_second, column)
    _load_rows(a_desc, a_bufs.index(2 * stage), bar, row, end, column, True)
    _load_rows(a_desc, a_bufs.index(2 * stage + 1), bar, row + 64, end, column, lower)
    _load_rows(tail_desc, tail_bufs.index(stage), bar, row + 128, end, column, tail)


@gluon.jit
def _load_rows(desc, buf, bar, row, end, column, pred):
    """As many rows as `buf` has; zeros from `end` on, for which nothing is read, and which take less power to multiply.

    `desc` sees memory as overlapping windows of 64 rows, see `hopper._windows`. Rows come from the window that ends at
    `end`, or 64 rows on.
    """
    window = gl.minimum(row + 64, end)
    view = buf._reinterpret(buf.dtype, desc.block_type.shape, desc.layout)
    tma.async_copy_global_to_shared(desc, [window, row + 64 - window, column], bar, view, pred=pred)


@gluon.jit
def load_weights(w_desc, w_bufs, stage, bar, w_row, w_second, column):
    """Its weights alone; the second 128 rows are `w_second` rows after the first."""
    tma.async_copy_global_to_shared(w_desc, [w_row, column], bar, w_bufs.index(2 * stage))
    tma.async_copy_global_to_shared(w_desc, [w_row + w_second, column], bar, w_bufs.index(2 * stage + 1))


@gluon.jit
def store_tile(values, ROWS: gl.constexpr, buf, out_ptr, row, end, column, columns):
    """Store ``[rows, columns]``, or with ROWS, the axis of rows, at 1 ``[columns, rows]``, through shared memory.

    Of whole rows, as many columns at a time as `buf` has. Rows from `end` on are not there.
    """
    WIDTH: gl.constexpr = values.shape[1 - ROWS]
    if buf.shape[1] < WIDTH:
        left, right = gl.split(gl.permute(gl.reshape(values, [64, 2, WIDTH // 2]), [0, 2, 1]))
        store_tile(left, ROWS, buf, out_ptr, row, end, column, columns)
        store_tile(right, ROWS, buf, out_ptr, row, end, column + WIDTH // 2, columns)
    else:
        HEIGHT: gl.constexpr = values.shape[ROWS]
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HEIGHT, WIDTH], buf.dtype)
        view = buf._reinterpret(buf.dtype, [HEIGHT, WIDTH], LAYOUT)
        if ROWS == 1:
            view.permute((1, 0)).store(values.to(buf.dtype))
        else:
            view.store(values.to(buf.dtype))
        _store_lines(view, out_ptr, row, end, column, columns)


@gluon.jit
def _store_lines(buf, out_ptr, row, end, column, columns):
    WIDTH: gl.constexpr = buf.shape[1]
    VECTOR: gl.constexpr = 128 // buf.dtype.primitive_bitwidth
    LINES: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 * VECTOR // WIDTH, WIDTH // VECTOR], [4, 1], [1, 0])
    offs_m = row + gl.arange(0, buf.shape[0], gl.SliceLayout(1, LINES))
    offs_n = column + gl.arange(0, WIDTH, gl.SliceLayout(0, LINES))
    ptrs = out_ptr + offs_m.to(gl.int64)[:, None] * columns + offs_n[None, :]
    gl.store(ptrs, buf.load(LINES), mask=(offs_m < end)[:, None] & (offs_n < columns)[None, :])
