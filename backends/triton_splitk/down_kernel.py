# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `splitk_down`."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.pdl import moe_pdl_release, moe_pdl_wait
from moe_dispatch.backends.triton_splitk.stream import (
    moe_line_rows,
    moe_listed_slots,
    moe_prefetch,
    moe_slots_to_serve,
    moe_stream,
    moe_stream_mxfp4,
    moe_take_slots,
)


@triton.jit
def moe_down_rows(
    weight_ptr, e, tile, K, N, ROWS: tl.constexpr, SCALES: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """Where a tile of down lies.

    Returns:
        Of its rows numbers, pointers, and which exist; pointers to those with which a cache line may begin; and the
        numbers once more, where those past K repeat the last row.
    """
    expert = e.to(tl.int64)
    offs_r = tile * ROWS + tl.arange(0, ROWS)
    mask_r = offs_r < K
    PACKED: tl.constexpr = 4 if SCALES == "mx" else 1  # columns in an element of the weights
    row = tl.minimum(offs_r, K - 1)
    if TRANSPOSED:
        expert_ptr = weight_ptr + expert * K * N
        w_rows = expert_ptr + offs_r
        w_lines = expert_ptr + tl.minimum(tile * ROWS + moe_line_rows(weight_ptr, ROWS, ROWS), K - 1)
    else:
        w_rows = weight_ptr + (expert * K + row) * (N // PACKED)
        w_lines = w_rows
    return offs_r, w_rows, mask_r, w_lines, row


@triton.jit
def moe_down_groups(
    # weights, as those of `moe_stream`
    offs_r, row, w_rows, mask_r, weight_descriptor, scale_ptr,
    # the intermediate
    inner_ptr, inner_scale_ptr, ids_ptr, list_ptr, e, owner, count, tile, split, first_block, last_block,
    # outputs
    partial_ptr,
    # shapes
    S, K, N,
    # constants
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SCAN: tl.constexpr, EVEN_N: tl.constexpr,
    BY_SLOT: tl.constexpr, TMA: tl.constexpr, SCALES: tl.constexpr, TRANSPOSED: tl.constexpr,
    ROW_SCALES: tl.constexpr,
):  # fmt: skip
    """A tile of down times each group of its expert's slots: those of a list where there is one."""
    expert = e.to(tl.int64)
    blocks = tl.cdiv(N, BLOCK_K)
    w_scales = scale_ptr
    if scale_ptr is not None and SCALES != "block":
        w_scales = scale_ptr + (expert * K + row) * ROW_SCALES
    if SCALES == "block":
        expert_scales = scale_ptr + expert * tl.cdiv(K, BLOCK_K) * tl.cdiv(N, BLOCK_K)
        first_row = tile * ROWS if ROWS <= BLOCK_K else row
        w_scales = expert_scales + first_row // BLOCK_K * tl.cdiv(N, BLOCK_K)
    for skip in range(0, count, BLOCK_M):
        if list_ptr is not None:
            slots, mask_m = moe_listed_slots(list_ptr, count, skip, BLOCK_M)
        else:
            slots, mask_m = moe_take_slots(ids_ptr, owner if BY_SLOT else 0, S, e, skip, BLOCK_M, SCAN)
        x_scales = inner_scale_ptr
        if inner_scale_ptr is not None:
            x_scales = inner_scale_ptr + slots.to(tl.int64) * (blocks if SCALES == "block" else 1)
        x_rows = inner_ptr + slots.to(tl.int64) * N
        if SCALES == "mx":
            acc = moe_stream_mxfp4(
                w_rows, weight_descriptor, e.to(tl.int32), tile * ROWS, w_scales, x_rows, mask_m,
                first_block, last_block, N, ROWS, BLOCK_M, BLOCK_K, EVEN_N, TMA, ROW_SCALES,
            )  # fmt: skip
        else:
            acc = moe_stream(
                w_rows, mask_r, K, weight_descriptor, e.to(tl.int32), tile * ROWS, w_scales, w_scales, offs_r < 0,
                inner_ptr, slots.to(tl.int64), x_scales, mask_m, first_block, last_block, N,
                ROWS, BLOCK_M, BLOCK_K, EVEN_N, TMA, TRANSPOSED, SCALES, ROWS <= BLOCK_K,
            )  # fmt: skip
        partial = partial_ptr + (split * S + slots).to(tl.int64)[None, :] * K + offs_r[:, None]
        tl.store(partial, acc, mask=mask_r[:, None] & mask_m[None, :])


@fast_launch
@triton.jit(do_not_specialize=["S"])
def _moe_splitk_down_kernel(
    # inputs
    inner_ptr, inner_scale_ptr, weight_ptr, weight_descriptor, scale_ptr, ids_ptr, served_ptr,
    # outputs
    partial_ptr,
    # shapes
    S, K, N, E,
    # constants
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SCAN: tl.constexpr, EVEN_N: tl.constexpr,
    SPLITS: tl.constexpr, BY_SLOT: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
    SCALES: tl.constexpr, TRANSPOSED: tl.constexpr, ROW_SCALES: tl.constexpr,
):  # fmt: skip
    owner, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    list_ptr = served_ptr
    if served_ptr is not None:
        list_ptr = served_ptr + owner * (S + 1)
        e, count = owner, tl.load(list_ptr)
    else:
        e, count = moe_slots_to_serve(ids_ptr, owner, S, E, BLOCK_M, SCAN, BY_SLOT)
    offs_r, w_rows, mask_r, w_lines, row = moe_down_rows(weight_ptr, e, tile, K, N, ROWS, SCALES, TRANSPOSED)
    PACKED: tl.constexpr = 4 if SCALES == "mx" else 1  # columns in an element of the weights
    blocks = tl.cdiv(N, BLOCK_K)
    share = tl.cdiv(blocks, SPLITS)
    first_block = split * share
    last_block = tl.minimum(first_block + share, blocks)
    moe_pdl_release(PDL)
    # Ids and weights were complete before gate_up started: fetch the first blocks while its last wave drains, or while
    # this kernel looks for its slots.
    moe_prefetch(
        w_lines, K, first_block, tl.where(count > 0, blocks, 0), N // PACKED, BLOCK_K // PACKED, TRANSPOSED
    )  # fmt: skip
    # Idle CTAs wait too: a kernel that ends before its predecessor would release its successor too early.
    moe_pdl_wait(PDL)
    if count == 0:
        return
    moe_down_groups(
        offs_r, row, w_rows, mask_r, weight_descriptor, scale_ptr,
        inner_ptr, inner_scale_ptr, ids_ptr, list_ptr, e, owner, count, tile, split, first_block, last_block,
        partial_ptr,
        S, K, N,
        ROWS, BLOCK_M, BLOCK_K, SCAN, EVEN_N, BY_SLOT, TMA, SCALES, TRANSPOSED, ROW_SCALES,
    )  # fmt: skip
