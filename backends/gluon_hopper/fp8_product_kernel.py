# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The two grouped products in block FP8 for Hopper, in Gluon; `common` describes roles, barriers and stages.

A tile takes up to 144 rows: an expert that has a few rows more than 128 does not need its weights twice. The tensor
core sums 128 products; that partial sum is scaled and added in fp32. While one consumer does that, the other one
multiplies.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from moe_dispatch.backends.gluon_hopper import tiles
from moe_dispatch.backends.gluon_hopper.common import (
    PLAIN,
    Ring,
    TileStrides,
    add_biases,
    make_barriers,
    receive_tile,
    schedule_tiles,
    store_tile,
)
from moe_dispatch.backends.gluon_hopper.fp8_product_loader import Fp8Operands, ScaleRing, load_fp8_tiles
from moe_dispatch.backends.gluon_hopper.gluon_api import aggregate, field, reinterpret
from moe_dispatch.backends.triton_common.device import moe_activate, moe_fp8_amax
from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.numerics import FP8_MAX, SMALLEST_AMAX

_FP8_MAX = gl.constexpr(FP8_MAX)
_SMALLEST_AMAX = gl.constexpr(SMALLEST_AMAX)
_BLOCK_K = gl.constexpr(128)
_TAIL_M = gl.constexpr(tiles.FP8_TAIL_M)
_STAGGER_STAGES = gl.constexpr(tiles.STAGGER_STAGES)
_LOADER_WARPS = gl.constexpr(2)
# One binary for all layers: none of these is worth a specialisation.
_SHAPES = (
    "a_scale_row", "a_scale_column", "out_scale_row", "out_scale_column", "n_blocks", "w_rows", "w_second", "w_step",
    "depth",
)  # fmt: skip


@aggregate
class Fp8Outputs:
    """Where results go.

    Attributes:
        ptr: Pointer to the result, row-major: FP8 codes after an activation, else BF16 or FP16.
        scales: Pointer to its multipliers; None without an activation.
        scale_row: Elements from the multiplier of one row to that of the next.
        scale_column: Elements from the multipliers of one block of columns to those of the next.
        biases: Pointer to the biases of all experts' rows of weights; None without.
        columns: Columns of the result.
        bufs: Shared memory ``[2, 64, 128 bytes]`` through which each consumer stores.
        amax_bufs: Shared memory, fp32 ``[4, 64]``: two pairs of maxima that the consumers exchange.
        exchange: Barrier of that exchange.
        INTERLEAVED: Whether gate and up rows of the weights, and of their biases, alternate.
        ALTERNATING: False: in a stage they do not.
    """

    ptr: gl.tensor
    scales: gl.tensor | gl.constexpr
    scale_row: gl.tensor
    scale_column: gl.tensor
    biases: gl.tensor | gl.constexpr
    columns: gl.tensor | gl.constexpr
    bufs: gl.shared_memory_descriptor
    amax_bufs: gl.shared_memory_descriptor
    exchange: gl.shared_memory_descriptor
    INTERLEAVED: gl.constexpr
    ALTERNATING: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, ptr, scales, scale_row, scale_column, biases, columns, bufs, amax_bufs, exchange, INTERLEAVED
    ):  # fmt: skip
        self.ptr = ptr
        self.scales = field(scales)
        self.scale_row = scale_row
        self.scale_column = scale_column
        self.biases = field(biases)
        self.columns = field(columns)
        self.bufs = bufs
        self.amax_bufs = amax_bufs
        self.exchange = exchange
        self.INTERLEAVED = gl.constexpr(INTERLEAVED)
        self.ALTERNATING = gl.constexpr(False)


@fast_launch
@gluon.jit(do_not_specialize=_SHAPES)
def _moe_hopper_fp8_product_kernel(
    # inputs
    a_desc,
    tail_desc,
    a_scale_ptr,
    a_scale_row,
    a_scale_column,
    w_desc,
    w_scale_ptr,
    bias_ptr,
    blocks_ptr,
    counts_ptr,
    # outputs
    out_ptr,
    out_scale_ptr,
    out_scale_row,
    out_scale_column,
    # shapes
    n_blocks,
    w_rows,
    w_second,
    w_step,
    depth,
    columns,
    # constants
    COUNTER: gl.constexpr,
    ACTIVATION: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Rows are in the order of experts; their descriptors take 64 of them and what a tail has.

    With INTERLEAVED `w_desc` sees pairs of rows, see `windows.ExpertRows`.
    """
    FP8: gl.constexpr = w_desc.dtype
    OUT: gl.constexpr = out_ptr.dtype.element_ty
    OUT_COLUMNS: gl.constexpr = 1024 // OUT.primitive_bitwidth
    A_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, _BLOCK_K], FP8)
    OUT_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, OUT_COLUMNS], OUT)
    rows = gl.allocate_shared_memory(FP8, [2 * STAGES, 64, _BLOCK_K], A_LAYOUT)
    tails = gl.allocate_shared_memory(FP8, [STAGES, _TAIL_M, _BLOCK_K], A_LAYOUT)
    weights = gl.allocate_shared_memory(FP8, [2 * STAGES, 128, _BLOCK_K], A_LAYOUT)
    scales = ScaleRing(
        gl.allocate_shared_memory(gl.float32, [2 * STAGES, 64], PLAIN),
        gl.allocate_shared_memory(gl.float32, [STAGES, _TAIL_M], PLAIN),
        gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1], PLAIN),
    )
    out_bufs = gl.allocate_shared_memory(OUT, [2, 64, OUT_COLUMNS], OUT_LAYOUT)
    amax_bufs = gl.allocate_shared_memory(gl.float32, [4, 64], PLAIN)
    exchange = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(exchange, count=2)
    queue, full, empty = make_barriers(STAGES, _LOADER_WARPS, True)
    ring = Ring(rows, tails, weights, full, empty, STAGES)
    strides = TileStrides(w_rows, w_second, w_step, depth, INTERLEAVED, False)
    operands = Fp8Operands(
        a_desc, tail_desc, a_scale_ptr, a_scale_row, a_scale_column, w_desc, w_scale_ptr, strides
    )  # fmt: skip
    outputs = Fp8Outputs(
        out_ptr, out_scale_ptr, out_scale_row, out_scale_column, bias_ptr, columns, out_bufs, amax_bufs, exchange,
        INTERLEAVED,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_consume, (queue, ring, scales, outputs, depth, 0, ACTIVATION)),
            (_consume, (queue, ring, scales, outputs, depth, 1, ACTIVATION)),
            (load_fp8_tiles, (queue, ring, scales, operands)),
            (schedule_tiles, (queue, blocks_ptr, counts_ptr, n_blocks, COUNTER)),
        ],
        [4, _LOADER_WARPS, 1],
        [240, 24, 24],
    )


@gluon.jit
def _consume(queue, ring, scales, outputs, depth, CONSUMER: gl.constexpr, ACTIVATION: gl.constexpr):
    """One of the two consumers, CONSUMER 0 or 1."""
    i = 0
    # Without a sign, a step's stage takes fewer instructions. With biases no register is left for what that keeps.
    step = gl.full([], 0, gl.uint32) if outputs.biases is None else 0
    exchanges = 0
    tile = receive_tile(queue, i)
    if CONSUMER == 1:
        # One consumer starts later than the other, so that their epilogues do not leave the tensor core idle together.
        mbarrier.wait(ring.full.index(_STAGGER_STAGES), 0, pred=(tile.end > 0) & (depth > _STAGGER_STAGES))
    while tile.end > 0:
        if tile.end - tile.row > 128:
            _run_tile(ring, scales, outputs, tile, step, depth, exchanges, 128 + _TAIL_M, CONSUMER, ACTIVATION)
            exchanges += 1
        elif tile.end - tile.row > 64:
            _run_tile(ring, scales, outputs, tile, step, depth, exchanges, 128, CONSUMER, ACTIVATION)
        else:
            _run_tile(ring, scales, outputs, tile, step, depth, exchanges, 64, CONSUMER, ACTIVATION)
            exchanges += 1
        step += depth
        i += 1
        tile = receive_tile(queue, i)


@gluon.jit
def _run_tile(
    ring, scales, outputs, tile, step, depth, exchanges,
    HEIGHT: gl.constexpr, CONSUMER: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """A tile of up to HEIGHT rows.

    Of 128 rows each consumer multiplies 64 by all weights. Up to 64 rows both multiply by half of the weights, 64 of
    each 128. What is left over beyond 128 rows is multiplied likewise, but transposed: weights fill the tensor core's
    side of 64, few rows its other side. `exchanges` counts the tiles before this one of which no consumer had whole
    rows.
    """
    STAGES: gl.constexpr = ring.STAGES
    TAIL: gl.constexpr = HEIGHT > 128
    WIDTH: gl.constexpr = 128 if HEIGHT >= 128 else 64
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    W_LAYOUT: gl.constexpr = ring.weights.layout
    w_parts = reinterpret(ring.weights, ring.weights.dtype, [256 // WIDTH * STAGES, WIDTH, _BLOCK_K], W_LAYOUT)
    w_halves = reinterpret(ring.weights, ring.weights.dtype, [4 * STAGES, 64, _BLOCK_K], W_LAYOUT)
    # Of a stage: which quarters of the weights this consumer multiplies where both multiply all rows, which 64 rows and
    # which parts of the weights it multiplies here, and which blocks of scales these are in.
    QUARTER: gl.constexpr = 2 * CONSUMER if outputs.INTERLEAVED else CONSUMER
    OTHER: gl.constexpr = QUARTER + (1 if outputs.INTERLEAVED else 2)
    ROWS: gl.constexpr = CONSUMER if WIDTH == 128 else 0
    FIRST: gl.constexpr = 0 if WIDTH == 128 else QUARTER
    SECOND: gl.constexpr = 1 if WIDTH == 128 else OTHER
    FIRST_SCALE: gl.constexpr = FIRST * WIDTH // 128
    SECOND_SCALE: gl.constexpr = SECOND * WIDTH // 128
    first = add_biases(gl.zeros([64, WIDTH], gl.float32, MMA), outputs, tile, 1, WIDTH * FIRST, CONSUMER, ACTIVATION)
    second = add_biases(gl.zeros([64, WIDTH], gl.float32, MMA), outputs, tile, 1, WIDTH * SECOND, CONSUMER, ACTIVATION)
    partial = gl.zeros([64, WIDTH], gl.float32, MMA)
    if TAIL:
        TAIL_MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TAIL_M, 32])
        tail_first = gl.zeros([64, _TAIL_M], gl.float32, TAIL_MMA)
        tail_first = add_biases(tail_first, outputs, tile, 0, 64 * QUARTER, CONSUMER, ACTIVATION)
        tail_second = gl.zeros([64, _TAIL_M], gl.float32, TAIL_MMA)
        tail_second = add_biases(tail_second, outputs, tile, 0, 64 * OTHER, CONSUMER, ACTIVATION)
        partial_first = gl.zeros([64, _TAIL_M], gl.float32, TAIL_MMA)
        partial_second = gl.zeros([64, _TAIL_M], gl.float32, TAIL_MMA)
    for _k in range(depth):
        stage = (step % STAGES).to(gl.int32)
        mbarrier.wait(ring.full.index(stage), (step // STAGES & 1).to(gl.int32))
        # A sum passes through a wait so that it is finished before its registers' next product starts: the compiler
        # would take others, and has none.
        x = ring.rows.index(2 * stage + ROWS)
        partial = _start(x, w_parts.index(256 // WIDTH * stage + FIRST), partial)
        row_scale = scales.rows.index(2 * stage + ROWS).load(gl.SliceLayout(1, MMA))
        first_scale = gl.max(scales.weights.index(2 * stage + FIRST_SCALE).load(ONE), 0)
        second_scale = gl.max(scales.weights.index(2 * stage + SECOND_SCALE).load(ONE), 0)
        partial = warpgroup_mma_wait(0, deps=(partial,))
        first += partial * (row_scale * first_scale)[:, None]
        first, partial = warpgroup_mma_wait(0, deps=(first, partial))
        partial = _start(x, w_parts.index(256 // WIDTH * stage + SECOND), partial)
        partial = warpgroup_mma_wait(0, deps=(partial,))
        if TAIL:
            second += partial * (row_scale * second_scale)[:, None]
            second, partial_first, partial_second = warpgroup_mma_wait(
                0, deps=(second, partial_first, partial_second)
            )  # fmt: skip
            tail = ring.tails.index(stage)
            partial_first = _start(w_halves.index(4 * stage + QUARTER), tail, partial_first)
            partial_second = _start(w_halves.index(4 * stage + OTHER), tail, partial_second)
            tail_scale = scales.tails.index(stage).load(gl.SliceLayout(0, TAIL_MMA))
            partial_first, partial_second = warpgroup_mma_wait(0, deps=(partial_first, partial_second))
            mbarrier.arrive(ring.empty.index(stage))
            tail_first += partial_first * (tail_scale * (first_scale if QUARTER < 2 else second_scale))[None, :]
            tail_second += partial_second * (tail_scale * (first_scale if OTHER < 2 else second_scale))[None, :]
        else:
            mbarrier.arrive(ring.empty.index(stage))
            second += partial * (row_scale * second_scale)[:, None]
        step += 1
    if WIDTH == 128 and outputs.INTERLEAVED:
        # Each has 64 columns of gate and as many of up.
        turns = gl.reshape(gl.join(first, second), [64, 2, 64, 2])
        first, second = gl.split(gl.permute(turns, [0, 3, 2, 1]))
        first = gl.reshape(first, [64, 128])
        second = gl.reshape(second, [64, 128])
    if WIDTH == 128:
        _finish(first, second, 0, outputs, tile, tile.row + 64 * CONSUMER, 0, exchanges, CONSUMER, ACTIVATION)
    else:
        _finish(first, second, 0, outputs, tile, tile.row, 64 * CONSUMER, exchanges, CONSUMER, ACTIVATION)
    if TAIL:
        column = 64 * CONSUMER
        _finish(tail_first, tail_second, 1, outputs, tile, tile.row + 128, column, exchanges, CONSUMER, ACTIVATION)


@gluon.jit
def _start(x, w, registers):
    """Start x @ wᵀ over one block of what is summed over; `registers` is what may be overwritten."""
    return warpgroup_mma(x, w.permute((1, 0)), registers, use_acc=False, is_async=True)


@gluon.jit
def _finish(
    first, second, ROWS: gl.constexpr, outputs, tile, row, column, exchanges,
    CONSUMER: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Store the products with 128 rows of a tile's weights and with the other 128, or of gate and up the activation.

    They are ``[64 rows, 128 or 64 columns]``, or where ROWS, the axis of rows, is 1 ``[64 columns, 16 rows]``. `row` is
    the first of them, `column` the first of 128.
    """
    COLUMNS: gl.constexpr = 1 - ROWS
    block_n = tile.block_n
    if ACTIVATION is None:
        store_tile(first, ROWS, outputs, CONSUMER, row, tile.end, block_n * 256 + column)
        store_tile(second, ROWS, outputs, CONSUMER, row, tile.end, block_n * 256 + 128 + column)
    else:
        out = moe_activate(first, second, ACTIVATION)
        amax = moe_fp8_amax(out, COLUMNS)
        if out.shape[COLUMNS] == 64:
            amax = _greater(amax, outputs, exchanges, CONSUMER)
        offs_m = row + gl.arange(0, out.shape[ROWS], gl.SliceLayout(COLUMNS, out.type.layout))
        scale_offs = offs_m.to(gl.int64) * outputs.scale_row
        scale_ptrs = outputs.scales + scale_offs + block_n.to(gl.int64) * outputs.scale_column
        scale = _scale(amax)
        gl.store(scale_ptrs, scale, mask=offs_m < tile.end)
        out *= gl.expand_dims(1.0 / scale, COLUMNS)
        store_tile(out, ROWS, outputs, CONSUMER, row, tile.end, block_n * 128 + column)


@gluon.jit
def _scale(amax):
    """Multipliers. Conversions saturate, so that what is rounded up past the greatest code stays that code."""
    amax = gl.where(amax < _SMALLEST_AMAX, _SMALLEST_AMAX, amax)
    return tl.div_rn(amax, gl.full_like(amax, _FP8_MAX))


@gluon.jit
def _greater(amax, outputs, exchanges, CONSUMER: gl.constexpr):
    """The greater of both consumers' `amax`.

    Two pairs of buffers take turns: a consumer that comes to the next exchange has read what the last one left.
    """
    pair = exchanges % 2 * 2
    outputs.amax_bufs.index(pair + CONSUMER).slice(0, amax.shape[0]).store(amax)
    mbarrier.arrive(outputs.exchange)
    mbarrier.wait(outputs.exchange, exchanges & 1)
    other = outputs.amax_bufs.index(pair + 1 - CONSUMER).slice(0, amax.shape[0]).load(amax.type.layout)
    # As integers, magnitudes keep their order, and NaN is the greatest.
    greater = gl.maximum(other.to(gl.int32, bitcast=True), amax.to(gl.int32, bitcast=True))
    return greater.to(gl.float32, bitcast=True)
