# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The two grouped products in BF16 and FP16 for Hopper, in Gluon; `common` describes roles, barriers and stages.

A tile takes up to 160 rows: an expert that has a few rows more than 128 does not need its weights twice.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe_dispatch.backends.gluon_hopper import tiles
from moe_dispatch.backends.gluon_hopper.common import (
    Ring,
    TileStrides,
    add_biases,
    make_barriers,
    receive_tile,
    schedule_tiles,
    store_tile,
)
from moe_dispatch.backends.gluon_hopper.gluon_api import aggregate, field, reinterpret
from moe_dispatch.backends.gluon_hopper.product_loader import Operands, load_tiles
from moe_dispatch.backends.triton_common.device import moe_activate
from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.pdl import moe_pdl_wait_and_release

_TAIL_M = gl.constexpr(tiles.TAIL_M)
_STAGE_BYTES = gl.constexpr(tiles.STAGE_BYTES)
_STAGGER_STAGES = gl.constexpr(tiles.STAGGER_STAGES)


@aggregate
class Outputs:
    """Where results go.

    Attributes:
        ptr: Pointer to the result, row-major.
        biases: Pointer to the biases of all experts' rows of weights; None without.
        columns: Columns of the result.
        bufs: Shared memory ``[2, 64, 64]`` through which each consumer stores.
        INTERLEAVED: Whether gate and up rows of the weights, and of their biases, alternate.
        TRANSPOSED: Whether the weights are stored by columns.
        ALTERNATING: Whether gate and up rows alternate in a stage, too.
    """

    ptr: gl.tensor
    biases: gl.tensor | gl.constexpr
    columns: gl.tensor | gl.constexpr
    bufs: gl.shared_memory_descriptor
    INTERLEAVED: gl.constexpr
    TRANSPOSED: gl.constexpr
    ALTERNATING: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, ptr, biases, columns, bufs, INTERLEAVED, TRANSPOSED):
        self.ptr = ptr
        self.biases = field(biases)
        self.columns = field(columns)
        self.bufs = bufs
        self.INTERLEAVED = gl.constexpr(INTERLEAVED)
        self.TRANSPOSED = gl.constexpr(TRANSPOSED)
        self.ALTERNATING = gl.constexpr(INTERLEAVED and TRANSPOSED)


@fast_launch
@gluon.jit
def _moe_hopper_product_kernel(
    # inputs
    a,
    tail_desc,
    w_desc,
    bias_ptr,
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
    INTERLEAVED: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    STAGES: gl.constexpr,
):
    """`a` is a descriptor of rows in expert order, or with TOPK > 0 hidden_states, whose rows the loader gathers.

    With INTERLEAVED `w_desc` sees pairs of rows, see `windows.ExpertRows`.
    """
    GATHER: gl.constexpr = TOPK > 0
    LOADER_WARPS: gl.constexpr = 2 if GATHER else 1
    DTYPE: gl.constexpr = w_desc.dtype
    BLOCK_K: gl.constexpr = _STAGE_BYTES * 8 // DTYPE.primitive_bitwidth
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_K], DTYPE)
    rows = gl.allocate_shared_memory(DTYPE, [2 * STAGES, 64, BLOCK_K], LAYOUT)
    tails = gl.allocate_shared_memory(DTYPE, [STAGES, _TAIL_M, BLOCK_K], LAYOUT)
    weights = gl.allocate_shared_memory(DTYPE, [2 * STAGES, 128, BLOCK_K], LAYOUT)
    out_bufs = gl.allocate_shared_memory(DTYPE, [2, 64, 64], LAYOUT)
    queue, full, empty = make_barriers(STAGES, LOADER_WARPS, GATHER)
    ring = Ring(rows, tails, weights, full, empty, STAGES)
    if GATHER:
        moe_pdl_wait_and_release(True)  # what lists the tiles is the kernel before; else the loader waits
    strides = TileStrides(w_rows, w_second, w_step, depth, INTERLEAVED, TRANSPOSED)
    operands = Operands(a, tail_desc, w_desc, slot_of_row_ptr, strides, a_columns)
    outputs = Outputs(out_ptr, bias_ptr, columns, out_bufs, INTERLEAVED, TRANSPOSED)
    gl.warp_specialize(
        [
            (_consume, (queue, ring, outputs, depth, 0, ACTIVATION, GATHER)),
            (_consume, (queue, ring, outputs, depth, 1, ACTIVATION, GATHER)),
            (load_tiles, (queue, ring, operands, TOPK)),
            (schedule_tiles, (queue, blocks_ptr, counts_ptr, n_blocks, COUNTER)),
        ],
        [4, LOADER_WARPS, 1],
        [208, 88, 88] if GATHER else [232, 40, 40],
    )


@gluon.jit
def _consume(
    queue, ring, outputs, depth, CONSUMER: gl.constexpr, ACTIVATION: gl.constexpr, GATHER: gl.constexpr
):  # fmt: skip
    """One of the two consumers, CONSUMER 0 or 1."""
    i = 0
    step = 0
    tile = receive_tile(queue, i)
    if CONSUMER == 1:
        # One consumer starts later than the other, so that their epilogues do not leave the tensor core idle together.
        mbarrier.wait(ring.full.index(_STAGGER_STAGES), 0, pred=(tile.end > 0) & (depth > _STAGGER_STAGES))
    while tile.end > 0:
        if tile.end - tile.row > 128:
            step = _multiply(ring, outputs, tile, depth, step, 128 + _TAIL_M, CONSUMER, ACTIVATION, GATHER)
        elif tile.end - tile.row > 64:
            step = _multiply(ring, outputs, tile, depth, step, 128, CONSUMER, ACTIVATION, GATHER)
        elif tile.end - tile.row > 32:
            step = _multiply(ring, outputs, tile, depth, step, 64, CONSUMER, ACTIVATION, GATHER)
        else:
            step = _multiply(ring, outputs, tile, depth, step, 32, CONSUMER, ACTIVATION, GATHER)
        i += 1
        tile = receive_tile(queue, i)


@gluon.jit
def _multiply(
    ring, outputs, tile, depth, step,
    HEIGHT: gl.constexpr, CONSUMER: gl.constexpr, ACTIVATION: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """A tile of up to HEIGHT rows.

    From 128 rows on a consumer multiplies 64 of them by all weights. Of what is less or left over both multiply all
    rows by half of the weights, transposed: weight rows fill the tensor core's side of 64, few rows its other side.
    """
    WIDE: gl.constexpr = HEIGHT >= 128
    FEW: gl.constexpr = HEIGHT % 128  # rows that are multiplied transposed
    STAGES: gl.constexpr = ring.STAGES
    w_pairs, w_halves = _weight_views(ring, outputs.TRANSPOSED)
    # Which quarters of a stage's weights this consumer multiplies, where both multiply all rows.
    FIRST: gl.constexpr = 2 * CONSUMER if outputs.INTERLEAVED else CONSUMER
    SECOND: gl.constexpr = FIRST + (1 if outputs.INTERLEAVED else 2)
    if WIDE:
        acc = gl.zeros([64, 256], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
        acc = add_biases(acc, outputs, tile, 1, 0, CONSUMER, ACTIVATION)
    if FEW:
        FEW_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FEW, 16])
        first = gl.zeros([64, FEW], gl.float32, FEW_LAYOUT)
        first = add_biases(first, outputs, tile, 0, 64 * FIRST, CONSUMER, ACTIVATION)
        second = gl.zeros([64, FEW], gl.float32, FEW_LAYOUT)
        second = add_biases(second, outputs, tile, 0, 64 * SECOND, CONSUMER, ACTIVATION)
    for k in range(depth):
        stage = step % STAGES
        mbarrier.wait(ring.full.index(stage), step // STAGES & 1)
        if GATHER:
            fence_async_shared()
        if WIDE:
            wide = ring.rows.index(2 * stage + CONSUMER)
            acc = warpgroup_mma(wide, _turned(w_pairs.index(stage), not outputs.TRANSPOSED), acc, is_async=True)
        if FEW:
            few = _few_rows(ring, stage, HEIGHT).permute((1, 0))
            w_first = _turned(w_halves.index(4 * stage + FIRST), outputs.TRANSPOSED)
            first = warpgroup_mma(w_first, few, first, is_async=True)
            w_second = _turned(w_halves.index(4 * stage + SECOND), outputs.TRANSPOSED)
            second = warpgroup_mma(w_second, few, second, is_async=True)
        # The products before these have read their stage.
        if WIDE and FEW:
            acc, first, second = warpgroup_mma_wait(3, deps=(acc, first, second))
        elif WIDE:
            acc = warpgroup_mma_wait(1, deps=(acc,))
        else:
            first, second = warpgroup_mma_wait(2, deps=(first, second))
        mbarrier.arrive(ring.empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
        step += 1
    if WIDE and FEW:
        acc, first, second = warpgroup_mma_wait(0, deps=(acc, first, second))
    elif WIDE:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    else:
        first, second = warpgroup_mma_wait(0, deps=(first, second))
    mbarrier.arrive(ring.empty.index((step + STAGES - 1) % STAGES))
    if WIDE:
        if outputs.ALTERNATING:
            left, right = gl.split(gl.reshape(acc, [64, 128, 2]))
        elif outputs.INTERLEAVED:
            left, right = gl.split(gl.permute(gl.reshape(acc, [64, 2, 2, 64]), [0, 1, 3, 2]))
            left = gl.reshape(left, [64, 128])
            right = gl.reshape(right, [64, 128])
        else:
            left, right = gl.split(gl.permute(gl.reshape(acc, [64, 2, 128]), [0, 2, 1]))
        _finish(left, right, 0, outputs, tile, 64 * CONSUMER, 0, CONSUMER, ACTIVATION)
    if FEW:
        _finish_few(first, second, outputs, tile, 128 if WIDE else 0, CONSUMER, ACTIVATION)
    return step


@gluon.jit
def _weight_views(ring, TRANSPOSED: gl.constexpr):
    """A ring's weights by stages, 256 rows each, and by quarters of stages; by columns where TRANSPOSED."""
    BLOCK_K: gl.constexpr = ring.rows.shape[2]
    LAYOUT: gl.constexpr = ring.rows.layout
    if TRANSPOSED:
        pairs = reinterpret(ring.weights, ring.weights.dtype, [ring.STAGES, BLOCK_K, 256], LAYOUT)
        halves = reinterpret(ring.weights, ring.weights.dtype, [4 * ring.STAGES, BLOCK_K, 64], LAYOUT)
    else:
        pairs = reinterpret(ring.weights, ring.weights.dtype, [ring.STAGES, 256, BLOCK_K], LAYOUT)
        halves = reinterpret(ring.weights, ring.weights.dtype, [4 * ring.STAGES, 64, BLOCK_K], LAYOUT)
    return pairs, halves


@gluon.jit
def _turned(buf, TURNED: gl.constexpr):
    """A matrix in shared memory, transposed or as it is."""
    if TURNED:
        buf = buf.permute((1, 0))
    return buf


@gluon.jit
def _finish_few(
    first, second, outputs, tile, ROW: gl.constexpr, CONSUMER: gl.constexpr, ACTIVATION: gl.constexpr
):  # fmt: skip
    """`_finish` of rows that were multiplied transposed."""
    if outputs.ALTERNATING:
        gate, up = _split_rows(first)
        _finish(gate, up, 1, outputs, tile, ROW, 64 * CONSUMER, CONSUMER, ACTIVATION)
        gate, up = _split_rows(second)
        _finish(gate, up, 1, outputs, tile, ROW, 64 * CONSUMER + 32, CONSUMER, ACTIVATION)
    else:
        _finish(first, second, 1, outputs, tile, ROW, 64 * CONSUMER, CONSUMER, ACTIVATION)


@gluon.constexpr_function
def _pairs_of_rows(columns):
    """A layout of ``[64, columns]`` with rows 2i and 2i + 1 in one thread.

    It is that of a product, but for the lowest bits of row and column, which register and lane have exchanged: threads
    of one warp can bring it about.
    """
    wide = [[0, 8 << bit] for bit in range((columns // 8).bit_length() - 1)]
    lanes = [[0, 2], [0, 4], [0, 1], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[1, 0], [8, 0], *wide], lanes, [[16, 0], [32, 0]], [], [64, columns])


@gluon.jit
def _split_rows(sums):
    """The even and the odd rows of ``[64, columns]``: two times ``[32, columns]``."""
    COLUMNS: gl.constexpr = sums.shape[1]
    LAYOUT: gl.constexpr = _pairs_of_rows(COLUMNS)
    pairs = gl.reshape(gl.convert_layout(sums, LAYOUT), [32, 2, COLUMNS])
    even, odd = gl.split(gl.permute(pairs, [0, 2, 1]))
    return even, odd


@gluon.jit
def _few_rows(ring, stage, HEIGHT: gl.constexpr):
    """A tile's rows that are multiplied transposed: what is beyond 128 of them, or the first HEIGHT."""
    if HEIGHT > 128:
        rows = ring.tails.index(stage)
    else:
        BLOCK_K: gl.constexpr = ring.rows.shape[2]
        VIEWS: gl.constexpr = 128 // HEIGHT  # of a stage's rows
        views = reinterpret(ring.rows, ring.rows.dtype, [VIEWS * ring.STAGES, HEIGHT, BLOCK_K], ring.rows.layout)
        rows = views.index(VIEWS * stage)
    return rows


@gluon.jit
def _finish(
    first, second, ROWS: gl.constexpr, outputs, tile, ROW: gl.constexpr, COLUMN: gl.constexpr,
    CONSUMER: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Store the products with 128 rows of a tile's weights and with the other 128, or of gate and up the activation.

    ROWS is the axis of rows: 0, or 1 where they are transposed. They begin at row ROW of the tile, and at
    column COLUMN of 128.
    """
    if ACTIVATION is not None:
        out = moe_activate(first, second, ACTIVATION)
        store_tile(out, ROWS, outputs, CONSUMER, tile.row + ROW, tile.end, tile.block_n * 128 + COLUMN)
    else:
        column = tile.block_n * 256 + COLUMN
        store_tile(first, ROWS, outputs, CONSUMER, tile.row + ROW, tile.end, column)
        store_tile(second, ROWS, outputs, CONSUMER, tile.row + ROW, tile.end, column + 128)
