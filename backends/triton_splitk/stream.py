# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""What both products share on the device: how a CTA finds its tokens, and the loop that streams weights past them.

The product is transposed. A decode expert has a handful of tokens and thousands of weight rows, so the rows take the
wide side of the tensor core and the tokens its narrow one:
acc[ROWS, BLOCK_M] = W[ROWS, BLOCK_K] @ xᵀ[BLOCK_K, BLOCK_M].
"""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.device import moe_fp8_parts, moe_fp8_unit, moe_prefetch_lines
from moe_dispatch.backends.triton_common.mxfp4 import (
    MOE_MXFP4_UNIT,
    moe_every_fourth,
    moe_mxfp4_factors,
    moe_mxfp4_values,
)

_LINE_BYTES = tl.constexpr(128)
_LEAST_N = tl.constexpr(8)  # columns of a product
# BF16 weights come divided by 2^120, so activations are multiplied by this to keep products within fp32's range: those
# below 2^-93 can vanish, those below 2^-70 lose bits, and activations of 2^64 or more become infinite. FP16 needs none.
_LIFT = tl.constexpr(2.0**64)


@triton.jit
def moe_slots_to_serve(ids_ptr, owner, S, E, BLOCK_M: tl.constexpr, SCAN: tl.constexpr, BY_SLOT: tl.constexpr):
    """A CTA's expert, and how many slots it serves: 0 if none.

    By slot it serves one group, if its slot leads it: if as many slots before it name the expert as fill whole groups.
    """
    e = owner
    stop = S
    if BY_SLOT:
        e = tl.load(ids_ptr + owner)
        stop = owner
    count = 0
    for first in range(0, stop, SCAN):
        offs_s = first + tl.arange(0, SCAN)
        ids = tl.load(ids_ptr + offs_s, mask=offs_s < stop, other=-1)
        count += tl.sum((ids == e).to(tl.int32), axis=0)
    if BY_SLOT:
        count = ((count % BLOCK_M == 0) & (e >= 0) & (e < E)).to(tl.int32)
    return e, count


@triton.jit
def moe_take_slots(ids_ptr, start, S, e, skip, BLOCK_M: tl.constexpr, SCAN: tl.constexpr):
    """The slots from `start` on that name expert `e`, less the first `skip` of them: ``[BLOCK_M]`` and its mask."""
    offs_m = skip + tl.arange(0, BLOCK_M)
    following = tl.zeros([BLOCK_M], dtype=tl.int32)
    seen = 0
    for first in range(start, S, SCAN):
        offs_s = first + tl.arange(0, SCAN)
        ids = tl.load(ids_ptr + offs_s, mask=offs_s < S, other=-1)
        mine = (ids == e).to(tl.int32)
        rank = seen + tl.cumsum(mine, axis=0) - mine
        # Each rank belongs to one slot, so the sum over slots picks rather than adds.
        hit = (mine[None, :] != 0) & (rank[None, :] == offs_m[:, None])  # [BLOCK_M, SCAN]
        following += tl.sum(tl.where(hit, offs_s[None, :] + 1, 0), axis=1)
        seen += tl.sum(mine, axis=0)
    taken = following > 0
    return tl.where(taken, following - 1, 0), taken


@triton.jit
def moe_list(list_ptr, first, values, mask):
    """Write a count, or slots after it, into the list of an expert's slots, where there is one."""
    if list_ptr is not None:
        tl.store(list_ptr + first, values, mask=mask)


@triton.jit
def moe_listed_slots(list_ptr, count, skip, BLOCK_M: tl.constexpr):
    """Of a list, a count and as many slots, the slots after the first `skip`: ``[BLOCK_M]`` and its mask."""
    offs_m = skip + tl.arange(0, BLOCK_M)
    mask_m = offs_m < count
    return tl.load(list_ptr + 1 + offs_m, mask=mask_m, other=0), mask_m


@triton.jit
def moe_prefetch(w_rows, w_step, first_block, blocks, K, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Bring the first two blocks of each weight row to the L2 without waiting for them, if there are any.

    Where TRANSPOSED, `w_rows` holds those of `moe_line_rows`, whose cache lines have the rows after them, too.
    """
    if first_block < blocks:
        if TRANSPOSED:
            columns = tl.minimum(first_block * BLOCK_K + tl.arange(0, 2 * BLOCK_K), K - 1) * w_step
        else:
            bits: tl.constexpr = w_rows.dtype.element_ty.primitive_bitwidth
            step: tl.constexpr = _LINE_BYTES * 8 // bits
            lines: tl.constexpr = 2 * BLOCK_K // step if step < 2 * BLOCK_K else 1
            columns = tl.minimum(first_block * BLOCK_K + tl.arange(0, lines) * step, K - 1)
        moe_prefetch_lines(w_rows[:, None] + columns[None, :])  # [ROWS, lines]


@triton.jit
def moe_line_rows(weight_ptr, ROWS: tl.constexpr, RUN: tl.constexpr):
    """Of a tile's rows, RUN of which lie side by side in a column, those with which a cache line may begin."""
    line: tl.constexpr = _LINE_BYTES * 8 // weight_ptr.dtype.element_ty.primitive_bitwidth
    step: tl.constexpr = line if line < RUN else RUN  # noqa: FURB136 - Triton has no min of constants
    return tl.arange(0, ROWS // step) * step


@triton.jit
def _moe_weights(
    w_rows, mask_r, w_step, w_descriptor, w_first, w_second, block, offs_k, K,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """A block of a tile's weights ``[ROWS, BLOCK_K]``: those at the columns `offs_k`."""
    if TMA and TRANSPOSED:
        w = w_descriptor.load([w_first, block * BLOCK_K, w_second]).reshape(BLOCK_K, ROWS).trans()
    elif TMA:
        w = w_descriptor.load([w_first, w_second, block * BLOCK_K]).reshape(ROWS, BLOCK_K)
    elif TRANSPOSED:
        mask = mask_r[:, None] if EVEN_K else mask_r[:, None] & (offs_k < K)[None, :]
        w = tl.load(w_rows[:, None] + (offs_k * w_step)[None, :], mask=mask, other=0.0)
    elif EVEN_K:
        w = tl.load(w_rows[:, None] + offs_k[None, :])
    else:
        # Columns past K belong to the next row, and a NaN there would survive the product with zero.
        w = tl.load(w_rows[:, None] + offs_k[None, :], mask=(offs_k < K)[None, :], other=0.0)
    return w


@triton.jit
def _moe_stream(
    # weights: row pointers (if TRANSPOSED with a mask and the stride of columns) or a descriptor with the tile's place
    # in it, and where the scales of rows begin
    w_rows, mask_r, w_step, w_descriptor, w_first, w_second, w_scales, up_scales, is_up,
    # token operand, which of its rows, int64, and where their multipliers begin; None where it is not quantised
    x_ptr, offs_x, x_scales, mask_m,
    # shapes
    first_block, last_block, K,
    # constants
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    TRANSPOSED: tl.constexpr, SCALES: tl.constexpr, TWO_SCALES: tl.constexpr,
):  # fmt: skip
    """The fp32 product ``[ROWS, BLOCK_M]`` of a tile's weights and the token operand over blocks of K.

    Weights with a scale per block are multiplied as codes, or as the codes' exact values where the token operand is not
    quantised, and scales multiply the fp32 result of each block: that rounds no weight and costs ROWS·BLOCK_M
    multiplications instead of ROWS·BLOCK_K. Those with a scale per row, whose token operand has one per token, need
    scales at the end alone.

    Dequantised weights are multiplied as they come from `moe_fp8_parts`, and their marks of NaN by ones: a row with NaN
    is NaN for all tokens, as it is if NaN itself is multiplied.

    Where TWO_SCALES, rows share the scales at `w_scales`, or at `up_scales` if `is_up`; else each has its own.
    """
    acc = tl.zeros([ROWS, BLOCK_M], dtype=tl.float32)
    if SCALES == "channel":
        w_scale = tl.load(w_scales)
        if x_scales is not None:
            x_scale = tl.load(x_scales, mask=mask_m, other=0.0)
    if SCALES == "block":
        w_scale = tl.load(w_scales + first_block)
        up_scale = tl.load(up_scales + first_block)
        if x_scales is not None:
            x_scale = tl.load(x_scales + first_block, mask=mask_m, other=0.0)
    x_rows = x_ptr + offs_x * K
    DEQUANTIZES: tl.constexpr = w_rows.dtype.element_ty == tl.uint8
    LIFT: tl.constexpr = _LIFT if x_ptr.dtype.element_ty == tl.bfloat16 else 1.0
    if DEQUANTIZES:
        nan = tl.zeros([ROWS, _LEAST_N], dtype=tl.int32)
    for block in range(first_block, last_block):
        offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = mask_m[:, None] if EVEN_K else mask_m[:, None] & (offs_k < K)[None, :]
        x = tl.load(x_rows[:, None] + offs_k[None, :], mask=mask, other=0.0)
        w = _moe_weights(
            w_rows, mask_r, w_step, w_descriptor, w_first, w_second, block, offs_k, K,
            ROWS, BLOCK_K, EVEN_K, TMA, TRANSPOSED,
        )  # fmt: skip
        if DEQUANTIZES:
            w, marks = moe_fp8_parts(w, x.dtype)
            nan = tl.dot(marks, tl.full([BLOCK_K, _LEAST_N], 1, tl.int8), nan, out_dtype=tl.int32)
            if LIFT != 1.0:
                x *= LIFT
        if SCALES == "block":
            # The next block's scales are on their way while this one is multiplied.
            # A scalar needs no exchange between threads.
            row_scale = tl.where(is_up, up_scale, w_scale) if TWO_SCALES else w_scale  # [ROWS]
            scale = row_scale[:, None]
            following = tl.minimum(block + 1, last_block - 1)
            w_scale = tl.load(w_scales + following)
            up_scale = tl.load(up_scales + following)
            if x_scales is not None:
                scale = scale * x_scale[None, :]
                x_scale = tl.load(x_scales + following, mask=mask_m, other=0.0)
            acc += tl.dot(w, x.trans()) * scale
        elif x_scales is not None:
            # Added in fp32 after each block: tensor cores of sm_90 keep some 14 bits of a sum of e4m3 products.
            acc += tl.dot(w, x.trans())
        else:
            acc = tl.dot(w, x.trans(), acc, input_precision="ieee")
    if SCALES == "channel":
        acc *= w_scale[:, None]
        if x_scales is not None:
            acc *= x_scale[None, :]
    if DEQUANTIZES:
        acc = tl.where(
            (tl.min(nan, axis=1) < 0)[:, None], float("nan"), acc * (moe_fp8_unit(x_ptr.dtype.element_ty) / LIFT)
        )
    return acc


@triton.jit
def moe_stream(
    # as those of `_moe_stream`
    w_rows, mask_r, w_step, w_descriptor, w_first, w_second, w_scales, up_scales, is_up,
    x_ptr, offs_x, x_scales, mask_m,
    first_block, last_block, K,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    TRANSPOSED: tl.constexpr, SCALES: tl.constexpr, TWO_SCALES: tl.constexpr,
):  # fmt: skip
    """As `_moe_stream`; where dequantised weights meet no more than half of 16 or 32 tokens, over the first half alone.

    Instructions are the limit there, and a tenth of those of 16 tokens are for the second half.
    """
    HALF: tl.constexpr = BLOCK_M // 2
    halves: tl.constexpr = w_rows.dtype.element_ty == tl.uint8 and BLOCK_M % 16 == 0 and BLOCK_M < 64
    if halves and tl.sum(mask_m.to(tl.int32), axis=0) <= HALF:
        offs_half, _ = tl.permute(tl.reshape(offs_x, [2, HALF]), (1, 0)).split()
        mask_half, _ = tl.permute(tl.reshape(mask_m, [2, HALF]), (1, 0)).split()
        half = _moe_stream(
            w_rows, mask_r, w_step, w_descriptor, w_first, w_second, w_scales, up_scales, is_up,
            x_ptr, offs_half, x_scales, mask_half, first_block, last_block, K,
            ROWS, HALF, BLOCK_K, EVEN_K, TMA, TRANSPOSED, SCALES, TWO_SCALES,
        )  # fmt: skip
        acc = tl.join(half, tl.zeros([ROWS, HALF], dtype=tl.float32))
        acc = tl.reshape(tl.permute(acc, (0, 2, 1)), [ROWS, BLOCK_M])
    else:
        acc = _moe_stream(
            w_rows, mask_r, w_step, w_descriptor, w_first, w_second, w_scales, up_scales, is_up,
            x_ptr, offs_x, x_scales, mask_m, first_block, last_block, K,
            ROWS, BLOCK_M, BLOCK_K, EVEN_K, TMA, TRANSPOSED, SCALES, TWO_SCALES,
        )  # fmt: skip
    return acc


@triton.jit
def _moe_exponents(w_exponents, block, ROW_SCALES: tl.constexpr, BLOCK_K: tl.constexpr):
    """Exponents of a block of rows, ``[ROWS, BLOCK_K/32]``; 0 past the last one, where they meet codes of zero.

    Masked rather than clamped, by constants: the compiler then sees which bytes lie side by side, and has neighbouring
    lanes read two each. If lanes read a row each, a warp looks up 32 cache lines for each byte of a row.
    """
    offs_s = block * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
    return tl.load(w_exponents[:, None] + offs_s[None, :], mask=(offs_s < ROW_SCALES)[None, :], other=0)


@triton.jit
def moe_stream_mxfp4(
    # weights: row pointers or a descriptor with the tile's place in it, and pointers to the rows' exponents
    w_rows, w_descriptor, w_first, w_second, w_exponents,
    # token operand: row pointers
    x_rows, mask_m,
    # shapes
    first_block, last_block, K,
    # constants
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    ROW_SCALES: tl.constexpr,
):  # fmt: skip
    """As `moe_stream`, of MXFP4 weights, four codes in an int16, and activations that are not quantised."""
    dtype: tl.constexpr = x_rows.dtype.element_ty
    x_words = x_rows.to(tl.pointer_type(tl.int64))
    acc = tl.zeros([ROWS, BLOCK_M], dtype=tl.float32)
    factors = moe_mxfp4_factors(_moe_exponents(w_exponents, first_block, ROW_SCALES, BLOCK_K))
    exponents = _moe_exponents(w_exponents, first_block + 1, ROW_SCALES, BLOCK_K)
    # Pointers that advance: the pipeline would compute those of each of its first stages apart, and all of them would
    # stay in registers from one group of tokens to the next.
    offs_w = first_block * (BLOCK_K // 4) + tl.arange(0, BLOCK_K // 4)
    x_ptrs = x_words[:, None] + offs_w[None, :]
    if not TMA:
        w_ptrs = w_rows[:, None] + offs_w[None, :]
    for block in range(first_block, last_block):
        mask_k = (block * (BLOCK_K // 4) + tl.arange(0, BLOCK_K // 4) < K // 4)[None, :]
        x = tl.load(x_ptrs, mask=mask_m[:, None] if EVEN_K else mask_m[:, None] & mask_k, other=0)
        x_ptrs += BLOCK_K // 4
        # Triton's pipeline leaves bytes out: those of the block after the next are on their way while this one is
        # multiplied. Those of the next become factors here, each in one thread, and not in all that need it.
        now = factors
        factors = moe_mxfp4_factors(exponents)
        exponents = _moe_exponents(w_exponents, block + 2, ROW_SCALES, BLOCK_K)
        if TMA:
            w = w_descriptor.load([w_first, w_second, block * (BLOCK_K // 4)]).reshape(ROWS, BLOCK_K // 4)
        else:
            w = tl.load(w_ptrs) if EVEN_K else tl.load(w_ptrs, mask=mask_k, other=0)
            w_ptrs += BLOCK_K // 4
        w0, w1, w2, w3 = moe_mxfp4_values(w, now, dtype, ROWS, BLOCK_K)
        x0, x1, x2, x3 = moe_every_fourth(x, dtype)
        acc = tl.dot(w0, x0.trans(), acc)
        acc = tl.dot(w1, x1.trans(), acc)
        acc = tl.dot(w2, x2.trans(), acc)
        acc = tl.dot(w3, x3.trans(), acc)
    return acc * MOE_MXFP4_UNIT
