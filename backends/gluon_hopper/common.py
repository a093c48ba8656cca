# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""What the Hopper kernels share: the queue of tiles, the ring of stages, and how results are stored.

One program runs on every multiprocessor until all tiles are done. A tile is up to 160 (BF16, FP16) or 144 (FP8) rows of
one expert by 256 rows of its weights: 128 of gate and the 128 of up beside them, or 256 of down. Its depth, K in the
first product and N in the second, arrives in stages of 128 bytes of each row.

A stage holds 128 rows of gate and then 128 of up. Where gate and up rows alternate in the layer (INTERLEAVED), it holds
64 of each in turn, so that each half of its weights has one FP8 scale. Where the layer has biases, sums start at them.
Of weights stored by columns (TRANSPOSED, BF16) it holds 64 columns of each 64 rows, in which gate and up rows that
alternate in the layer still do (ALTERNATING). Stages of MXFP4 weights are laid out otherwise: see
`mxfp4_product_kernel`.

Roles:

    role         warps     work
    consumer 0   4         multiplies rows 0 to 63 of a tile, or all rows of a low one by half of the weights; stores
    consumer 1   4         the same for rows 64 to 127, or for the other half of the weights
    loader       1 or 2    fills stages ahead of the consumers, and on into the next tile. Two warps where it copies by
                           thread too: gathered rows in BF16 and FP16, multipliers in FP8
    scheduler    1         takes the next tile from a counter in global memory when the loader has almost finished one,
                           so that cheap tiles leave no gaps

Barriers in shared memory, each with a phase that flips when all its expected arrivals are in:

    barrier        arrivals   from                                     waited for by
    known[slot]    33         scheduler: a tile is in the slot         consumers, loader
    taken[slot]    291, 323   consumers and loader have read it        scheduler, before it writes the slot again
    wanted         1          loader, as a tile's loads end            scheduler, before it takes a tile
    full[stage]    1, 65      loader and TMA: the stage is loaded      consumers
    empty[stage]   2          consumers have multiplied the stage      loader, before it fills it again
    exchange       2          FP8: both consumers' maxima are there    both consumers

Each role arrives at `known` and `taken` once and with each of its threads, see `arrive`: 1 + 32 for the scheduler,
3 + 2 · 128 + 32 or 64 for the consumers and the loader. A loader that copies with its 64 threads arrives at `full` with
each of them.

Timeline of two tiles, a and b, from left to right:

    scheduler    take a ............... wanted: take b ...................... wanted: none left, publish the end
    loader       a: stages 0 1 2 3 .............. last | b: stages, each as soon as it is empty ...... last |
    consumer 0       a: multiply ..................... | store a | b: multiply .................. | store b |
    consumer 1         a: multiply ..................... | store a | b: multiply ................. | store b |
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from moe_dispatch.backends.gluon_hopper import tiles
from moe_dispatch.backends.gluon_hopper.gluon_api import aggregate, field, reinterpret, tma_load
from moe_dispatch.backends.triton_common.device import moe_gate_up_bias

_QUEUE_SLOTS = gl.constexpr(tiles.QUEUE_SLOTS)
_LEAD_STAGES = gl.constexpr(tiles.LEAD_STAGES)
_STAGE_BYTES = gl.constexpr(tiles.STAGE_BYTES)
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@aggregate
class Tile:
    """A tile of the result.

    Attributes:
        e: Expert.
        row: First row.
        end: End of its rows; 0 where no tile is left.
        block_n: Its columns: which 128 of gate and of up, or which 256 of down.
    """

    e: gl.tensor
    row: gl.tensor
    end: gl.tensor
    block_n: gl.tensor

    @gluon.constexpr_function
    def __init__(self, e, row, end, block_n):
        self.e = e
        self.row = row
        self.end = end
        self.block_n = block_n


@aggregate
class Queue:
    """Where the scheduler hands tiles over; see the table of barriers above.

    Attributes:
        numbers: int32 ``[4 · slots, 1]``: the four numbers of the `Tile` in each slot.
        known: Barriers ``[slots, 1]``.
        taken: Barriers ``[slots, 1]``.
        wanted: Barrier ``[1, 1]``.
    """

    numbers: gl.shared_memory_descriptor
    known: gl.shared_memory_descriptor
    taken: gl.shared_memory_descriptor
    wanted: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, numbers, known, taken, wanted):
        self.numbers = numbers
        self.known = known
        self.taken = taken
        self.wanted = wanted


@aggregate
class Ring:
    """The stages of operands on their way from the loader to the consumers; see the table of barriers above.

    Attributes:
        rows: ``[2 · STAGES, 64, BLOCK_K]``: rows 0 to 63 and 64 to 127 of a tile.
        tails: ``[STAGES, TAIL_M, BLOCK_K]``: its rows from 128 on.
        weights: ``[2 · STAGES, 128, BLOCK_K]``: rows of gate and of up, or the first and the second 128 of down.
        full: Barriers ``[STAGES, 1]``.
        empty: Barriers ``[STAGES, 1]``.
        STAGES: Their number.
    """

    rows: gl.shared_memory_descriptor
    tails: gl.shared_memory_descriptor
    weights: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, rows, tails, weights, full, empty, STAGES):
        self.rows = rows
        self.tails = tails
        self.weights = weights
        self.full = full
        self.empty = empty
        self.STAGES = gl.constexpr(STAGES)


@aggregate
class TileStrides:
    """How the tiles of all experts lie in the rows of their weights, or with INTERLEAVED in pairs of rows.

    Attributes:
        expert: Rows (pairs) of an expert's weights.
        second: Rows (pairs) from the first half of a tile's weights to the second half.
        tile: Rows (pairs) from one tile to the next.
        depth: Blocks of BLOCK_K columns, which are summed over.
        INTERLEAVED: Whether the weights' descriptor sees pairs of a gate row and an up row.
        TRANSPOSED: Whether the weights are stored by columns, and rows are counted within an expert.
    """

    expert: gl.tensor | gl.constexpr
    second: gl.tensor | gl.constexpr
    tile: gl.tensor | gl.constexpr
    depth: gl.tensor | gl.constexpr
    INTERLEAVED: gl.constexpr
    TRANSPOSED: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, expert, second, tile, depth, INTERLEAVED, TRANSPOSED):
        self.expert = field(expert)
        self.second = field(second)
        self.tile = field(tile)
        self.depth = field(depth)
        self.INTERLEAVED = gl.constexpr(INTERLEAVED)
        self.TRANSPOSED = gl.constexpr(TRANSPOSED)


@gluon.jit
def make_barriers(STAGES: gl.constexpr, LOADER_WARPS: gl.constexpr, COPIES: gl.constexpr):
    """Allocate the queue and a ring's barriers, and initialise all barriers: queue, full, empty.

    Where the loader COPIES, each of its threads arrives at a stage when its own copies have.
    """
    LOADER: gl.constexpr = LOADER_WARPS * 32  # threads
    LAYOUT: gl.constexpr = mbarrier.MBarrierLayout()
    numbers = gl.allocate_shared_memory(gl.int32, [4 * _QUEUE_SLOTS, 1], LAYOUT)
    known = gl.allocate_shared_memory(gl.int64, [_QUEUE_SLOTS, 1], LAYOUT)
    taken = gl.allocate_shared_memory(gl.int64, [_QUEUE_SLOTS, 1], LAYOUT)
    wanted = gl.allocate_shared_memory(gl.int64, [1, 1], LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    for i in gl.static_range(_QUEUE_SLOTS):
        mbarrier.init(known.index(i), count=1 + 32)
        mbarrier.init(taken.index(i), count=3 + 2 * 128 + LOADER)
    mbarrier.init(wanted.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + (LOADER if COPIES else 0))
        mbarrier.init(empty.index(i), count=2)
    return Queue(numbers, known, taken, wanted), full, empty


@gluon.jit
def schedule_tiles(queue, blocks_ptr, counts_ptr, n_blocks, COUNTER: gl.constexpr):
    """The scheduler: publishes this program's tiles as they are wanted, and at last a tile whose end is 0.

    The tiles of a group run over its row blocks first and then over columns: those that are computed at the same time
    share an expert's weights in the L2 cache, and few rows.
    """
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
        mbarrier.wait(queue.wanted.index(0), i & 1)
        i += 1
        tile = gl.num_programs(0) + gl.atomic_add(counts_ptr + COUNTER, 1)
    _publish_tile(queue, i, 0, 0, 0, 0)


@gluon.jit
def _publish_tile(queue, i, e, row, end, block_n):
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    slot = i % _QUEUE_SLOTS
    mbarrier.wait(queue.taken.index(slot), (i // _QUEUE_SLOTS & 1) ^ 1)
    queue.numbers.index(slot * 4).store(gl.full([1], e, gl.int32, ONE))
    queue.numbers.index(slot * 4 + 1).store(gl.full([1], row, gl.int32, ONE))
    queue.numbers.index(slot * 4 + 2).store(gl.full([1], end, gl.int32, ONE))
    queue.numbers.index(slot * 4 + 3).store(gl.full([1], block_n, gl.int32, ONE))
    arrive(queue.known.index(slot))


@gluon.jit
def receive_tile(queue, i):
    """Tile number `i` of this program."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    slot = i % _QUEUE_SLOTS
    mbarrier.wait(queue.known.index(slot), i // _QUEUE_SLOTS & 1)
    e = gl.max(queue.numbers.index(slot * 4).load(ONE), 0)
    row = gl.max(queue.numbers.index(slot * 4 + 1).load(ONE), 0)
    end = gl.max(queue.numbers.index(slot * 4 + 2).load(ONE), 0)
    block_n = gl.max(queue.numbers.index(slot * 4 + 3).load(ONE), 0)
    arrive(queue.taken.index(slot))
    return Tile(e, row, end, block_n)


@gluon.jit
def arrive(bar):
    """Arrive once for all threads, when they are here, and with each of them.

    The first arrival suffices. But racecheck takes a thread's accesses for unordered where only another thread arrives.
    """
    mbarrier.arrive(bar)
    async_copy.mbarrier_arrive(bar, increment_count=False)


@gluon.jit
def free_stage(queue, ring, k, depth, step):
    """The stage for block `k` of a tile's depth, once its consumers have left it, and its barrier.

    Near the tile's end the next tile is asked for. Had it been taken earlier, a program that falls behind would keep
    what others could do.
    """
    if k == gl.maximum(depth - _LEAD_STAGES, 0):
        mbarrier.arrive(queue.wanted.index(0))
    stage = step % ring.STAGES
    mbarrier.wait(ring.empty.index(stage), (step // ring.STAGES & 1) ^ 1)
    return stage, ring.full.index(stage)


@gluon.jit
def load_stage_weights(operands, ring, stage, bar, tile, w_row, column):
    """Have TMA copy twice 128 rows of weights of a stage, whose barrier expects its rows as well."""
    lower = tile.end - tile.row > 64
    tail = tile.end - tile.row > 128
    mbarrier.expect(bar, (256 + 64) * _STAGE_BYTES, pred=not lower)
    mbarrier.expect(bar, (256 + 128) * _STAGE_BYTES, pred=lower & (not tail))
    mbarrier.expect(bar, (256 + 128 + ring.tails.shape[1]) * _STAGE_BYTES, pred=tail)
    load_weights(operands, ring, stage, bar, tile, w_row, column)


@gluon.jit
def load_stage_rows(operands, ring, stage, bar, tile, column):
    """Have TMA copy the rest of a stage: a tile's rows, as far as it has more than 64 and 128."""
    lower = tile.end - tile.row > 64
    tail = tile.end - tile.row > 128
    load_rows(operands.rows, ring.rows.index(2 * stage), bar, tile.row, tile.end, column, True)
    load_rows(operands.rows, ring.rows.index(2 * stage + 1), bar, tile.row + 64, tile.end, column, lower)
    load_rows(operands.tails, ring.tails.index(stage), bar, tile.row + 128, tile.end, column, tail)


@gluon.jit
def load_rows(desc, buf, bar, row, end, column, pred):
    """Load as many rows as `buf` has. Rows from `end` on are not read and become zeros, which cost little power.

    `desc` sees memory as overlapping windows of 64 rows, see `windows.Windows`. Rows come from the window
    that ends at `end`, or 64 rows on.
    """
    window = gl.minimum(row + 64, end)
    view = reinterpret(buf, buf.dtype, desc.block_type.shape, desc.layout)
    tma_load(desc, [window, row + 64 - window, column], bar, view, pred=pred)


@gluon.jit
def load_weights(operands, ring, stage, bar, tile, w_row, column):
    """Have TMA copy a stage's weights alone."""
    _load_half(operands, ring.weights.index(2 * stage), bar, tile.e, w_row, column)
    _load_half(operands, ring.weights.index(2 * stage + 1), bar, tile.e, w_row + operands.strides.second, column)


@gluon.jit
def _load_half(operands, buf, bar, e, w_row, column):
    """Load 128 rows of weights, or with INTERLEAVED the gate rows of 64 pairs and then their up rows.

    Where TRANSPOSED, each half of `buf` becomes the columns of 64 rows, one after the other.
    """
    desc = operands.weights
    if operands.strides.TRANSPOSED:
        views = reinterpret(buf, buf.dtype, [2, 1, 64, buf.shape[1]], desc.layout)
        tma_load(desc, [e, column, w_row], bar, views.index(0))
        tma_load(desc, [e, column, w_row + 64], bar, views.index(1))
    elif operands.strides.INTERLEAVED:
        view = reinterpret(buf, buf.dtype, desc.block_type.shape, desc.layout)
        tma_load(desc, [0, w_row, column], bar, view)
    else:
        tma_load(desc, [w_row, column], bar, buf)


@gluon.jit
def add_biases(
    sums, outputs, tile, AXIS: gl.constexpr, FIRST: gl.constexpr, CONSUMER: gl.constexpr, ACTIVATION: gl.constexpr
):  # fmt: skip
    """Sums with the biases of the rows of weights along their AXIS, FIRST and following of a stage's 256 rows.

    They pass through the buffer for results: a thread adds up to 64 of them, whose addresses would cost registers.
    """
    if outputs.biases is not None:
        COUNT: gl.constexpr = sums.shape[AXIS]
        row = FIRST + gl.arange(0, COUNT, gl.BlockedLayout([1], [32], [4], [0]))
        PARTS: gl.constexpr = 1 if ACTIVATION is None else 2
        if ACTIVATION is None:
            column = tile.block_n * 256 + row
            part = 0
        elif outputs.ALTERNATING:
            column = tile.block_n * 128 + row // 2
            part = row % 2
        elif outputs.INTERLEAVED:
            column = tile.block_n * 128 + row // 128 * 64 + row % 64
            part = row // 64 % 2
        else:
            column = tile.block_n * 128 + row % 128
            part = row // 128
        N = outputs.columns
        biases = outputs.biases + tile.e * PARTS * N
        bias = moe_gate_up_bias(biases, column, part, N, column < N, PARTS, outputs.INTERLEAVED)
        bufs = outputs.bufs
        ROWS: gl.constexpr = bufs.shape[1] * bufs.shape[2] * bufs.dtype.primitive_bitwidth // 32 // COUNT
        buf = reinterpret(bufs.index(CONSUMER), gl.float32, [ROWS, COUNT], PLAIN).index(0)
        buf.store(bias)
        bias = buf.load(gl.SliceLayout(1 - AXIS, sums.type.layout))
        sums += gl.expand_dims(bias, 1 - AXIS)
    return sums


@gluon.jit
def store_tile(values, ROWS: gl.constexpr, outputs, CONSUMER: gl.constexpr, row, end, column):
    """Store ``[rows, columns]``, or where ROWS, the axis of rows, is 1 ``[columns, rows]``, through shared memory.

    As many columns at a time as `outputs.bufs` has, so that whole cache lines are written. Rows from `end` on are not
    stored.
    """
    bufs = outputs.bufs
    WIDTH: gl.constexpr = values.shape[1 - ROWS]
    if bufs.shape[2] < WIDTH:
        left, right = gl.split(gl.permute(gl.reshape(values, [64, 2, WIDTH // 2]), [0, 2, 1]))
        store_tile(left, ROWS, outputs, CONSUMER, row, end, column)
        store_tile(right, ROWS, outputs, CONSUMER, row, end, column + WIDTH // 2)
    else:
        HEIGHT: gl.constexpr = values.shape[ROWS]
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HEIGHT, WIDTH], bufs.dtype)
        # The consumer's buffer is as many views of this shape.
        VIEWS: gl.constexpr = bufs.shape[1] * bufs.shape[2] // (HEIGHT * WIDTH)
        view = reinterpret(bufs.index(CONSUMER), bufs.dtype, [VIEWS, HEIGHT, WIDTH], LAYOUT).index(0)
        if ROWS == 1:
            view.permute((1, 0)).store(values.to(bufs.dtype))
        else:
            view.store(values.to(bufs.dtype))
        _store_lines(view, outputs, row, end, column)


@gluon.jit
def _store_lines(buf, outputs, row, end, column):
    WIDTH: gl.constexpr = buf.shape[1]
    VECTOR: gl.constexpr = 128 // buf.dtype.primitive_bitwidth
    LINES: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 * VECTOR // WIDTH, WIDTH // VECTOR], [4, 1], [1, 0])
    offs_m = row + gl.arange(0, buf.shape[0], gl.SliceLayout(1, LINES))
    offs_n = column + gl.arange(0, WIDTH, gl.SliceLayout(0, LINES))
    ptrs = outputs.ptr + offs_m.to(gl.int64)[:, None] * outputs.columns + offs_n[None, :]
    gl.store(ptrs, buf.load(LINES), mask=(offs_m < end)[:, None] & (offs_n < outputs.columns)[None, :])
