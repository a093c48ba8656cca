# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The two grouped products of MXFP4 weights and BF16 rows for Hopper, in Gluon; `common` describes roles and barriers.

A product is transposed: codes of weights become BF16 in the registers from which the tensor core reads its first
operand, so that converted weights never pass through shared memory; rows are the second operand. Each consumer
multiplies all rows of a tile by two operands of 64 weight rows: of gate and up, or of down. While one is multiplied it
converts the next.

The order in which columns are summed is free. A thread loads 16 bytes of a row: 32 columns with one exponent, of a
stage's 128, which the four threads of a row share. The operand has them in the order that `order_columns` gives to x,
and the first product to its result.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from moe_dispatch.backends.gluon_hopper import tiles
from moe_dispatch.backends.gluon_hopper.common import (
    Ring,
    make_barriers,
    receive_tile,
    schedule_tiles,
    store_tile,
)
from moe_dispatch.backends.gluon_hopper.gluon_api import aggregate, field, reinterpret
from moe_dispatch.backends.gluon_hopper.mxfp4_product_loader import load_mxfp4_tiles
from moe_dispatch.backends.triton_common.device import moe_activate
from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.mxfp4 import MOE_MXFP4_UNIT

_TAIL_M = gl.constexpr(tiles.TAIL_M)
_BLOCK_K = gl.constexpr(tiles.MXFP4_BLOCK_K)
_CODES = gl.constexpr(tiles.MXFP4_BLOCK_K // 2)  # bytes of a row in a stage

# Two words of four codes and a factor, twice, become four pairs of BF16: `triton_common.mxfp4` explains the steps.
_PARTS = [(word, *part) for word in ("$4", "upper") for part in (("0x000F000F", "0x1040"), ("0x00F000F0", "0x0104"))]
_CODES_TO_BF16 = gl.constexpr(
    "{ .reg .b32 upper, code; shr.u32 upper, $4, 8; "
    + "".join(
        f"and.b32 code, {word}, {mask}; mul.lo.u32 code, code, {shifts}; and.b32 code, code, 0x81C081C0; "
        f"mul.rn.bf16x2 ${part}, code, $5; "
        for part, (word, mask, shifts) in enumerate(_PARTS)
    )
    + "}"
)


@aggregate
class Product:
    """The weights of a product and its result.

    Attributes:
        codes: Descriptor of the weights, see `windows.ExpertCodes`.
        exponents: Pointer to the exponents of all experts' rows.
        biases: Pointer to the biases of all experts' rows; None without.
        N: Columns of the result.
        K: Columns of the weights.
        ptr: Pointer to the result, row-major.
        columns: Columns of the result in memory: N, or whole blocks of 128 where they are ordered.
        bufs: Shared memory ``[2, rows, 64]`` through which each consumer stores.
        ACTIVATION: Of gate and up rows; None of the second product.
        INTERLEAVED: Whether gate and up rows alternate.
    """

    codes: tma.tensor_descriptor
    exponents: gl.tensor
    biases: gl.tensor | gl.constexpr
    N: gl.tensor | gl.constexpr
    K: gl.tensor | gl.constexpr
    ptr: gl.tensor
    columns: gl.tensor | gl.constexpr
    bufs: gl.shared_memory_descriptor
    ACTIVATION: gl.constexpr
    INTERLEAVED: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, codes, exponents, biases, N, K, ptr, columns, bufs, ACTIVATION, INTERLEAVED):
        self.codes = codes
        self.exponents = exponents
        self.biases = field(biases)
        self.N = field(N)
        self.K = field(K)
        self.ptr = ptr
        self.columns = field(columns)
        self.bufs = bufs
        self.ACTIVATION = gl.constexpr(ACTIVATION)
        self.INTERLEAVED = gl.constexpr(INTERLEAVED)


@fast_launch
@gluon.jit
def _moe_hopper_mxfp4_product_kernel(
    # inputs
    x_desc, tail_desc, codes_desc, exponents_ptr, bias_ptr, blocks_ptr, counts_ptr,
    # outputs
    out_ptr,
    # shapes
    n_blocks, N, K, columns,
    # constants
    COUNTER: gl.constexpr, ACTIVATION: gl.constexpr, INTERLEAVED: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Rows of `x_desc` are in the order of experts and their columns ordered; tiles of 64 rows have no tail."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    rows = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, BLOCK_M, 64], LAYOUT)
    tails = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES if BLOCK_M == 128 else 1, _TAIL_M, 64], LAYOUT)
    weights = gl.allocate_shared_memory(gl.uint8, [2 * STAGES, 128, _CODES], gl.NVMMASharedLayout(64, 8, 2))
    bufs = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK_M, 64], LAYOUT)
    queue, full, empty = make_barriers(STAGES, 1, False)
    ring = Ring(rows, tails, weights, full, empty, STAGES)
    product = Product(codes_desc, exponents_ptr, bias_ptr, N, K, out_ptr, columns, bufs, ACTIVATION, INTERLEAVED)
    gl.warp_specialize(
        [
            (_consume, (queue, ring, product, 0)),
            (_consume, (queue, ring, product, 1)),
            (load_mxfp4_tiles, (queue, ring, product, x_desc, tail_desc)),
            (schedule_tiles, (queue, blocks_ptr, counts_ptr, n_blocks, COUNTER)),
        ],
        [4, 1, 1],
        [232, 40, 40],
    )


@gluon.jit
def _consume(queue, ring, product, CONSUMER: gl.constexpr):
    """One of the two consumers, CONSUMER 0 or 1."""
    BLOCK_M: gl.constexpr = ring.rows.shape[1]
    i = 0
    step = 0
    tile = receive_tile(queue, i)
    while tile.end > 0:
        count = tile.end - tile.row
        if BLOCK_M > 64 and count > 128:
            step = _multiply(ring, product, tile, step, 128 + _TAIL_M, CONSUMER)
        elif BLOCK_M > 64 and count > 64:
            step = _multiply(ring, product, tile, step, 128, CONSUMER)
        elif count > 32:
            step = _multiply(ring, product, tile, step, 64, CONSUMER)
        elif BLOCK_M > 64 or count > 16:
            step = _multiply(ring, product, tile, step, 32, CONSUMER)
        else:
            step = _multiply(ring, product, tile, step, 16, CONSUMER)
        i += 1
        tile = receive_tile(queue, i)


@gluon.jit
def _multiply(ring, product, tile, step, HEIGHT: gl.constexpr, CONSUMER: gl.constexpr):
    """A tile of up to HEIGHT rows."""
    STAGES: gl.constexpr = ring.STAGES
    TALL: gl.constexpr = HEIGHT > 128
    ROWS: gl.constexpr = 128 if TALL else HEIGHT
    VIEWS: gl.constexpr = ring.rows.shape[1] // ROWS  # of a panel
    codes = reinterpret(ring.weights, gl.int16, [4 * STAGES, 64, _BLOCK_K // 4], gl.NVMMASharedLayout(64, 16, 2))
    rows = reinterpret(ring.rows, gl.bfloat16, [2 * STAGES * VIEWS, ROWS, 64], ring.rows.layout)
    depth = gl.cdiv(product.K, _BLOCK_K)
    first = _no_sums(ROWS, TALL)
    second = _no_sums(ROWS, TALL)
    first_exponents = _exponents(product, tile, 0, CONSUMER, 0)
    second_exponents = _exponents(product, tile, 1, CONSUMER, 0)
    stage = step % STAGES
    mbarrier.wait(ring.full.index(stage), step // STAGES & 1)
    first_factor = _factors(first_exponents)
    second_factor = _factors(second_exponents)
    first_codes = _words(codes.index(4 * stage + 2 * CONSUMER))
    operand = _operand(first_codes[0], first_factor, ROWS)
    for k in range(depth):
        stage = step % STAGES
        first_exponents = _exponents(product, tile, 0, CONSUMER, k + 1)  # a step ahead
        second_exponents = _exponents(product, tile, 1, CONSUMER, k + 1)
        first = _issue(operand, rows, ring.tails, 2 * stage, VIEWS, first)
        second_codes = _words(codes.index(4 * stage + 2 * CONSUMER + 1))
        operand = _operand(second_codes[0], second_factor, ROWS)
        first, second = _await(first, second)
        second = _issue(operand, rows, ring.tails, 2 * stage, VIEWS, second)
        operand = _operand(first_codes[1], first_factor, ROWS)
        first, second = _await(first, second)
        first = _issue(operand, rows, ring.tails, 2 * stage + 1, VIEWS, first)
        operand = _operand(second_codes[1], second_factor, ROWS)
        first, second = _await(first, second)
        second = _issue(operand, rows, ring.tails, 2 * stage + 1, VIEWS, second)
        more = k + 1 < depth  # else this stage's first operand is converted again, for nothing
        step += 1
        following = gl.where(more, step % STAGES, stage)
        mbarrier.wait(ring.full.index(following), step // STAGES & 1, pred=more)
        first_factor = _factors(first_exponents)
        second_factor = _factors(second_exponents)
        first_codes = _words(codes.index(4 * following + 2 * CONSUMER))
        operand = _operand(first_codes[0], first_factor, ROWS)
        # ptxas waits for each product by itself where one is in flight at the end of a loop.
        first, second = _await(first, second)
        mbarrier.arrive(ring.empty.index(stage))
    _finish(first[0], second[0], product, tile, 0, CONSUMER)
    if TALL:
        _finish(first[1], second[1], product, tile, 128, CONSUMER)
    return step


@gluon.constexpr_function
def _sums_layout(rows):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, rows, 16])


@gluon.jit
def _no_sums(ROWS: gl.constexpr, TALL: gl.constexpr):
    """Sums of an operand with a tile's rows, and where it is TALL those with its tail."""
    sums = gl.zeros([64, ROWS], gl.float32, _sums_layout(ROWS))
    return (sums, gl.zeros([64, _TAIL_M], gl.float32, _sums_layout(_TAIL_M))) if TALL else (sums,)


@gluon.jit
def _issue(operand, rows, tails, panel, VIEWS: gl.constexpr, sums):
    """Begin to add the products of an operand and a panel to its sums."""
    wide = warpgroup_mma(operand, rows.index(panel * VIEWS).permute((1, 0)), sums[0], is_async=True)
    if len(sums) == 2:
        operand = gl.convert_layout(operand, gl.DotOperandLayout(0, _sums_layout(_TAIL_M), 2), assert_trivial=True)
        return (wide, warpgroup_mma(operand, tails.index(panel).permute((1, 0)), sums[1], is_async=True))
    else:  # noqa: RET505 - what follows a return is compiled, too
        return (wide,)


@gluon.jit
def _await(first, second):
    """The sums once their products are done."""
    if len(first) == 2:
        wide, tail, second_wide, second_tail = warpgroup_mma_wait(0, deps=(first[0], first[1], second[0], second[1]))
        return (wide, tail), (second_wide, second_tail)
    else:  # noqa: RET505 - what follows a return is compiled, too
        wide, second_wide = warpgroup_mma_wait(0, deps=(first[0], second[0]))
        return (wide,), (second_wide,)


@gluon.constexpr_function
def _word_layout():
    """Rows, exponents and words of four codes ``[64, 4, 4]`` of a panel, as the tensor core reads its operand.

    The two rows of a thread differ in bit 2: of gate and up their columns are stored side by side, and of down, too,
    as bits 0 and 2 of its rows change places when they are loaded.
    """
    return gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [4, 0, 0]], [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [8, 0, 0]],
        [[16, 0, 0], [32, 0, 0]], [], [64, 4, 4],
    )  # fmt: skip


@gluon.jit
def _words(buf):
    """The words of an operand's codes in a stage, for its first and its second panel: ``[64, 4, 4]`` both."""
    LAYOUT: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [4, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [8, 0]], [[16, 0], [32, 0]], [], [64, 32]
    )
    first, second = gl.split(gl.permute(gl.reshape(buf.load(LAYOUT), [64, 4, 2, 4]), [0, 1, 3, 2]))
    first = gl.convert_layout(first, _word_layout(), assert_trivial=True)
    second = gl.convert_layout(second, _word_layout(), assert_trivial=True)
    return first, second


@gluon.jit
def _operand(words, factor, ROWS: gl.constexpr):
    """The weights of 64 rows and a panel's columns, as the tensor core reads them from registers: ``[64, 64]``."""
    c0, c1, c2, c3 = gl.inline_asm_elementwise(
        _CODES_TO_BF16, "=r,=r,=r,=r,r,r", [words, factor],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=2,
    )  # fmt: skip
    values = gl.join(gl.join(c0, c1), gl.join(c2, c3))
    # Rows by bits 5 and 4, 3, 2, 1, 0; blocks; bits 1 and 0 of the word, 0 and 1 of the code.
    values = gl.permute(gl.reshape(values, [4, 2, 2, 2, 2, 4, 2, 2, 2, 2]), [0, 2, 1, 3, 4, 9, 8, 6, 5, 7])
    LAYOUT: gl.constexpr = gl.DotOperandLayout(0, _sums_layout(ROWS), 2)
    return gl.convert_layout(gl.reshape(values, [64, 64]), LAYOUT, assert_trivial=True)


@gluon.jit
def _weight_row(row, product, tile, HALF: gl.constexpr, CONSUMER: gl.constexpr):
    """The row of an expert's weights that is this one of an operand, and the column of the result."""
    if product.ACTIVATION is None:
        column = tile.block_n * 256 + CONSUMER * 128 + HALF * 64 + (row & 58 | row >> 2 & 1 | row << 2 & 4)
        return column, column
    else:  # noqa: RET505 - what follows a return is compiled, too
        column = tile.block_n * 128 + row // 16 * 32 + CONSUMER * 16 + row % 16
        return (2 * column + HALF if product.INTERLEAVED else HALF * product.N + column), column


@gluon.jit
def _exponents(product, tile, HALF: gl.constexpr, CONSUMER: gl.constexpr, k):
    """The exponents of an operand's rows in a stage ``[64, 4]``.

    Rows past N and columns past K, whose codes are zero or whose sums are not stored, repeat others'.
    """
    row = gl.arange(0, 64, gl.SliceLayout(1, gl.SliceLayout(2, _word_layout())))
    w_row, column = _weight_row(row, product, tile, HALF, CONSUMER)
    w_row = gl.where(column < product.N, w_row, 0)
    offs_s = k * 4 + gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, _word_layout())))
    blocks = product.K // 32
    HALVES: gl.constexpr = 1 if product.ACTIVATION is None else 2
    expert = product.exponents + tile.e.to(gl.int64) * (HALVES * product.N) * blocks
    return gl.load(expert + ((w_row * blocks)[:, None] + gl.minimum(offs_s, blocks - 1)[None, :]))


@gluon.jit
def _factors(exponents):
    """The factors of codes as BF16 ``[64, 4, 1]``, see `moe_mxfp4_values`."""
    bits = exponents.to(gl.int32)
    return gl.expand_dims(gl.where(bits > 160, 0x7FC0, (bits + 94) << 7).to(gl.int16), 2)


@gluon.jit
def _finish(first, second, product, tile, ROW: gl.constexpr, CONSUMER: gl.constexpr):
    """Store both products, or the activation of gate and up, of rows that begin at row ROW of the tile."""
    # A product's row has the bits 5, 4, 2, 3, 1, 0 of its operand's.
    m = gl.arange(0, 64, gl.SliceLayout(1, first.type.layout))
    row = m & 51 | m >> 1 & 4 | m << 1 & 8
    first = _with_biases(first, row, product, tile, 0, CONSUMER)
    second = _with_biases(second, row, product, tile, 1, CONSUMER)
    if product.ACTIVATION is None:
        column = tile.block_n * 256 + CONSUMER * 128
        _store(first, product, tile, ROW, column, CONSUMER, [0, 1, 3, 5, 4, 2, 6])
        _store(second, product, tile, ROW, column + 64, CONSUMER, [0, 1, 3, 5, 4, 2, 6])
    else:
        _, column = _weight_row(row, product, tile, 0, CONSUMER)
        out = moe_activate(first, second, product.ACTIVATION)
        # The second product reads columns past N, which must not be NaN.
        out = gl.where((column < product.N)[:, None], out, 0.0)
        _store(out, product, tile, ROW, tile.block_n * 128 + CONSUMER * 64, CONSUMER, [4, 5, 3, 0, 1, 2, 6])


@gluon.jit
def _with_biases(sums, row, product, tile, HALF: gl.constexpr, CONSUMER: gl.constexpr):
    sums = sums * MOE_MXFP4_UNIT
    if product.biases is not None:
        w_row, column = _weight_row(row, product, tile, HALF, CONSUMER)
        HALVES: gl.constexpr = 1 if product.ACTIVATION is None else 2
        biases = product.biases + tile.e * (HALVES * product.N)
        sums += gl.load(biases + w_row, mask=column < product.N, other=0.0).to(gl.float32)[:, None]
    return sums


@gluon.jit
def _store(values, product, tile, ROW: gl.constexpr, column, CONSUMER: gl.constexpr, ORDER: gl.constexpr):
    """Store a product's rows as columns, whose bits are those of its rows in this order."""
    ROWS: gl.constexpr = values.shape[1]
    values = gl.permute(gl.reshape(values, [2, 2, 2, 2, 2, 2, ROWS]), ORDER)
    store_tile(gl.reshape(values, [64, ROWS]), 1, product, CONSUMER, tile.row + ROW, tile.end, column)
