# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The loader of the FP8 kernel for Hopper: rows, weights and the multipliers of both, a stage of 128 columns at a time.

Consumers that fetched multipliers themselves would wait for global memory in every stage.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from moe_dispatch.backends.gluon_hopper.common import free_stage, load_stage, receive_tile

_BLOCK_K = gl.constexpr(128)


@gluon.jit
def load_fp8_tiles(queue, ring, inputs, bufs, shapes, STAGES: gl.constexpr):
    """Two warps, each of whose threads arrives at a stage when its own copies have.

    `inputs` are descriptors of rows, by 64 and by as many as a tail has; a pointer to their multipliers, with strides
    of rows and of columns; a descriptor of weights and a pointer to theirs. `shapes` are the rows of an expert's
    weights, from the first half of a tile to the second, from a tile to the next; and blocks summed over.
    """
    a_desc, tail_desc, a_scale_ptr, a_scale_row, a_scale_column, w_desc, w_scale_ptr = inputs
    a_bufs, tail_bufs, w_bufs, a_scale_bufs, tail_scale_bufs, w_scale_bufs = bufs
    w_rows, w_second, w_step, depth = shapes
    TAIL_M: gl.constexpr = tail_bufs.shape[1]
    ROWS: gl.constexpr = gl.BlockedLayout([1], [32], [2], [0])
    a_scale_pairs = a_scale_bufs._reinterpret(gl.float32, [STAGES, 128], a_scale_bufs.type.layout)
    i = 0
    step = 0
    e, row, end, block_n = receive_tile(queue, i)
    while end > 0:
        w_row = e * w_rows + block_n * w_step
        first_scale_ptrs = w_scale_ptr + w_row // 128 * depth + gl.arange(0, 1, ROWS)
        second_scale_ptrs = first_scale_ptrs + w_second // 128 * depth
        # Past the end a row is read that is there.
        offs_m = row + gl.arange(0, 128, ROWS)
        offs_t = row + 128 + gl.arange(0, TAIL_M, ROWS)
        a_scale_offs = gl.where(offs_m < end, offs_m, row) * a_scale_row
        tail_scale_offs = gl.where(offs_t < end, offs_t, row) * a_scale_row
        for k in range(depth):
            stage, bar = free_stage(queue, ring, k, depth, step, STAGES)
            load_stage(
                a_desc, tail_desc, w_desc, a_bufs, tail_bufs, w_bufs, stage, bar, row, end, w_row, w_second,
                k * _BLOCK_K,
            )  # fmt: skip
            a_scale_ptrs = a_scale_ptr + gl.to_tensor(k).to(gl.int64) * a_scale_column
            async_copy.async_copy_global_to_shared(a_scale_pairs.index(stage), a_scale_ptrs + a_scale_offs)
            async_copy.async_copy_global_to_shared(tail_scale_bufs.index(stage), a_scale_ptrs + tail_scale_offs)
            async_copy.async_copy_global_to_shared(w_scale_bufs.index(2 * stage), first_scale_ptrs + k)
            async_copy.async_copy_global_to_shared(w_scale_bufs.index(2 * stage + 1), second_scale_ptrs + k)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            step += 1
        i += 1
        e, row, end, block_n = receive_tile(queue, i)
