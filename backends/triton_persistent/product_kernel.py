# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The grouped product. A launch is one wave of programs that loop over the tiles of all experts.

Rows lie in the order of experts without padding (see `stages.route`). Which tiles there are depends on the routing, so
every program computes its share on the device (see `tiles_kernel`).
"""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.device import (
    moe_activate,
    moe_fp8_amax,
    moe_fp8_codes,
    moe_fp8_scale,
    moe_fp8_values,
)
from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.mxfp4 import MOE_MXFP4_UNIT, moe_mxfp4_values
from moe_dispatch.backends.triton_common.pdl import moe_pdl_wait_and_release
from moe_dispatch.backends.triton_persistent.tiles_kernel import count_blocks, find_tile


@fast_launch
@triton.jit
def _moe_product_kernel(
    # inputs
    x_ptr,
    x_scale_ptr,
    w,
    w_scale_ptr,
    bias_ptr,
    slot_of_row_ptr,
    starts_ptr,
    ends_ptr,
    # outputs
    y_ptr,
    y_scale_ptr,
    # shapes
    N,
    K,
    E,
    # constants
    TOPK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HALVES: tl.constexpr,
    RUN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SCALES: tl.constexpr,
    SCALAR_SCALE: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ORDER: tl.constexpr,
    GROUP_M: tl.constexpr,
    E_POW2: tl.constexpr,
    FLATTEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute y = activation(x @ wᵀ) for every row; with a gate, activation(x @ gateᵀ, x @ upᵀ) of the two HALVES of w.

    A tile's operand is ``HALVES · BLOCK_N`` rows of w, RUN of gate and RUN of up in turn: one product gives both, and
    the gate and the up of each element are in one thread's registers. Where a group of 128 quantised columns is two
    tiles, a program computes one after the other.

    With FLATTEN the loops over tiles and over K are one loop, whose software pipeline fetches the next tile's operands
    while this tile's result is stored. Without it, the rows of the next tile are looked up before this one's products:
    its first loads of x would wait for their slots otherwise.
    """
    moe_pdl_wait_and_release(PDL)
    GROUP_TILES: tl.constexpr = 128 // BLOCK_N if y_scale_ptr is not None else 1
    tl.static_assert(GROUP_TILES <= 2, "a group of 128 columns is one tile or two")
    starts, ends, blocks, blocks_up_to = count_blocks(starts_ptr, ends_ptr, E, E_POW2, BLOCK_M)
    m_blocks = tl.sum(blocks, 0)
    n_blocks = tl.cdiv(N, BLOCK_N * GROUP_TILES)
    mine = tl.cdiv(tl.maximum(m_blocks * n_blocks - tl.program_id(0), 0), tl.num_programs(0))
    if FLATTEN:
        for i in tl.range(0, mine, flatten=True):
            e, block_n, offs_m, mask_m, source = find_tile(
                tl.program_id(0) + i * tl.num_programs(0), m_blocks, n_blocks, starts, ends, blocks, blocks_up_to,
                slot_of_row_ptr, ORDER, GROUP_M, BLOCK_M,
            )  # fmt: skip
            _write_tile(
                x_ptr, x_scale_ptr, w, w_scale_ptr, bias_ptr, y_ptr, y_scale_ptr, e, block_n, offs_m, mask_m, source,
                N, K, TOPK, ACTIVATION, HALVES, RUN, INTERLEAVED, TRANSPOSED, SCALES, SCALAR_SCALE, EVEN_K, TMA,
                GROUP_TILES, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        e, block_n, offs_m, mask_m, source = find_tile(
            tl.program_id(0), m_blocks, n_blocks, starts, ends, blocks, blocks_up_to,
            slot_of_row_ptr, ORDER, GROUP_M, BLOCK_M,
        )  # fmt: skip
        for i in tl.range(0, mine):
            next_e, next_block_n, next_offs_m, next_mask_m, next_source = find_tile(
                tl.program_id(0) + (i + 1) * tl.num_programs(0), m_blocks, n_blocks, starts, ends, blocks, blocks_up_to,
                slot_of_row_ptr, ORDER, GROUP_M, BLOCK_M,
            )  # fmt: skip
            _write_tile(
                x_ptr, x_scale_ptr, w, w_scale_ptr, bias_ptr, y_ptr, y_scale_ptr, e, block_n, offs_m, mask_m, source,
                N, K, TOPK, ACTIVATION, HALVES, RUN, INTERLEAVED, TRANSPOSED, SCALES, SCALAR_SCALE, EVEN_K, TMA,
                GROUP_TILES, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            e, block_n, offs_m, mask_m, source = next_e, next_block_n, next_offs_m, next_mask_m, next_source


@triton.jit
def _write_tile(
    x_ptr, x_scale_ptr, w, w_scale_ptr, bias_ptr, y_ptr, y_scale_ptr, e, block_n, offs_m, mask_m, source, N, K,
    TOPK: tl.constexpr, ACTIVATION: tl.constexpr, HALVES: tl.constexpr, RUN: tl.constexpr, INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr, SCALES: tl.constexpr, SCALAR_SCALE: tl.constexpr, EVEN_K: tl.constexpr,
    TMA: tl.constexpr, GROUP_TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute and store a tile, or the two of a group of quantised columns."""
    if TOPK > 0:
        source = source // TOPK
    first_n = block_n * GROUP_TILES * BLOCK_N
    y = _compute_tile(
        x_ptr, x_scale_ptr, w, w_scale_ptr, bias_ptr, e, source, mask_m, first_n, N, K, ACTIVATION, HALVES, RUN,
        INTERLEAVED, TRANSPOSED, SCALES, SCALAR_SCALE, EVEN_K, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if SCALES == "mx" and ACTIVATION is not None:
        _store_ordered(y, y_ptr, offs_m, mask_m, first_n, N, BLOCK_M, BLOCK_N, BLOCK_K)
    elif y_scale_ptr is None:
        _store(y, y_ptr, offs_m, mask_m, first_n, N, BLOCK_N)
    else:
        second = y
        if GROUP_TILES == 2:
            second = _compute_tile(
                x_ptr, x_scale_ptr, w, w_scale_ptr, bias_ptr, e, source, mask_m, first_n + BLOCK_N, N, K, ACTIVATION,
                HALVES, RUN, INTERLEAVED, TRANSPOSED, SCALES, SCALAR_SCALE, EVEN_K, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        _store_group(y, second, y_ptr, y_scale_ptr, offs_m, mask_m, first_n, N, GROUP_TILES, BLOCK_M, BLOCK_N)


@triton.jit
def _compute_tile(
    x_ptr, x_scale_ptr, w, w_scale_ptr, bias_ptr, e, source, mask_m, first_n, N, K,
    ACTIVATION: tl.constexpr, HALVES: tl.constexpr, RUN: tl.constexpr, INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr, SCALES: tl.constexpr, SCALAR_SCALE: tl.constexpr, EVEN_K: tl.constexpr,
    TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of the result in fp32, ``[BLOCK_M, BLOCK_N]``; `source` are its rows in x."""
    WIDE: tl.constexpr = HALVES * BLOCK_N
    x_ptrs = x_ptr + source.to(tl.int64)[:, None] * (tl.cdiv(K, BLOCK_K) * BLOCK_K if SCALES == "mx" else K)
    w_row, column = _weight_rows(first_n, N, HALVES, RUN, INTERLEAVED, WIDE)
    w_rows = e.to(tl.int64) * (HALVES * N) + w_row
    if SCALES == "mx":
        acc = _multiply_mxfp4(
            x_ptrs, w, w_scale_ptr, e, mask_m, w_rows, column, first_n, N, K,
            RUN, EVEN_K, TMA, BLOCK_M, WIDE, BLOCK_K,
        )  # fmt: skip
    else:
        acc = _multiply(
            x_ptrs, x_scale_ptr, w, w_scale_ptr, e, source, mask_m, w_row, w_rows, column, first_n, N, K,
            HALVES, RUN, INTERLEAVED, TRANSPOSED, SCALES, SCALAR_SCALE, EVEN_K, TMA, BLOCK_M, WIDE, BLOCK_K,
        )  # fmt: skip
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + w_rows, mask=column < N, other=0.0).to(tl.float32)[None, :]
    # Columns past N are zeros, as their weights and biases were read: no group's multiplier is raised by them.
    return _activate(acc, ACTIVATION, HALVES, RUN, BLOCK_M, BLOCK_N)


@triton.jit
def _multiply(
    x_ptrs, x_scale_ptr, w, w_scale_ptr, e, source, mask_m, w_row, w_rows, column, first_n, N, K,
    HALVES: tl.constexpr, RUN: tl.constexpr, INTERLEAVED: tl.constexpr, TRANSPOSED: tl.constexpr,
    SCALES: tl.constexpr, SCALAR_SCALE: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, WIDE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The fp32 product of a tile's rows of x with its rows of w: ``[BLOCK_M, WIDE]``.

    FP8 weights are multiplied as codes, or as the codes' exact values where x is not quantised. Scales per block
    multiply the fp32 result of each block of K: that rounds no weight. Scales per row of w and of x multiply the whole
    result, whose e4m3 products tensor cores of sm_90 sum with some 14 bits, as in vLLM's kernels: adding each block in
    fp32 would cost what it costs in block FP8. `TritonPersistentBackend.tolerance` allows for it.
    """
    if SCALES == "block":
        k_groups = tl.cdiv(K, 128)
        w_scale_ptrs = w_scale_ptr + e * tl.cdiv(HALVES * N, 128) * k_groups
        if x_scale_ptr is not None:
            x_scale_ptrs = x_scale_ptr + source * k_groups
            x_scale = tl.load(x_scale_ptrs, mask=mask_m, other=0.0)
        w_scale = _load_w_scale(
            w_scale_ptrs, w_row, column, first_n, N, k_groups, HALVES, RUN, INTERLEAVED, SCALAR_SCALE
        )
    acc = tl.zeros([BLOCK_M, WIDE], tl.float32)
    for k in range(0, K, BLOCK_K):
        x_tile = _load_rows(x_ptrs, mask_m, k, K, EVEN_K, BLOCK_K)
        if TMA and TRANSPOSED:
            w_tile = tl.trans(tl.reshape(w.load([e, k, first_n * HALVES]), [BLOCK_K, WIDE]))
        elif TRANSPOSED:
            w_tile = _load_columns(
                w + e.to(tl.int64) * (HALVES * N) * K, w_row, column < N, first_n * HALVES, k, N, K,
                HALVES, INTERLEAVED, EVEN_K, WIDE, BLOCK_K,
            )  # fmt: skip
        elif TMA:
            w_tile = tl.reshape(w.load([e, first_n // RUN, 0, 0, k]), [WIDE, BLOCK_K])
        else:
            w_tile = _load_rows(w + w_rows[:, None] * K, column < N, k, K, EVEN_K, BLOCK_K)
        if w_tile.dtype == tl.uint8:
            w_tile = moe_fp8_values(w_tile, x_tile.dtype)
        if SCALES == "block":
            # Loaded one step ahead: nothing between the product and its promotion waits for memory.
            k_group = tl.minimum(k // 128 + 1, k_groups - 1)
            scale = w_scale[None, :]
            if x_scale_ptr is not None:
                scale = x_scale[:, None] * scale
                x_scale = tl.load(x_scale_ptrs + k_group, mask=mask_m, other=0.0)
            w_scale = _load_w_scale(
                w_scale_ptrs + k_group, w_row, column, first_n, N, k_groups, HALVES, RUN, INTERLEAVED, SCALAR_SCALE
            )
            acc += tl.dot(x_tile, tl.trans(w_tile)) * scale
        else:
            acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision="ieee")
    if SCALES == "channel":
        # Loaded last: in a flattened loop they would take registers in every step.
        acc *= tl.load(w_scale_ptr + w_rows, mask=column < N, other=0.0)[None, :]
        if x_scale_ptr is not None:
            acc *= tl.load(x_scale_ptr + source, mask=mask_m, other=0.0)[:, None]
    return acc


@triton.jit
def _multiply_mxfp4(
    x_ptrs, w, exponent_ptr, e, mask_m, w_rows, column, first_n, N, K,
    RUN: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As `_multiply`, of MXFP4 weights, four codes in an int16, and rows of x as `order_columns` writes them.

    The product is transposed: dequantised weights are the operand that tensor cores of sm_90 read from registers.
    """
    # Rows past N and columns past K repeat others' exponents, and meet codes of zero.
    exponent_ptrs = exponent_ptr + tl.where(column < N, w_rows, 0)[:, None] * (K // 32)
    offs_s = tl.arange(0, BLOCK_K // 32)
    following = tl.load(exponent_ptrs + tl.minimum(offs_s, K // 32 - 1)[None, :])
    acc = tl.zeros([WIDE, BLOCK_M], tl.float32)
    for k in range(0, K, BLOCK_K):
        # Loaded one step ahead, as Triton's pipeline leaves loads of bytes out.
        exponents = following
        following = tl.load(exponent_ptrs + tl.minimum(offs_s + (k + BLOCK_K) // 32, K // 32 - 1)[None, :])
        if TMA:
            w_tile = tl.reshape(w.load([e, first_n // RUN, 0, 0, k // 4]), [WIDE, BLOCK_K // 4])
        else:
            w_tile = _load_rows(w + w_rows[:, None] * (K // 4), column < N, k // 4, K // 4, EVEN_K, BLOCK_K // 4)
        w0, w1, w2, w3 = moe_mxfp4_values(w_tile, exponents, x_ptrs.dtype.element_ty, WIDE, BLOCK_K)
        mask_k = (k // 4 + tl.arange(0, BLOCK_K // 4) < K // 4)[None, :]
        mask = mask_m[:, None] if EVEN_K else mask_m[:, None] & mask_k
        x_quarter = x_ptrs + k + tl.arange(0, BLOCK_K // 4)[None, :]
        x0 = tl.load(x_quarter, mask=mask, other=0.0)
        x1 = tl.load(x_quarter + BLOCK_K // 4, mask=mask, other=0.0)
        x2 = tl.load(x_quarter + BLOCK_K // 2, mask=mask, other=0.0)
        x3 = tl.load(x_quarter + 3 * BLOCK_K // 4, mask=mask, other=0.0)
        acc = tl.dot(w0, tl.trans(x0), acc)
        acc = tl.dot(w1, tl.trans(x1), acc)
        acc = tl.dot(w2, tl.trans(x2), acc)
        acc = tl.dot(w3, tl.trans(x3), acc)
    return tl.trans(acc) * MOE_MXFP4_UNIT


@triton.jit
def _weight_rows(
    first_n, N, HALVES: tl.constexpr, RUN: tl.constexpr, INTERLEAVED: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The rows of an expert's weights in a tile's operand, and the column of the result that each contributes to."""
    offs = tl.arange(0, WIDE)
    half = offs // RUN % HALVES
    column = first_n + offs // (HALVES * RUN) * RUN + offs % RUN
    w_row = column * HALVES + half if INTERLEAVED else column + half * N
    return w_row, column


@triton.jit
def _load_rows(row_ptrs, mask, k, K, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A step's columns of some rows; zeros, for which nothing is read, where a row is masked: ``[…, BLOCK_K]``."""
    offs_k = k + tl.arange(0, BLOCK_K)
    if EVEN_K:
        tile = tl.load(row_ptrs + offs_k[None, :], mask=mask[:, None], other=0.0)
    else:
        tile = tl.load(row_ptrs + offs_k[None, :], mask=mask[:, None] & (offs_k < K)[None, :], other=0.0)
    return tile


@triton.jit
def _load_columns(
    w_ptr, w_row, mask, first_row, k, N, K,
    HALVES: tl.constexpr, INTERLEAVED: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A step's columns of an expert's weights, stored one after the other: ``[WIDE, BLOCK_K]``."""
    if INTERLEAVED:  # written so that the compiler sees rows side by side and loads several at once
        w_row = first_row + tl.arange(0, WIDE)
        mask = w_row < HALVES * N
    offs_k = k + tl.arange(0, BLOCK_K)
    mask_w = mask[None, :] if EVEN_K else mask[None, :] & (offs_k < K)[:, None]
    tile = tl.load(w_ptr + w_row[None, :] + offs_k[:, None] * (HALVES * N), mask=mask_w, other=0.0)
    return tl.trans(tile)


@triton.jit
def _load_w_scale(
    ptrs, w_row, column, first_n, N, k_groups, HALVES: tl.constexpr, RUN: tl.constexpr, INTERLEAVED: tl.constexpr,
    SCALAR_SCALE: tl.constexpr,
):  # fmt: skip
    """Multipliers of a tile's weights ``[WIDE]``; with SCALAR_SCALE, its rows or each half of them share one."""
    if SCALAR_SCALE:
        # The second of two tiles may begin past N.
        first_row = tl.minimum(first_n, N - 1) * HALVES if INTERLEAVED else first_n
        scale = tl.load(ptrs + first_row // 128 * k_groups) + tl.zeros(w_row.shape, tl.float32)
        if HALVES == 2 and not INTERLEAVED:
            up_scale = tl.load(ptrs + (N + first_n) // 128 * k_groups)
            scale = tl.where(tl.arange(0, w_row.shape[0]) // RUN % 2 == 0, scale, up_scale)
    else:
        scale = tl.load(ptrs + w_row // 128 * k_groups, mask=column < N, other=0.0)
    return scale


@triton.jit
def _activate(
    acc, ACTIVATION: tl.constexpr, HALVES: tl.constexpr, RUN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """The result's columns from the operand's: ``[BLOCK_M, WIDE]`` to ``[BLOCK_M, BLOCK_N]``."""
    if HALVES == 2:
        halves = tl.permute(tl.reshape(acc, [BLOCK_M, BLOCK_N // RUN, 2, RUN]), [0, 1, 3, 2])
        gate, up = tl.split(halves)
        y = moe_activate(tl.reshape(gate, [BLOCK_M, BLOCK_N]), tl.reshape(up, [BLOCK_M, BLOCK_N]), ACTIVATION)
    elif ACTIVATION is not None:
        y = moe_activate(acc, None, ACTIVATION)
    else:
        y = acc
    return y


@triton.jit
def _store(y, y_ptr, offs_m, mask_m, first_n, N, BLOCK_N: tl.constexpr):
    offs_n = first_n + tl.arange(0, BLOCK_N)
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_n < N)[None, :])


@triton.jit
def _store_ordered(
    y, y_ptr, offs_m, mask_m, first_n, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Store a tile's columns where `order_columns` would put them; the second product reads none past N."""
    y = tl.reshape(tl.permute(tl.reshape(y, [BLOCK_M, BLOCK_N // 4, 4]), (0, 2, 1)), [BLOCK_M, BLOCK_N])
    offs = tl.arange(0, BLOCK_N)
    word = first_n // 4 + offs % (BLOCK_N // 4)
    place = word // (BLOCK_K // 4) * BLOCK_K + offs // (BLOCK_N // 4) * (BLOCK_K // 4) + word % (BLOCK_K // 4)
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * (tl.cdiv(N, BLOCK_K) * BLOCK_K) + place[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & (word < N // 4)[None, :])


@triton.jit
def _store_group(
    first, second, y_ptr, y_scale_ptr, offs_m, mask_m, first_n, N,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Quantise and store a group of 128 columns: one tile, or two side by side."""
    amax = moe_fp8_amax(first, 1)
    if TILES == 2:
        amax = tl.maximum(amax, moe_fp8_amax(second, 1))
    scale = moe_fp8_scale(amax)
    wide_scale = tl.broadcast_to(scale[:, None], [BLOCK_M, BLOCK_N])
    _store(moe_fp8_codes(first, wide_scale), y_ptr, offs_m, mask_m, first_n, N, BLOCK_N)
    if TILES == 2:
        _store(moe_fp8_codes(second, wide_scale), y_ptr, offs_m, mask_m, first_n + BLOCK_N, N, BLOCK_N)
    tl.store(y_scale_ptr + offs_m.to(tl.int64) * tl.cdiv(N, 128) + first_n // 128, scale, mask=mask_m)
