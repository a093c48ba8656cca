# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `splitk_gate_up`."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.device import moe_activate, moe_fp8_amax, moe_fp8_codes, moe_fp8_scale
from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.pdl import moe_pdl_release, moe_pdl_wait
from moe_dispatch.backends.triton_splitk.stream import (
    moe_line_rows,
    moe_list,
    moe_listed_slots,
    moe_prefetch,
    moe_slots_to_serve,
    moe_stream,
    moe_stream_mxfp4,
    moe_take_slots,
)


@triton.jit
def _moe_add_bias_activate(
    gate, up, bias_ptr, expert, offs_n, N,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The intermediate ``[columns, BLOCK_M]`` of one expert, in fp32."""
    if HAS_BIAS:
        parts: tl.constexpr = 2 if GATED else 1
        step: tl.constexpr = 2 if INTERLEAVED else 1
        biases = bias_ptr + expert * parts * N + offs_n * step
        mask_n = offs_n < N
        gate += tl.load(biases, mask=mask_n, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up += tl.load(biases + (1 if INTERLEAVED else N), mask=mask_n, other=0.0).to(tl.float32)[:, None]
    return moe_activate(gate, up, ACTIVATION)


@triton.jit
def _moe_rows_by_columns(offs_r, tile, N, RUN: tl.constexpr):
    """Rows of a tile of gate_up stored by columns, RUN of them side by side, and whether each exists.

    Written so that the compiler sees that they are side by side, and loads several at once.
    """
    column = tile * RUN + offs_r % RUN
    return offs_r // RUN * N + column, column < N


@triton.jit
def moe_gate_up_rows(
    weight_ptr, scale_ptr, e, tile, K, N,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, SCALES: tl.constexpr, TWO_SCALES: tl.constexpr, GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, TRANSPOSED: tl.constexpr, ROW_SCALES: tl.constexpr,
):  # fmt: skip
    """Where a tile of gate_up lies.

    Returns:
        Of its rows pointers, which exist, and the stride of their columns; pointers to those with which a cache line
        may begin; its first two coordinates in the descriptor; where the scales of its rows begin, and of up's rows;
        and 1 for up's rows and 0 for
        the gate's.
    """
    parts: tl.constexpr = 2 if GATED else 1
    columns: tl.constexpr = ROWS // parts
    expert = e.to(tl.int64)
    # Rows of the tile: gate's then up's, or alternating, as they lie in memory. Past N they repeat the last row.
    offs_r = tl.arange(0, ROWS)
    part = offs_r % parts if INTERLEAVED else offs_r // columns
    column = tile * columns + (offs_r // parts if INTERLEAVED else offs_r % columns)
    w_step = parts * N
    mask_r = column < N
    PACKED: tl.constexpr = 4 if SCALES == "mx" else 1  # columns in an element of the weights
    if TRANSPOSED:
        # Gate and up that alternate in each column are one run.
        run: tl.constexpr = ROWS if INTERLEAVED else columns
        run_rows = parts * N if INTERLEAVED else N
        row, mask_r = _moe_rows_by_columns(offs_r, tile, run_rows, run)
        line_row, _ = _moe_rows_by_columns(moe_line_rows(weight_ptr, ROWS, run), tile, run_rows, run)
        expert_ptr = weight_ptr + expert * parts * N * K
        w_rows = expert_ptr + row
        w_lines = expert_ptr + tl.minimum(line_row, parts * N - 1)
        w_first = e.to(tl.int32)
        w_second = tile * ROWS
    else:
        column = tl.minimum(column, N - 1)
        row = column * parts + part if INTERLEAVED else part * N + column  # [ROWS]
        w_rows = weight_ptr + (expert * parts * N + row) * (K // PACKED)
        w_lines = w_rows
        # [E·N, 2, K] where rows alternate, [E·parts, N, K] where they do not.
        w_first = (expert * N + tile * columns if INTERLEAVED else expert * parts).to(tl.int32)
        w_second = 0 if INTERLEAVED else tile * columns
    w_scales = weight_ptr if scale_ptr is None else scale_ptr  # no function can return None
    up_scales = w_scales
    if scale_ptr is not None and SCALES != "block":
        w_scales = scale_ptr + (expert * parts * N + row) * ROW_SCALES
    if SCALES == "block":
        expert_scales = scale_ptr + expert * tl.cdiv(parts * N, BLOCK_K) * tl.cdiv(K, BLOCK_K)
        first = tile * ROWS if INTERLEAVED else tile * columns
        gate_row = first if TWO_SCALES else row
        w_scales = expert_scales + gate_row // BLOCK_K * tl.cdiv(K, BLOCK_K)
        up_row = first if INTERLEAVED else (parts - 1) * N + first
        up_scales = expert_scales + up_row // BLOCK_K * tl.cdiv(K, BLOCK_K)
    return w_rows, mask_r, w_step, w_lines, w_first, w_second, w_scales, up_scales, part


@triton.jit
def moe_gate_up_groups(
    # weights, as those of `moe_stream`
    w_rows, mask_r, w_step, weight_descriptor, w_first, w_second, w_scales, up_scales, part, bias_ptr,
    # tokens
    x_ptr, x_scale_ptr, ids_ptr, list_ptr, e, owner, count, tile, split, first_block, last_block,
    # outputs
    inner_ptr, inner_scale_ptr,
    # shapes
    S, K, N, TOPK,
    # constants
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SCAN: tl.constexpr, EVEN_K: tl.constexpr,
    BY_SLOT: tl.constexpr, TMA: tl.constexpr, SCALES: tl.constexpr, TWO_SCALES: tl.constexpr, PARTIAL: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, TRANSPOSED: tl.constexpr, ROW_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """A tile of gate_up times each group of its expert's tokens; those of a list, if LISTED, else it is written."""
    parts: tl.constexpr = 2 if GATED else 1
    columns: tl.constexpr = ROWS // parts
    QUANTIZED: tl.constexpr = x_scale_ptr is not None
    expert = e.to(tl.int64)
    blocks = tl.cdiv(K, BLOCK_K)
    offs_n = tile * columns + tl.arange(0, columns)
    mask_n = offs_n < N
    plane = S.to(tl.int64) * N
    for skip in range(0, count, BLOCK_M):
        if LISTED:
            slots, mask_m = moe_listed_slots(list_ptr, count, skip, BLOCK_M)
        else:
            slots, mask_m = moe_take_slots(ids_ptr, owner if BY_SLOT else 0, S, e, skip, BLOCK_M, SCAN)
            moe_list(list_ptr, 1 + skip + tl.arange(0, BLOCK_M), slots, mask_m & (tile == 0) & (split == 0))
        tokens = (slots // TOPK).to(tl.int64)
        x_scales = x_scale_ptr
        if QUANTIZED:
            x_scales = x_scale_ptr + tokens * (blocks if SCALES == "block" else 1)
        if SCALES == "mx":
            acc = moe_stream_mxfp4(
                w_rows, weight_descriptor, w_first, w_second, w_scales, x_ptr + tokens * K, mask_m,
                first_block, last_block, K, ROWS, BLOCK_M, BLOCK_K, EVEN_K, TMA, ROW_SCALES,
            )  # fmt: skip
        else:
            acc = moe_stream(
                w_rows, mask_r, w_step, weight_descriptor, w_first, w_second, w_scales, up_scales, part == 1,
                x_ptr, tokens, x_scales, mask_m, first_block, last_block, K,
                ROWS, BLOCK_M, BLOCK_K, EVEN_K, TMA, TRANSPOSED, SCALES, TWO_SCALES,
            )  # fmt: skip
        gate = acc  # [columns, BLOCK_M]
        up = acc
        if GATED:
            if INTERLEAVED:
                gate, up = acc.reshape(columns, 2, BLOCK_M).permute(0, 2, 1).split()
            else:
                gate, up = acc.reshape(2, columns, BLOCK_M).permute(1, 2, 0).split()
        inner = inner_ptr + slots.to(tl.int64)[None, :] * N + offs_n[:, None]
        mask = mask_n[:, None] & mask_m[None, :]
        if PARTIAL:
            # Planes [SPLITS, parts, S, N]: the next kernel adds and activates them.
            tl.store(inner + split * parts * plane, gate, mask=mask)
            if GATED:
                tl.store(inner + (split * parts + 1) * plane, up, mask=mask)
        else:
            out = _moe_add_bias_activate(
                gate, up, bias_ptr, expert, offs_n, N, GATED, INTERLEAVED, HAS_BIAS, ACTIVATION
            )
            if inner_scale_ptr is not None:
                # The tile's columns are one group of the quantisation; those past N must not raise its maximum.
                out = tl.where(mask_n[:, None], out, 0.0)
                scale = moe_fp8_scale(moe_fp8_amax(out, 0))  # [BLOCK_M]
                out = moe_fp8_codes(out, tl.broadcast_to(scale[None, :], [columns, BLOCK_M]))
                tl.store(inner_scale_ptr + slots * tl.cdiv(N, columns) + tile, scale, mask=mask_m)
            tl.store(inner, out.to(inner_ptr.dtype.element_ty), mask=mask)


@fast_launch
@triton.jit(do_not_specialize=["S"])
def _moe_splitk_gate_up_kernel(
    # inputs
    x_ptr, x_scale_ptr, weight_ptr, weight_descriptor, scale_ptr, bias_ptr, ids_ptr,
    # outputs
    inner_ptr, inner_scale_ptr, served_ptr,
    # shapes
    S, K, N, E, TOPK,
    # constants
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SCAN: tl.constexpr, EVEN_K: tl.constexpr,
    SPLITS: tl.constexpr, BY_SLOT: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr, SCALES: tl.constexpr,
    TWO_SCALES: tl.constexpr, PARTIAL: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr, ROW_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, IDS_READY: tl.constexpr,
):  # fmt: skip
    owner, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if not IDS_READY:
        # The kernel that wrote the ids may still run, and the next kernel reads them before it waits: it must not start
        # earlier. Where this layer quantised the tokens, the kernel that did it has itself waited for the ids.
        moe_pdl_wait(PDL)
    moe_pdl_release(PDL)
    e, count = moe_slots_to_serve(ids_ptr, owner, S, E, BLOCK_M, SCAN, BY_SLOT)
    w_rows, mask_r, w_step, w_lines, w_first, w_second, w_scales, up_scales, part = moe_gate_up_rows(
        weight_ptr, scale_ptr, e, tile, K, N,
        ROWS, BLOCK_K, SCALES, TWO_SCALES, GATED, INTERLEAVED, TRANSPOSED, ROW_SCALES,
    )  # fmt: skip
    PACKED: tl.constexpr = 4 if SCALES == "mx" else 1  # columns in an element of the weights
    blocks = tl.cdiv(K, BLOCK_K)
    share = tl.cdiv(blocks, SPLITS)
    first_block = split * share
    last_block = tl.minimum(first_block + share, blocks)
    moe_prefetch(
        w_lines, w_step, first_block, tl.where(count > 0, blocks, 0), K // PACKED, BLOCK_K // PACKED, TRANSPOSED
    )  # fmt: skip
    if IDS_READY:
        moe_pdl_wait(PDL)
    list_ptr = served_ptr
    if served_ptr is not None:
        list_ptr = served_ptr + e * (S + 1)
    moe_list(list_ptr, 0, count, (tile == 0) & (split == 0))
    if count == 0:
        return
    moe_gate_up_groups(
        w_rows, mask_r, w_step, weight_descriptor, w_first, w_second, w_scales, up_scales, part, bias_ptr,
        x_ptr, x_scale_ptr, ids_ptr, list_ptr, e, owner, count, tile, split, first_block, last_block,
        inner_ptr, inner_scale_ptr,
        S, K, N, TOPK,
        ROWS, BLOCK_M, BLOCK_K, SCAN, EVEN_K, BY_SLOT, TMA, SCALES, TWO_SCALES, PARTIAL, GATED, INTERLEAVED,
        TRANSPOSED, ROW_SCALES, HAS_BIAS, ACTIVATION, LISTED=False,
    )  # fmt: skip
