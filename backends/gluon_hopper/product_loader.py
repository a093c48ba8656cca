# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The loader of the BF16 and FP16 kernel: weights by TMA, rows by TMA or gathered, a stage at a time."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from moe_dispatch.backends.gluon_hopper import tiles
from moe_dispatch.backends.gluon_hopper.common import (
    TileStrides,
    free_stage,
    load_stage_rows,
    load_stage_weights,
    load_weights,
    receive_tile,
)
from moe_dispatch.backends.gluon_hopper.gluon_api import aggregate, copy_async, field
from moe_dispatch.backends.triton_common.pdl import moe_pdl_wait_and_release

_STAGE_BYTES = gl.constexpr(tiles.STAGE_BYTES)


@aggregate
class Operands:
    """What the loader reads.

    Attributes:
        rows: Descriptor of rows in the order of experts, by 64; or where they are gathered, a pointer to tokens.
        tails: The same by as many rows as a tail has; None where they are gathered.
        weights: Descriptor of weights.
        slot_of_row: Pointer to the slot of each row, from which its token follows; None where rows are not gathered.
        strides: How tiles lie in `weights`.
        columns: Columns of `rows`.
    """

    rows: tma.tensor_descriptor | gl.tensor
    tails: tma.tensor_descriptor | gl.constexpr
    weights: tma.tensor_descriptor
    slot_of_row: gl.tensor | gl.constexpr
    strides: TileStrides
    columns: gl.tensor | gl.constexpr

    @gluon.constexpr_function
    def __init__(self, rows, tails, weights, slot_of_row, strides, columns):
        self.rows = rows
        self.tails = field(tails)
        self.weights = weights
        self.slot_of_row = field(slot_of_row)
        self.strides = strides
        self.columns = field(columns)


@gluon.jit
def load_early(operands, ring, tile):
    """Have the weights of a program's first stages copied, wait for the kernel before, and return how many those are.

    The loader alone waits, between them and all else: results are stored after a stage is full, and its rows come after
    the wait. Until then tiles, weights and biases are read, which no kernel writes but some before the last one: that
    one waited for them before it let this one start, see `pdl`.
    """
    strides = operands.strides
    BLOCK_K: gl.constexpr = ring.rows.shape[2]
    early = gl.where(tile.end > 0, gl.minimum(strides.depth, ring.STAGES), 0)
    w_row = tile.e * strides.expert + tile.block_n * strides.tile
    for k in range(early):
        load_stage_weights(operands, ring, k, ring.full.index(k), tile, w_row, k * BLOCK_K)
    moe_pdl_wait_and_release(True)
    return early


@gluon.jit
def load_tiles(queue, ring, operands, TOPK: gl.constexpr):
    """The loader: gathers rows where TOPK > 0. What a tile does not have of its last rows is not loaded."""
    GATHER: gl.constexpr = TOPK > 0
    BLOCK_K: gl.constexpr = ring.rows.shape[2]
    strides = operands.strides
    i = 0
    step = 0
    tile = receive_tile(queue, i)
    if not GATHER:
        early = load_early(operands, ring, tile)
    while tile.end > 0:
        w_row = tile.e * strides.expert + tile.block_n * strides.tile
        if GATHER:
            lower = tile.end - tile.row > 64
            tail = tile.end - tile.row > 128
            upper_rows = _token_vectors(operands, tile.row, tile.end, TOPK, 64)
            lower_rows = _token_vectors(operands, tile.row + 64, tile.end, TOPK, 64)
            tail_rows = _token_vectors(operands, tile.row + 128, tile.end, TOPK, ring.tails.shape[1])
        for k in range(strides.depth):
            stage, bar = free_stage(queue, ring, k, strides.depth, step)
            column = k * BLOCK_K
            if GATHER:
                mbarrier.expect(bar, 256 * _STAGE_BYTES)
                load_weights(operands, ring, stage, bar, tile, w_row, column)
                _copy_tokens(operands, upper_rows, k, ring.rows.index(2 * stage))
                if lower:
                    _copy_tokens(operands, lower_rows, k, ring.rows.index(2 * stage + 1))
                if tail:
                    _copy_tokens(operands, tail_rows, k, ring.tails.index(stage))
                async_copy.mbarrier_arrive(bar, increment_count=False)
            else:
                if step >= early:
                    load_stage_weights(operands, ring, stage, bar, tile, w_row, column)
                load_stage_rows(operands, ring, stage, bar, tile, column)
            step += 1
        i += 1
        tile = receive_tile(queue, i)


@gluon.jit
def _token_vectors(operands, row, end, TOPK: gl.constexpr, ROWS: gl.constexpr):
    """Where the tokens of ROWS rows start, counted in vectors of 16 bytes; -1 for rows past the end."""
    VECTOR: gl.constexpr = 128 // operands.rows.dtype.element_ty.primitive_bitwidth
    COPY: gl.constexpr = gl.BlockedLayout([1, VECTOR], [4, 8], [2, 1], [1, 0])
    offs_m = row + gl.arange(0, ROWS, gl.SliceLayout(1, COPY))
    slot = gl.load(operands.slot_of_row + offs_m, mask=offs_m < end, other=-1)
    return gl.where(slot >= 0, slot // TOPK * (operands.columns // VECTOR), -1)


@gluon.jit
def _copy_tokens(operands, vectors, k, buf):
    """Block `k` of columns of the rows that are there.

    The others become zeros, for which nothing is read: any one row in their place would be read by all programs.
    """
    VECTOR: gl.constexpr = 128 // operands.rows.dtype.element_ty.primitive_bitwidth
    COPY: gl.constexpr = gl.BlockedLayout([1, VECTOR], [4, 8], [2, 1], [1, 0])
    offs_k = gl.arange(0, 8 * VECTOR, gl.SliceLayout(0, COPY))
    ptrs = operands.rows + (vectors + k * 8).to(gl.int64)[:, None] * VECTOR + offs_k[None, :]
    copy_async(buf, ptrs, mask=(vectors >= 0)[:, None])
