# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The two grouped products for Hopper, in Gluon: one program on every multiprocessor, see `hopper_common`.

A tile is up to 160 rows of one expert and 256 rows of its weights: 128 of gate and the 128 of up beside them, or 256 of
down. So an expert that has a few rows more than 128 does not need its weights twice.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe_dispatch.backends.gluon_hopper.common import make_barriers, receive_tile, schedule_tiles, store_tile
from moe_dispatch.backends.gluon_hopper.product_loader import load_tiles
from moe_dispatch.backends.triton_common.device import moe_activate

# Stages that the second consumer starts after the first.
_STAGGER = gl.constexpr(2)


@gluon.jit
def _moe_hopper_kernel(
    # inputs
    a,
    tail_desc,
    w_desc,
    slot_of_row_ptr,
    blocks_ptr,
    counts_ptr,
    # outputs
    out_ptr,
    # shapes
    n_blocks,
    w_rows,
    w_second,
    w_step,
    depth,
    a_columns,
    columns,
    # constants
    COUNTER: gl.constexpr,
    TOPK: gl.constexpr,
    ACTIVATION: gl.constexpr,
    STAGES: gl.constexpr,
):
    """`a` is a descriptor of rows in expert order, or with TOPK > 0 hidden_states, whose rows the loader gathers."""
    GATHER: gl.constexpr = TOPK > 0
    BLOCK_K: gl.constexpr = w_desc.block_type.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_K], w_desc.dtype)
    a_bufs = gl.allocate_shared_memory(w_desc.dtype, [2 * STAGES, 64, BLOCK_K], LAYOUT)
    tail_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, 32, BLOCK_K], LAYOUT)
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [2 * STAGES, 128, BLOCK_K], w_desc.layout)
    out_bufs = gl.allocate_shared_memory(w_desc.dtype, [2, 64, 64], LAYOUT)
    queue, ring = make_barriers(STAGES, GATHER)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    gl.warp_specialize(
        [
            (_consume, (queue, ring, a_bufs, tail_bufs, w_bufs, out_bufs, out_ptr, columns, depth,
                        0, ACTIVATION, GATHER, STAGES)),
            (_consume, (queue, ring, a_bufs, tail_bufs, w_bufs, out_bufs, out_ptr, columns, depth,
                        1, ACTIVATION, GATHER, STAGES)),
            (load_tiles, (queue, ring, a, tail_desc, w_desc, slot_of_row_ptr, a_bufs, tail_bufs, w_bufs, w_rows,
                          w_second, w_step, depth, a_columns, TOPK, STAGES)),
            (schedule_tiles, (queue, blocks_ptr, counts_ptr, n_blocks, COUNTER)),
        ],
        [4, 2 if GATHER else 1, 1],
        [208, 88, 88] if GATHER else [232, 40, 40],
    )  # fmt: skip


@gluon.jit
def _consume(
    queue, ring, a_bufs, tail_bufs, w_bufs, out_bufs, out_ptr, columns, depth,
    CONSUMER: gl.constexpr, ACTIVATION: gl.constexpr, GATHER: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One of the two consumers, CONSUMER 0 or 1."""
    i = 0
    step = 0
    _e, row, end, block_n = receive_tile(queue, i)
    if CONSUMER == 1:
        # One consumer starts later than the other, so that their epilogues do not leave the tensor core idle together.
        mbarrier.wait(ring[0].index(_STAGGER), 0, pred=(end > 0) & (depth > _STAGGER))
    while end > 0:
        if end - row > 128:
            step = _multiply(
                ring, a_bufs, tail_bufs, w_bufs, out_bufs, out_ptr, row, end, block_n, columns, depth, step,
                160, CONSUMER, ACTIVATION, GATHER, STAGES,
            )  # fmt: skip
        elif end - row > 64:
            step = _multiply(
                ring, a_bufs, tail_bufs, w_bufs, out_bufs, out_ptr, row, end, block_n, columns, depth, step,
                128, CONSUMER, ACTIVATION, GATHER, STAGES,
            )  # fmt: skip
        elif end - row > 32:
            step = _multiply(
                ring, a_bufs, tail_bufs, w_bufs, out_bufs, out_ptr, row, end, block_n, columns, depth, step,
                64, CONSUMER, ACTIVATION, GATHER, STAGES,
            )  # fmt: skip
        else:
            step = _multiply(
                ring, a_bufs, tail_bufs, w_bufs, out_bufs, out_ptr, row, end, block_n, columns, depth, step,
                32, CONSUMER, ACTIVATION, GATHER, STAGES,
            )  # fmt: skip
        i += 1
        _e, row, end, block_n = receive_tile(queue, i)


@gluon.jit
def _multiply(
    ring, a_bufs, tail_bufs, w_bufs, out_bufs, out_ptr, row, end, block_n, columns, depth, step,
    HEIGHT: gl.constexpr, CONSUMER: gl.constexpr, ACTIVATION: gl.constexpr, GATHER: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A tile of up to HEIGHT rows.

    From 128 rows on a consumer multiplies 64 of them by all weights. Of what is less or left over both multiply all
    rows by half of the weights, transposed: weight rows fill the tensor core's side of 64, few rows its other side.
    """
    full, empty = ring
    WIDE: gl.constexpr = HEIGHT >= 128
    FEW: gl.constexpr = HEIGHT % 128  # rows that are multiplied transposed
    BLOCK_K: gl.constexpr = a_bufs.type.shape[2]
    LAYOUT: gl.constexpr = a_bufs.type.layout
    w_pairs = w_bufs._reinterpret(w_bufs.dtype, [STAGES, 256, BLOCK_K], LAYOUT)
    w_halves = w_bufs._reinterpret(w_bufs.dtype, [4 * STAGES, 64, BLOCK_K], LAYOUT)
    if WIDE:
        acc = gl.zeros([64, 256], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
    if FEW:
        FEW_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FEW, 16])
        first = gl.zeros([64, FEW], gl.float32, FEW_LAYOUT)
        second = gl.zeros([64, FEW], gl.float32, FEW_LAYOUT)
    for k in range(depth):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        if GATHER:
            fence_async_shared()
        if WIDE:
            acc = warpgroup_mma(
                a_bufs.index(2 * stage + CONSUMER), w_pairs.index(stage).permute((1, 0)), acc, is_async=True
            )
        if FEW:
            few = _few_rows(a_bufs, tail_bufs, stage, HEIGHT, STAGES).permute((1, 0))
            first = warpgroup_mma(w_halves.index(4 * stage + CONSUMER), few, first, is_async=True)
            second = warpgroup_mma(w_halves.index(4 * stage + 2 + CONSUMER), few, second, is_async=True)
        # The products before these have read their stage.
        if WIDE and FEW:
            acc, first, second = warpgroup_mma_wait(3, deps=(acc, first, second))
        elif WIDE:
            acc = warpgroup_mma_wait(1, deps=(acc,))
        else:
            first, second = warpgroup_mma_wait(2, deps=(first, second))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
        step += 1
    if WIDE and FEW:
        acc, first, second = warpgroup_mma_wait(0, deps=(acc, first, second))
    elif WIDE:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    else:
        first, second = warpgroup_mma_wait(0, deps=(first, second))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
    buf = out_bufs.index(CONSUMER)
    if WIDE:
        left, right = gl.split(gl.permute(gl.reshape(acc, [64, 2, 128]), [0, 2, 1]))
        if ACTIVATION is not None:
            store_tile(
                moe_activate(left, right, ACTIVATION), 0, buf, out_ptr, row + 64 * CONSUMER, end, block_n * 128, columns
            )
        else:
            store_tile(left, 0, buf, out_ptr, row + 64 * CONSUMER, end, block_n * 256, columns)
            store_tile(right, 0, buf, out_ptr, row + 64 * CONSUMER, end, block_n * 256 + 128, columns)
    if FEW:
        few_row = row + 128 if WIDE else row
        if ACTIVATION is not None:
            column = block_n * 128 + 64 * CONSUMER
            store_tile(moe_activate(first, second, ACTIVATION), 1, buf, out_ptr, few_row, end, column, columns)
        else:
            column = block_n * 256 + 64 * CONSUMER
            store_tile(first, 1, buf, out_ptr, few_row, end, column, columns)
            store_tile(second, 1, buf, out_ptr, few_row, end, column + 128, columns)
    return step


@gluon.jit
def _few_rows(a_bufs, tail_bufs, stage, HEIGHT: gl.constexpr, STAGES: gl.constexpr):
    """A tile's rows that are multiplied transposed: what is beyond 128 of them, or the first HEIGHT."""
    if HEIGHT > 128:
        rows = tail_bufs.index(stage)
    else:
        BLOCK_K: gl.constexpr = a_bufs.type.shape[2]
        views = a_bufs._reinterpret(a_bufs.dtype, [128 // HEIGHT * STAGES, HEIGHT, BLOCK_K], a_bufs.type.layout)
        rows = views.index(128 // HEIGHT * stage)
    return rows
