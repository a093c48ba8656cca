# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The loader of the FP8 kernel: rows, weights and the multipliers of both, a stage of 128 columns at a time.

Consumers that fetched multipliers themselves would wait for global memory in every stage.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, tma

from moe_dispatch.backends.gluon_hopper.common import (
    TileStrides,
    free_stage,
    load_stage_rows,
    load_stage_weights,
    receive_tile,
)
from moe_dispatch.backends.gluon_hopper.gluon_api import aggregate, copy_async, reinterpret
from moe_dispatch.backends.gluon_hopper.product_loader import load_early


@aggregate
class Fp8Operands:
    """What the loader reads.

    Attributes:
        rows: Descriptor of rows in the order of experts, by 64.
        tails: The same by as many rows as a tail has.
        scales: Pointer to the rows' multipliers.
        scale_row: Elements from the multiplier of one row to that of the next.
        scale_column: Elements from the multipliers of one block of columns to those of the next.
        weights: Descriptor of weights.
        weight_scales: Pointer to their multipliers, one for 128 rows and 128 columns.
        strides: How tiles lie in `weights`.
    """

    rows: tma.tensor_descriptor
    tails: tma.tensor_descriptor
    scales: gl.tensor
    scale_row: gl.tensor
    scale_column: gl.tensor
    weights: tma.tensor_descriptor
    weight_scales: gl.tensor
    strides: TileStrides

    @gluon.constexpr_function
    def __init__(self, rows, tails, scales, scale_row, scale_column, weights, weight_scales, strides):
        self.rows = rows
        self.tails = tails
        self.scales = scales
        self.scale_row = scale_row
        self.scale_column = scale_column
        self.weights = weights
        self.weight_scales = weight_scales
        self.strides = strides


@aggregate
class ScaleRing:
    """The multipliers of each stage of a `Ring`, fp32.

    Attributes:
        rows: ``[2 · STAGES, 64]``.
        tails: ``[STAGES, TAIL_M]``.
        weights: ``[2 · STAGES, 1]``: of a tile's first and second 128 rows of weights.
    """

    rows: gl.shared_memory_descriptor
    tails: gl.shared_memory_descriptor
    weights: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, rows, tails, weights):
        self.rows = rows
        self.tails = tails
        self.weights = weights


@gluon.jit
def load_fp8_tiles(queue, ring, scales, operands):
    """The loader: two warps, each of whose threads arrives at a stage when its own copies have."""
    # Rows, or with INTERLEAVED pairs of them, in a block of scales.
    SCALED: gl.constexpr = 64 if operands.strides.INTERLEAVED else 128
    BLOCK_K: gl.constexpr = ring.rows.shape[2]
    TAIL_M: gl.constexpr = ring.tails.shape[1]
    ROWS: gl.constexpr = gl.BlockedLayout([1], [32], [2], [0])
    strides = operands.strides
    row_scales = reinterpret(scales.rows, scales.rows.dtype, [ring.STAGES, 128], scales.rows.layout)
    i = 0
    step = 0
    tile = receive_tile(queue, i)
    early = load_early(operands, ring, tile)
    while tile.end > 0:
        w_row = tile.e * strides.expert + tile.block_n * strides.tile
        first_scale_ptrs = operands.weight_scales + w_row // SCALED * strides.depth + gl.arange(0, 1, ROWS)
        second_scale_ptrs = first_scale_ptrs + strides.second // SCALED * strides.depth
        # Past the end a row is read that is there.
        offs_m = tile.row + gl.arange(0, 128, ROWS)
        offs_t = tile.row + 128 + gl.arange(0, TAIL_M, ROWS)
        row_scale_offs = gl.where(offs_m < tile.end, offs_m, tile.row) * operands.scale_row
        tail_scale_offs = gl.where(offs_t < tile.end, offs_t, tile.row) * operands.scale_row
        for k in range(strides.depth):
            stage, bar = free_stage(queue, ring, k, strides.depth, step)
            if step >= early:
                load_stage_weights(operands, ring, stage, bar, tile, w_row, k * BLOCK_K)
            load_stage_rows(operands, ring, stage, bar, tile, k * BLOCK_K)
            scale_ptrs = operands.scales + gl.to_tensor(k).to(gl.int64) * operands.scale_column
            copy_async(row_scales.index(stage), scale_ptrs + row_scale_offs)
            copy_async(scales.tails.index(stage), scale_ptrs + tail_scale_offs)
            copy_async(scales.weights.index(2 * stage), first_scale_ptrs + k)
            copy_async(scales.weights.index(2 * stage + 1), second_scale_ptrs + k)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            step += 1
        i += 1
        tile = receive_tile(queue, i)
