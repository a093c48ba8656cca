# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The two grouped products in block FP8 for Hopper, in Gluon; see `hopper_common` and `hopper_fp8_loader`.

A tile is up to 144 rows of one expert and twice 128 rows of its weights: gate and up, or two of down. So an expert that
has a few rows more than 128 does not need its weights twice. The tensor core adds up 128 products; what it found is
scaled and added in fp32. While one consumer does that, the other one multiplies.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from moe_dispatch.backends.gluon_hopper.common import make_barriers, receive_tile, schedule_tiles, store_tile
from moe_dispatch.backends.gluon_hopper.fp8_product_loader import load_fp8_tiles
from moe_dispatch.backends.triton_common.device import moe_activate, moe_fp8_amax
from moe_dispatch.numerics import FP8_MAX, SMALLEST_AMAX

_FP8_MAX = gl.constexpr(FP8_MAX)
_SMALLEST_AMAX = gl.constexpr(SMALLEST_AMAX)
_BLOCK_K = gl.constexpr(128)
# Left-over rows that a tile of 128 rows takes too.
_TAIL_M = gl.constexpr(16)
# Stages that the second consumer starts after the first.
_STAGGER = gl.constexpr(2)
_PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
# One binary for all layers: none of these is worth a specialisation.
_SHAPES = (
    "a_scale_row", "a_scale_column", "out_scale_row", "out_scale_column", "n_blocks", "w_rows", "w_second", "w_step",
    "depth",
)  # fmt: skip


@gluon.jit(do_not_specialize=_SHAPES)
def _moe_hopper_fp8_kernel(
    # inputs
    a_desc,
    tail_desc,
    a_scale_ptr,
    a_scale_row,
    a_scale_column,
    w_desc,
    w_scale_ptr,
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
    STAGES: gl.constexpr,
):
    """Rows are in the order of experts; their descriptors take 64 of them and what a tail has."""
    FP8: gl.constexpr = w_desc.dtype
    OUT: gl.constexpr = out_ptr.dtype.element_ty
    OUT_COLUMNS: gl.constexpr = 1024 // OUT.primitive_bitwidth
    A_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, _BLOCK_K], FP8)
    OUT_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, OUT_COLUMNS], OUT)
    bufs = (
        gl.allocate_shared_memory(FP8, [2 * STAGES, 64, _BLOCK_K], A_LAYOUT),
        gl.allocate_shared_memory(FP8, [STAGES, _TAIL_M, _BLOCK_K], A_LAYOUT),
        gl.allocate_shared_memory(FP8, [2 * STAGES, 128, _BLOCK_K], w_desc.layout),
        gl.allocate_shared_memory(gl.float32, [2 * STAGES, 64], _PLAIN),
        gl.allocate_shared_memory(gl.float32, [STAGES, _TAIL_M], _PLAIN),
        gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1], _PLAIN),
    )
    out_bufs = gl.allocate_shared_memory(OUT, [2, 64, OUT_COLUMNS], OUT_LAYOUT)
    amax_bufs = gl.allocate_shared_memory(gl.float32, [4, 64], _PLAIN)
    amax_known = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(amax_known, count=2)
    queue, ring = make_barriers(STAGES, True)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    inputs = a_desc, tail_desc, a_scale_ptr, a_scale_row, a_scale_column, w_desc, w_scale_ptr
    exchange = amax_bufs, amax_known
    outputs = out_ptr, out_scale_ptr, out_scale_row, out_scale_column, columns
    shapes = w_rows, w_second, w_step, depth
    gl.warp_specialize(
        [
            (_consume, (queue, ring, bufs, out_bufs, exchange, outputs, depth, 0, ACTIVATION, STAGES)),
            (_consume, (queue, ring, bufs, out_bufs, exchange, outputs, depth, 1, ACTIVATION, STAGES)),
            (load_fp8_tiles, (queue, ring, inputs, bufs, shapes, STAGES)),
            (schedule_tiles, (queue, blocks_ptr, counts_ptr, n_blocks, COUNTER)),
        ],
        [4, 2, 1],
        [240, 24, 24],
    )  # fmt: skip


@gluon.jit
def _consume(
    queue, ring, bufs, out_bufs, exchange, outputs, depth,
    CONSUMER: gl.constexpr, ACTIVATION: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One of the two consumers, CONSUMER 0 or 1."""
    full, _empty = ring
    i = 0
    step = 0
    exchanges = 0
    _e, row, end, block_n = receive_tile(queue, i)
    if CONSUMER == 1:
        # One consumer starts later than the other, so that their epilogues do not leave the tensor core idle together.
        mbarrier.wait(full.index(_STAGGER), 0, pred=(end > 0) & (depth > _STAGGER))
    while end > 0:
        if end - row > 128:
            _run_tile(
                ring, bufs, out_bufs, exchange, outputs, row, end, block_n, step, depth, exchanges,
                128 + _TAIL_M, CONSUMER, ACTIVATION, STAGES,
            )  # fmt: skip
            exchanges += 1
        elif end - row > 64:
            _run_tile(
                ring, bufs, out_bufs, exchange, outputs, row, end, block_n, step, depth, exchanges,
                128, CONSUMER, ACTIVATION, STAGES,
            )  # fmt: skip
        else:
            _run_tile(
                ring, bufs, out_bufs, exchange, outputs, row, end, block_n, step, depth, exchanges,
                64, CONSUMER, ACTIVATION, STAGES,
            )  # fmt: skip
            exchanges += 1
        step += depth
        i += 1
        _e, row, end, block_n = receive_tile(queue, i)


@gluon.jit
def _run_tile(
    ring, bufs, out_bufs, exchange, outputs, row, end, block_n, step, depth, exchanges,
    HEIGHT: gl.constexpr, CONSUMER: gl.constexpr, ACTIVATION: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A tile of up to HEIGHT rows.

    Of 128 rows each consumer multiplies 64 by all weights. Up to 64 rows both multiply by half of the weights, 64 of
    each 128. What is left over beyond 128 rows is multiplied likewise, but transposed: weights fill the tensor core's
    side of 64, few rows its other side. `exchanges` counts the tiles before this one of which no consumer had whole
    rows.
    """
    full, empty = ring
    a_bufs, tail_bufs, w_bufs, a_scale_bufs, tail_scale_bufs, w_scale_bufs = bufs
    TAIL: gl.constexpr = HEIGHT > 128
    WIDTH: gl.constexpr = 128 if HEIGHT >= 128 else 64
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    w_parts = w_bufs._reinterpret(w_bufs.dtype, [256 // WIDTH * STAGES, WIDTH, _BLOCK_K], w_bufs.type.layout)
    w_halves = w_bufs._reinterpret(w_bufs.dtype, [4 * STAGES, 64, _BLOCK_K], w_bufs.type.layout)
    # Of a stage: which 64 rows, and which parts of the weights.
    ROWS: gl.constexpr = CONSUMER if WIDTH == 128 else 0
    FIRST: gl.constexpr = 0 if WIDTH == 128 else CONSUMER
    SECOND: gl.constexpr = FIRST + 128 // WIDTH
    first = gl.zeros([64, WIDTH], gl.float32, MMA)
    second = gl.zeros([64, WIDTH], gl.float32, MMA)
    found = gl.zeros([64, WIDTH], gl.float32, MMA)
    if TAIL:
        TAIL_MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TAIL_M, 32])
        tail_first = gl.zeros([64, _TAIL_M], gl.float32, TAIL_MMA)
        tail_second = gl.zeros([64, _TAIL_M], gl.float32, TAIL_MMA)
        found_first = gl.zeros([64, _TAIL_M], gl.float32, TAIL_MMA)
        found_second = gl.zeros([64, _TAIL_M], gl.float32, TAIL_MMA)
    for _k in range(depth):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        # A sum passes through a wait so that it is finished before its registers' next product starts: the compiler
        # would take others, and has none.
        x = a_bufs.index(2 * stage + ROWS)
        found = _start(x, w_parts.index(256 // WIDTH * stage + FIRST), found)
        a_scale = a_scale_bufs.index(2 * stage + ROWS).load(gl.SliceLayout(1, MMA))
        first_scale = gl.max(w_scale_bufs.index(2 * stage).load(ONE), 0)
        second_scale = gl.max(w_scale_bufs.index(2 * stage + 1).load(ONE), 0)
        found = warpgroup_mma_wait(0, deps=(found,))
        first += found * (a_scale * first_scale)[:, None]
        first, found = warpgroup_mma_wait(0, deps=(first, found))
        found = _start(x, w_parts.index(256 // WIDTH * stage + SECOND), found)
        found = warpgroup_mma_wait(0, deps=(found,))
        if TAIL:
            second += found * (a_scale * second_scale)[:, None]
            second, found_first, found_second = warpgroup_mma_wait(0, deps=(second, found_first, found_second))
            found_first = _start(w_halves.index(4 * stage + CONSUMER), tail_bufs.index(stage), found_first)
            found_second = _start(w_halves.index(4 * stage + 2 + CONSUMER), tail_bufs.index(stage), found_second)
            tail_scale = tail_scale_bufs.index(stage).load(gl.SliceLayout(0, TAIL_MMA))
            found_first, found_second = warpgroup_mma_wait(0, deps=(found_first, found_second))
            mbarrier.arrive(empty.index(stage))
            tail_first += found_first * (tail_scale * first_scale)[None, :]
            tail_second += found_second * (tail_scale * second_scale)[None, :]
        else:
            mbarrier.arrive(empty.index(stage))
            second += found * (a_scale * second_scale)[:, None]
        step += 1
    buf = out_bufs.index(CONSUMER)
    if WIDTH == 128:
        _finish(
            first,
            second,
            0,
            row + 64 * CONSUMER,
            end,
            block_n,
            0,
            buf,
            exchange,
            exchanges,
            outputs,
            CONSUMER,
            ACTIVATION,
        )
    else:
        _finish(
            first, second, 0, row, end, block_n, 64 * CONSUMER, buf, exchange, exchanges, outputs, CONSUMER, ACTIVATION
        )
    if TAIL:
        _finish(
            tail_first, tail_second, 1, row + 128, end, block_n, 64 * CONSUMER, buf, exchange, exchanges, outputs,
            CONSUMER, ACTIVATION,
        )  # fmt: skip


@gluon.jit
def _start(x, w, registers):
    """Start x @ wᵀ over one block of what is summed over; `registers` is what may be overwritten."""
    return warpgroup_mma(x, w.permute((1, 0)), registers, use_acc=False, is_async=True)


@gluon.jit
def _finish(
    first, second, ROWS: gl.constexpr, row, end, block_n, column, buf, exchange, exchanges, outputs,
    CONSUMER: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Store two of ``[64 rows, 128 or 64 columns]``, or their activation requantised; `column` is the first of 128.

    ROWS is the axis of rows: 1 where they are transposed, ``[64 columns, 16 rows]``.
    """
    COLUMNS: gl.constexpr = 1 - ROWS
    out_ptr, out_scale_ptr, out_scale_row, out_scale_column, columns = outputs
    if ACTIVATION is None:
        store_tile(first, ROWS, buf, out_ptr, row, end, block_n * 256 + column, columns)
        store_tile(second, ROWS, buf, out_ptr, row, end, block_n * 256 + 128 + column, columns)
    else:
        out = _activate(first, second, ACTIVATION)
        amax = moe_fp8_amax(out, COLUMNS)
        if out.shape[COLUMNS] == 64:
            amax = _greater(amax, exchange, exchanges, CONSUMER)
        offs_m = row + gl.arange(0, out.shape[ROWS], gl.SliceLayout(COLUMNS, out.type.layout))
        scale_ptrs = out_scale_ptr + offs_m.to(gl.int64) * out_scale_row + block_n.to(gl.int64) * out_scale_column
        scale = _scale(amax)
        gl.store(scale_ptrs, scale, mask=offs_m < end)
        out *= gl.expand_dims(1.0 / scale, COLUMNS)
        store_tile(out, ROWS, buf, out_ptr, row, end, block_n * 128 + column, columns)


@gluon.jit
def _activate(gate, up, ACTIVATION: gl.constexpr):
    """`moe_activate`; SiLU by the bare instructions, whose ranges suffice: their checks were half of the epilogue."""
    if ACTIVATION == "silu":
        power = gl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [gate * -1.4426950408889634], gl.float32, True, 1
        )
        sigmoid = gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [power + 1.0], gl.float32, True, 1)
        out = gate * sigmoid * up
    else:
        out = moe_activate(gate, up, ACTIVATION)
    return out


@gluon.jit
def _scale(amax):
    """Multipliers. Conversions saturate, so that what is rounded up past the greatest code stays that code."""
    amax = gl.where(amax < _SMALLEST_AMAX, _SMALLEST_AMAX, amax)
    return tl.div_rn(amax, gl.full_like(amax, _FP8_MAX))


@gluon.jit
def _greater(amax, exchange, exchanges, CONSUMER: gl.constexpr):
    """The greater of both consumers' `amax`.

    Two pairs of buffers take turns: who comes to the next exchange has read what the last one left.
    """
    bufs, known = exchange
    pair = exchanges % 2 * 2
    bufs.index(pair + CONSUMER).slice(0, amax.shape[0]).store(amax)
    mbarrier.arrive(known)
    mbarrier.wait(known, exchanges & 1)
    other = bufs.index(pair + 1 - CONSUMER).slice(0, amax.shape[0]).load(amax.type.layout)
    # As integers, magnitudes keep their order, and NaN is the greatest.
    greater = gl.maximum(other.to(gl.int32, bitcast=True), amax.to(gl.int32, bitcast=True))
    return greater.to(gl.float32, bitcast=True)
