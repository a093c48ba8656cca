# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `vector_layer`."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.pdl import moe_pdl_release, moe_pdl_wait
from moe_dispatch.backends.triton_vector.arrivals_kernel import moe_arrive
from moe_dispatch.backends.triton_vector.down_kernel import moe_vector_down_tile
from moe_dispatch.backends.triton_vector.gate_up_kernel import moe_vector_gate_up_tile


@fast_launch
@triton.jit(do_not_specialize=["M", "E"])
def _moe_vector_layer_kernel(
    # inputs
    x_ptr, gate_up_ptr, gate_up_scale_ptr, gate_up_bias_ptr, down_ptr, down_scale_ptr, down_bias_ptr, topk_weights_ptr,
    ids_ptr,
    # outputs
    inner_ptr, arrivals_ptr, out_ptr,
    # shapes
    M, K, N, E,
    # constants
    TOPK: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACTIVATION: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCKS_K: tl.constexpr, EVEN_N: tl.constexpr,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS_N: tl.constexpr,
    CLEARED_BEFORE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if not CLEARED_BEFORE:
        moe_pdl_wait(PDL)  # the kernel that wrote the ids may still run
    moe_pdl_release(PDL)
    slots = M * TOPK
    tiles = tl.cdiv(N, COLUMNS)
    if program < slots * tiles:
        slot, tile = program % slots, program // slots
        moe_vector_gate_up_tile(
            x_ptr, gate_up_ptr, gate_up_scale_ptr, gate_up_bias_ptr, ids_ptr, inner_ptr, slot, tile, K, N, E,
            TOPK, COLUMNS, BLOCK_K, BLOCKS_K, EVEN_N, GATED, INTERLEAVED, ACTIVATION,
        )  # fmt: skip
        if CLEARED_BEFORE:
            moe_pdl_wait(PDL)
        moe_arrive(arrivals_ptr, slot // TOPK, slot % TOPK * tiles + tile, TOPK * tiles)
    else:
        index = program - slots * tiles
        moe_vector_down_tile(
            inner_ptr, down_ptr, down_scale_ptr, down_bias_ptr, topk_weights_ptr, ids_ptr, arrivals_ptr, out_ptr,
            index % M, index // M, K, N, E, TOPK, ROWS, EXPERTS, BLOCK_N, BLOCKS_N, PDL,
        )  # fmt: skip
