# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The loader of the BF16 kernel for Hopper: weights by TMA, rows by TMA or gathered, a stage of 128 bytes at a time."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from moe_dispatch.backends.gluon_hopper.common import free_stage, load_stage, load_weights, receive_tile

_W_BYTES = gl.constexpr(256 * 128)


@gluon.jit
def load_tiles(
    queue, ring, a, tail_desc, w_desc, slot_of_row_ptr, a_bufs, tail_bufs, w_bufs, w_rows, w_second, w_step, depth,
    a_columns, TOPK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loader.

    `w_second` is how far the second 128 rows of weights are from the first, `w_step` one tile from the next. `a` is a
    descriptor of rows in expert order, or with TOPK > 0 a pointer to tokens. Tiles have up to 160 rows; what one does
    not need of its last rows is not loaded.
    """
    GATHER: gl.constexpr = TOPK > 0
    BLOCK_K: gl.constexpr = a_bufs.type.shape[2]
    i = 0
    step = 0
    e, row, end, block_n = receive_tile(queue, i)
    while end > 0:
        w_row = e * w_rows + block_n * w_step
        if GATHER:
            lower = end - row > 64
            tail = end - row > 128
            upper_rows = _token_vectors(a, slot_of_row_ptr, row, end, a_columns, TOPK, 64)
            lower_rows = _token_vectors(a, slot_of_row_ptr, row + 64, end, a_columns, TOPK, 64)
            tail_rows = _token_vectors(a, slot_of_row_ptr, row + 128, end, a_columns, TOPK, 32)
        for k in range(depth):
            stage, bar = free_stage(queue, ring, k, depth, step, STAGES)
            column = k * BLOCK_K
            if GATHER:
                mbarrier.expect(bar, _W_BYTES)
                load_weights(w_desc, w_bufs, stage, bar, w_row, w_second, column)
                _copy_tokens(a, upper_rows, k, a_bufs.index(2 * stage))
                if lower:
                    _copy_tokens(a, lower_rows, k, a_bufs.index(2 * stage + 1))
                if tail:
                    _copy_tokens(a, tail_rows, k, tail_bufs.index(stage))
                async_copy.mbarrier_arrive(bar, increment_count=False)
            else:
                load_stage(
                    a, tail_desc, w_desc, a_bufs, tail_bufs, w_bufs, stage, bar, row, end, w_row, w_second, column
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
