# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The loader of the MXFP4 kernel: codes, and rows by panels of 64 columns, a stage of 128 columns at a time."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from moe_dispatch.backends.gluon_hopper import tiles
from moe_dispatch.backends.gluon_hopper.common import free_stage, load_rows, receive_tile
from moe_dispatch.backends.gluon_hopper.gluon_api import reinterpret, tma_load
from moe_dispatch.backends.triton_common.pdl import moe_pdl_wait_and_release

_TAIL_M = gl.constexpr(tiles.TAIL_M)
_BLOCK_K = gl.constexpr(tiles.MXFP4_BLOCK_K)
_CODES = gl.constexpr(tiles.MXFP4_BLOCK_K // 2)  # bytes of a row in a stage


@gluon.jit
def load_mxfp4_tiles(queue, ring, product, x_desc, tail_desc):
    """The loader: a stage is the codes of 128 rows for each consumer, and two panels of 64 columns of a tile's rows."""
    BLOCK_M: gl.constexpr = ring.rows.shape[1]
    depth = gl.cdiv(product.K, _BLOCK_K)
    i = 0
    step = 0
    tile = receive_tile(queue, i)
    early = gl.where(tile.end > 0, gl.minimum(depth, ring.STAGES), 0)
    for k in range(early):
        _load_stage_codes(product, ring, k, ring.full.index(k), tile, k)
    moe_pdl_wait_and_release(True)  # as in `product_loader.load_early`
    while tile.end > 0:
        count = tile.end - tile.row
        for k in range(depth):
            stage, bar = free_stage(queue, ring, k, depth, step)
            if step >= early:
                _load_stage_codes(product, ring, stage, bar, tile, k)
            for panel in gl.static_range(2):
                column = k * _BLOCK_K + 64 * panel
                buf = ring.rows.index(2 * stage + panel)
                halves = reinterpret(buf, buf.dtype, [BLOCK_M // 64, 64, 64], buf.layout)
                load_rows(x_desc, halves.index(0), bar, tile.row, tile.end, column, True)
                if BLOCK_M == 128:
                    load_rows(x_desc, halves.index(1), bar, tile.row + 64, tile.end, column, count > 64)
                    tail = ring.tails.index(2 * stage + panel)
                    load_rows(tail_desc, tail, bar, tile.row + 128, tile.end, column, count > 128)
            step += 1
        i += 1
        tile = receive_tile(queue, i)


@gluon.jit
def _load_stage_codes(product, ring, stage, bar, tile, k):
    """Load the codes of a stage, whose barrier expects its rows as well."""
    count = tile.end - tile.row
    # Both panels have 256 bytes of a row.
    mbarrier.expect(bar, 256 * _CODES + 256 * 64, pred=count <= 64)
    if ring.rows.shape[1] == 128:
        mbarrier.expect(bar, 256 * _CODES + 256 * 128, pred=(count > 64) & (count <= 128))
        mbarrier.expect(bar, 256 * _CODES + 256 * (128 + _TAIL_M), pred=count > 128)
    for consumer in gl.static_range(2):
        _load_codes(product, ring.weights.index(2 * stage + consumer), bar, tile, consumer, k * _CODES)


@gluon.jit
def _load_codes(product, buf, bar, tile, CONSUMER: gl.constexpr, column):
    """Load the codes of a consumer's two operands, one after the other."""
    codes = product.codes
    row = tile.e * product.N + tile.block_n * 128
    if product.ACTIVATION is None:
        view = reinterpret(buf, buf.dtype, codes.block_type.shape, codes.layout)
        row += tile.block_n * 128 + CONSUMER * 128
        tma_load(codes, [row // 8, 0, 0, 0, column], bar, view)
    elif product.INTERLEAVED:
        view = reinterpret(buf, buf.dtype, codes.block_type.shape, codes.layout)
        tma_load(codes, [0, CONSUMER, row // 32, 0, column], bar, view)
    else:
        views = reinterpret(buf, buf.dtype, [2, 1, 4, 16, _CODES], codes.layout)
        for half in gl.static_range(2):
            tma_load(codes, [CONSUMER, (row + (tile.e + half) * product.N) // 32, 0, column], bar, views.index(half))
