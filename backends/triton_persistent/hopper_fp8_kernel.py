# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The two grouped products in block FP8 for Hopper, in Gluon; see `hopper_common`.

A tile is 128 rows of one expert, 64 for each consumer, and twice 128 rows of its weights: gate and up, or two of down.
The tensor core adds up 128 products; what it found is scaled and added in fp32, a quarter of the weights at a time:
registers hold all sums and two such partial results, one being multiplied while the other is added.
A consumer has whole groups of 128 columns of its rows, so that it can requantise what the activation gives.
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

from moe_dispatch.experts import FP8_MAX, SMALLEST_AMAX

from ..stages.device import moe_activate, moe_fp8_amax
from .hopper_common import load_tiles, make_barriers, receive_tile, schedule_tiles

_FP8_MAX = gl.constexpr(FP8_MAX)
_SMALLEST_AMAX = gl.constexpr(SMALLEST_AMAX)
_BLOCK_K = gl.constexpr(128)


@gluon.jit
def _moe_hopper_fp8_kernel(
    # inputs
    a,
    a_scale_ptr,
    w_desc,
    w_scale_ptr,
    slot_of_row_ptr,
    blocks_ptr,
    counts_ptr,
    # outputs
    out_ptr,
    out_scale_ptr,
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
    GROUP_M: gl.constexpr,
):
    """`a` is a descriptor of rows in expert order, or with TOPK > 0 rows of tokens, which the loader gathers."""
    GATHER: gl.constexpr = TOPK > 0
    A_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, _BLOCK_K], w_desc.dtype)
    OUT: gl.constexpr = out_ptr.dtype.element_ty
    OUT_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 128], OUT)
    a_bufs = gl.allocate_shared_memory(w_desc.dtype, [2 * STAGES, 64, _BLOCK_K], A_LAYOUT)
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [2 * STAGES, 128, _BLOCK_K], w_desc.layout)
    out_bufs = gl.allocate_shared_memory(OUT, [2, 64, 128], OUT_LAYOUT)
    queue, ring = make_barriers(STAGES, GATHER)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    gl.warp_specialize(
        [
            (_consume, (queue, ring, a_bufs, w_bufs, out_bufs, a_scale_ptr, w_scale_ptr, slot_of_row_ptr, out_ptr,
                        out_scale_ptr, w_rows, w_second, w_step, columns, depth, 0, TOPK, ACTIVATION, STAGES)),
            (_consume, (queue, ring, a_bufs, w_bufs, out_bufs, a_scale_ptr, w_scale_ptr, slot_of_row_ptr, out_ptr,
                        out_scale_ptr, w_rows, w_second, w_step, columns, depth, 1, TOPK, ACTIVATION, STAGES)),
            (load_tiles, (queue, ring, a, None, w_desc, slot_of_row_ptr, a_bufs, None, w_bufs, w_rows,
                          w_second, w_step, depth, a_columns, TOPK, False, STAGES)),
            (schedule_tiles, (queue, blocks_ptr, counts_ptr, n_blocks, COUNTER, GROUP_M)),
        ],
        [4, 2 if GATHER else 1, 1],
        [224, 64, 64] if GATHER else [232, 40, 40],
    )  # fmt: skip


@gluon.jit
def _consume(
    queue, ring, a_bufs, w_bufs, out_bufs, a_scale_ptr, w_scale_ptr, slot_of_row_ptr, out_ptr,
    out_scale_ptr, w_rows, w_second, w_step, columns, depth,
    HALF: gl.constexpr, TOPK: gl.constexpr, ACTIVATION: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Consumer HALF takes the upper (0) or the lower (1) 64 rows of every tile."""
    full, empty = ring
    i = 0
    step = 0
    e, row, end, block_n = receive_tile(queue, i)
    while end > 0:
        row += 64 * HALF
        if row < end:
            scale_row = (e * w_rows + block_n * w_step) // 128
            first_scale_ptr = w_scale_ptr + scale_row.to(gl.int64) * depth
            first, second = _multiply(
                ring, a_bufs, w_bufs, a_scale_ptr, first_scale_ptr, first_scale_ptr + w_second // 128 * depth,
                slot_of_row_ptr, row, end, depth, step, HALF, TOPK, STAGES,
            )  # fmt: skip
            buf = out_bufs.index(HALF)
            if ACTIVATION is not None:
                out = moe_activate(first, second, ACTIVATION)
                amax = moe_fp8_amax(out, 1)
                amax = gl.where(amax < _SMALLEST_AMAX, _SMALLEST_AMAX, amax)
                scale = tl.div_rn(amax, gl.full_like(amax, _FP8_MAX))
                offs_m = row + gl.arange(0, 64, gl.SliceLayout(1, out.type.layout))
                scale_ptrs = out_scale_ptr + offs_m.to(gl.int64) * (columns // 128) + block_n
                gl.store(scale_ptrs, scale, mask=offs_m < end)
                # The conversion saturates, so that what a division rounds up past the greatest code stays that code.
                _store(out / scale[:, None], buf, out_ptr, row, end, block_n * 128, columns)
            else:
                _store(first, buf, out_ptr, row, end, block_n * 256, columns)
                _store(second, buf, out_ptr, row, end, block_n * 256 + 128, columns)
            step += depth
        else:
            for _k in range(depth):
                stage = step % STAGES
                mbarrier.wait(full.index(stage), step // STAGES & 1)
                mbarrier.arrive(empty.index(stage))
                step += 1
        i += 1
        e, row, end, block_n = receive_tile(queue, i)


@gluon.jit
def _multiply(
    ring, a_bufs, w_bufs, a_scale_ptr, first_scale_ptr, second_scale_ptr, slot_of_row_ptr, row, end, depth, step,
    HALF: gl.constexpr, TOPK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """64 rows by both halves of the weights, scaled: two of ``[64, 128]``."""
    full, empty = ring
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    w_quarters = w_bufs._reinterpret(w_bufs.dtype, [4 * STAGES, 64, _BLOCK_K], w_bufs.type.layout)
    offs_m = row + gl.arange(0, 64, gl.SliceLayout(1, MMA))
    if TOPK > 0:
        source = gl.load(slot_of_row_ptr + offs_m, mask=offs_m < end, other=0) // TOPK
    else:
        source = gl.where(offs_m < end, offs_m, row)
    a_scale_ptrs = a_scale_ptr + source.to(gl.int64) * depth
    a_scale = gl.load(a_scale_ptrs)
    first_scale = gl.load(first_scale_ptr)
    second_scale = gl.load(second_scale_ptr)
    first_left = gl.zeros([64, 64], gl.float32, MMA)
    first_right = gl.zeros([64, 64], gl.float32, MMA)
    second_left = gl.zeros([64, 64], gl.float32, MMA)
    second_right = gl.zeros([64, 64], gl.float32, MMA)
    even = gl.zeros([64, 64], gl.float32, MMA)
    odd = gl.zeros([64, 64], gl.float32, MMA)
    for k in range(depth):
        stage = step % STAGES
        # Scales come one step ahead; the last step reads the first's again.
        following = gl.where(k + 1 < depth, k + 1, 0)
        next_a_scale = gl.load(a_scale_ptrs + following)
        next_first_scale = gl.load(first_scale_ptr + following)
        next_second_scale = gl.load(second_scale_ptr + following)
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        if TOPK > 0:
            fence_async_shared()
        # One quarter is multiplied while the one before it is added. A sum passes through a wait so that it is
        # finished before its registers' next product starts: the compiler would take others, and has none.
        x = a_bufs.index(2 * stage + HALF)
        scale = (a_scale * first_scale)[:, None]
        even = _start(x, w_quarters.index(4 * stage), even)
        odd = _start(x, w_quarters.index(4 * stage + 1), odd)
        even, odd = warpgroup_mma_wait(1, deps=(even, odd))
        first_left += even * scale
        first_left, odd = warpgroup_mma_wait(1, deps=(first_left, odd))
        even = _start(x, w_quarters.index(4 * stage + 2), even)
        even, odd = warpgroup_mma_wait(1, deps=(even, odd))
        first_right += odd * scale
        first_right, even = warpgroup_mma_wait(1, deps=(first_right, even))
        scale = (a_scale * second_scale)[:, None]
        odd = _start(x, w_quarters.index(4 * stage + 3), odd)
        even, odd = warpgroup_mma_wait(1, deps=(even, odd))
        second_left += even * scale
        second_left, odd = warpgroup_mma_wait(0, deps=(second_left, odd))
        mbarrier.arrive(empty.index(stage))
        second_right += odd * scale
        a_scale = next_a_scale
        first_scale = next_first_scale
        second_scale = next_second_scale
        step += 1
    return _side_by_side(first_left, first_right), _side_by_side(second_left, second_right)


@gluon.jit
def _start(x, w, registers):
    """Start x @ wᵀ over one block of what is summed over; `registers` is what may be overwritten."""
    return warpgroup_mma(x, w.permute((1, 0)), registers, use_acc=False, is_async=True)


@gluon.jit
def _side_by_side(left, right):
    """``[64, 128]`` of two ``[64, 64]``."""
    return gl.reshape(gl.permute(gl.join(left, right), [0, 2, 1]), [64, 128])


@gluon.jit
def _store(values, buf, out_ptr, row, end, column, columns):
    """`values` ``[64, 128]`` to their rows, through shared memory."""
    VECTOR: gl.constexpr = 128 // buf.dtype.primitive_bitwidth
    LINES: gl.constexpr = gl.BlockedLayout([1, VECTOR], [VECTOR // 4, 128 // VECTOR], [4, 1], [1, 0])
    buf.store(values.to(buf.dtype))
    offs_m = row + gl.arange(0, 64, gl.SliceLayout(1, LINES))
    offs_n = column + gl.arange(0, 128, gl.SliceLayout(0, LINES))
    ptrs = out_ptr + offs_m.to(gl.int64)[:, None] * columns + offs_n[None, :]
    gl.store(ptrs, buf.load(LINES), mask=(offs_m < end)[:, None] & (offs_n < columns)[None, :])
