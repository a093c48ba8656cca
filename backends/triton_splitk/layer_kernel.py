# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `splitk_layer`.

A program of down waits for its expert's programs of gate_up. That it cannot wait for ever rests on three facts:

- Programs start in the order of their numbers. CUDA does not promise it, but its devices do it, and the scan of CUB
  relies on it as well.
- All programs of gate_up are numbered before all of down and wait for none. When one of down starts, each of them has
  started, and what has started runs to its end, whatever waits beside it on the device.
- A program reports to its owner's counter once, and only programs of owners that serve a slot report or wait. All of
  them read the same list, whose counter the launch before this one cleared, so that counters outlive no call.
"""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.pdl import moe_pdl_release, moe_pdl_wait
from moe_dispatch.backends.triton_splitk.down_kernel import moe_down_groups, moe_down_rows
from moe_dispatch.backends.triton_splitk.gate_up_kernel import moe_gate_up_groups, moe_gate_up_rows
from moe_dispatch.backends.triton_splitk.stream import moe_prefetch


@triton.jit
def _moe_report(counter):
    """Count a tile whose stores, those of all threads, are visible where the count is seen by `_moe_wait`."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def _moe_wait(counter, tiles):
    """Wait until so many tiles have reported."""
    seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    while seen < tiles:
        seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@fast_launch
@triton.jit(do_not_specialize=["S"])
def _moe_splitk_layer_kernel(
    # inputs
    x_ptr, gate_up_ptr, gate_up_descriptor, gate_up_scale_ptr, bias_ptr, down_ptr, down_descriptor, down_scale_ptr,
    ids_ptr,
    # outputs
    inner_ptr, partial_ptr, served_ptr,
    # shapes
    S, K, N, E, TOPK,
    # constants
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    SPLITS: tl.constexpr, BY_SLOT: tl.constexpr, TMA_GATE_UP: tl.constexpr, TMA_DOWN: tl.constexpr,
    PDL: tl.constexpr, SCALES: tl.constexpr, TWO_SCALES: tl.constexpr, GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, TRANSPOSED: tl.constexpr, ROW_SCALES_K: tl.constexpr, ROW_SCALES_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = 2 if GATED else 1
    PACKED: tl.constexpr = 4 if SCALES == "mx" else 1  # columns in an element of the weights
    gate_up_tiles = tl.cdiv(parts * N, ROWS)
    of_gate_up = (S if BY_SLOT else E) * gate_up_tiles
    program = tl.program_id(0)
    of_down = program >= of_gate_up
    program -= tl.where(of_down, of_gate_up, 0)
    tiles = tl.where(of_down, tl.cdiv(K, ROWS) * SPLITS, gate_up_tiles)
    # Tiles of an expert lie side by side, so that those of down begin with the experts whose gate_up ended first.
    owner, tile = program // tiles, program % tiles
    e = owner
    if BY_SLOT:
        e = tl.load(ids_ptr + owner)
    list_ptr = served_ptr + owner * (2 + (BLOCK_M if BY_SLOT else S))
    moe_pdl_release(PDL)
    moe_pdl_wait(PDL)
    count = tl.load(list_ptr + 1)
    if count > 0:
        if of_down:
            blocks = tl.cdiv(N, BLOCK_K)
            share = tl.cdiv(blocks, SPLITS)
            split, tile = tile % SPLITS, tile // SPLITS
            first_block = split * share
            last_block = tl.minimum(first_block + share, blocks)
            offs_r, w_rows, mask_r, w_lines, row = moe_down_rows(down_ptr, e, tile, K, N, ROWS, SCALES, TRANSPOSED)
            moe_prefetch(w_lines, K, first_block, blocks, N // PACKED, BLOCK_K // PACKED, TRANSPOSED)
            _moe_wait(list_ptr, gate_up_tiles)
            moe_down_groups(
                offs_r, row, w_rows, mask_r, down_descriptor, down_scale_ptr,
                inner_ptr, None, ids_ptr, list_ptr + 1, e, owner, count, tile, split, first_block, last_block,
                partial_ptr,
                S, K, N,
                ROWS, BLOCK_M, BLOCK_K, 1, EVEN_N, BY_SLOT, TMA_DOWN, SCALES, TRANSPOSED, ROW_SCALES_N,
            )  # fmt: skip
        else:
            blocks = tl.cdiv(K, BLOCK_K)
            w_rows, mask_r, w_step, w_lines, w_first, w_second, w_scales, up_scales, part = moe_gate_up_rows(
                gate_up_ptr, gate_up_scale_ptr, e, tile, K, N,
                ROWS, BLOCK_K, SCALES, TWO_SCALES, GATED, INTERLEAVED, TRANSPOSED, ROW_SCALES_K,
            )  # fmt: skip
            moe_prefetch(w_lines, w_step, 0, blocks, K // PACKED, BLOCK_K // PACKED, TRANSPOSED)
            moe_gate_up_groups(
                w_rows, mask_r, w_step, gate_up_descriptor, w_first, w_second, w_scales, up_scales, part, bias_ptr,
                x_ptr, None, ids_ptr, list_ptr + 1, e, owner, count, tile, 0, 0, blocks,
                inner_ptr, None,
                S, K, N, TOPK,
                ROWS, BLOCK_M, BLOCK_K, 1, EVEN_K, BY_SLOT, TMA_GATE_UP, SCALES, TWO_SCALES, False, GATED,
                INTERLEAVED, TRANSPOSED, ROW_SCALES_K, HAS_BIAS, ACTIVATION, LISTED=True,
            )  # fmt: skip
            _moe_report(list_ptr)
