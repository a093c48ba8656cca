# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `vector_down`."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.device import (
    moe_e4m3_to_fp32,
    moe_output_row,
    moe_output_token,
    moe_prefetch_lines,
)
from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.pdl import moe_pdl_release, moe_pdl_wait


@fast_launch
@triton.jit(do_not_specialize=["E"])
def _moe_vector_down_kernel(
    # inputs
    inner_ptr, weight_ptr, scale_ptr, bias_ptr, topk_weights_ptr, ids_ptr,
    # outputs
    out_ptr, addresses_ptr, offset, peer_rows,
    # shapes
    K, N, E,
    # constants
    TOPK: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS_N: tl.constexpr,
    SCALES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    vector: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth
    vectors: tl.constexpr = BLOCK_N // vector
    blocks: tl.constexpr = BLOCKS_N * ((TOPK + EXPERTS - 1) // EXPERTS)
    token, tile = moe_output_token(addresses_ptr, peer_rows).to(tl.int32), tl.program_id(1)
    moe_pdl_release(PDL)
    # The kernels before have waited for the router, so that ids and topk weights are there.
    w, scale, offs_x, mask_x = _moe_vector_down_block(
        weight_ptr, scale_ptr, topk_weights_ptr, ids_ptr, token, tile, 0, K, N, E,
        TOPK, ROWS, EXPERTS, BLOCK_N, BLOCKS_N, SCALES,
    )  # fmt: skip
    offs_r = tile * ROWS + tl.arange(0, ROWS)
    mask_r = offs_r < K
    if bias_ptr is not None:  # read while the first product still runs
        bias = tl.zeros([ROWS], dtype=tl.float32)
        for j in range(TOPK):
            e = tl.load(ids_ptr + token * TOPK + j)
            known = (e >= 0) & (e < E)
            biases = tl.load(bias_ptr + e.to(tl.int64) * K + offs_r, mask=mask_r & known, other=0.0).to(tl.float32)
            bias += biases * tl.load(topk_weights_ptr + token * TOPK + j, mask=known, other=0.0)
    moe_pdl_wait(PDL)

    acc = tl.zeros([ROWS, EXPERTS, vectors], dtype=tl.float32)
    for block in range(blocks):
        now, now_scale, now_x, now_mask = w, scale, offs_x, mask_x
        if blocks > 1:
            w, scale, offs_x, mask_x = _moe_vector_down_block(
                weight_ptr, scale_ptr, topk_weights_ptr, ids_ptr, token, tile, block + 1, K, N, E,
                TOPK, ROWS, EXPERTS, BLOCK_N, BLOCKS_N, SCALES,
            )  # fmt: skip
        # Products wait for x, and x for the barrier: else the compiler delays loads of weights behind products.
        tl.debug_barrier()
        x = tl.load(inner_ptr + now_x, mask=now_mask, other=0.0).to(tl.float32)
        values = now.to(tl.float32) if SCALES == "none" else moe_e4m3_to_fp32(now)
        sums = tl.sum(tl.reshape(values * x[None], [ROWS, EXPERTS, vectors, vector]), axis=3)
        if SCALES == "channel":
            # Read this late, they take no registers from the weights, and a fourth CTA fits on a multiprocessor.
            e_block, known_block = _moe_vector_experts(ids_ptr, token, block // BLOCKS_N, E, TOPK, EXPERTS)
            channels = scale_ptr + e_block[None, :, None] * K + tl.minimum(offs_r, K - 1)[:, None, None]
            sums *= tl.load(channels, mask=known_block[None, :, None], other=0.0)
        acc += sums * now_scale
    # Two sums instead of one of a reshaped tensor: where warps divide experts, rows and vectors, Triton 3.6 stores
    # their shares of that sum in each other's places (mended by pull request 9219 of triton-lang/triton).
    out = tl.sum(tl.sum(acc, axis=1), axis=1)  # [ROWS]
    if bias_ptr is not None:
        out += bias
    row = moe_output_row(out_ptr, addresses_ptr, offset, peer_rows, token.to(tl.int64), K)
    tl.store(row + offs_r, out.to(out_ptr.dtype.element_ty), mask=mask_r)


@triton.jit
def _moe_vector_down_block(
    weight_ptr, scale_ptr, topk_weights_ptr, ids_ptr, token, tile, block, K, N, E,
    TOPK: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS_N: tl.constexpr,
    SCALES: tl.constexpr,
):  # fmt: skip
    """What a CTA reads beside the intermediate for a block of columns and experts; zeros after the last block.

    Returns:
        Weights ``[ROWS, EXPERTS, BLOCK_N]``; what to multiply the sums of their vectors by, topk weight times scale per
        block, which broadcasts to ``[ROWS, EXPERTS, BLOCK_N / vector]``; offsets of the intermediate and their mask
        ``[EXPERTS, BLOCK_N]``. Scales per channel are only brought to the L2.
    """
    vector: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth
    offs_n = block % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)
    slots = token * TOPK + block // BLOCKS_N * EXPERTS + tl.arange(0, EXPERTS)
    expert, known = _moe_vector_experts(ids_ptr, token, block // BLOCKS_N, E, TOPK, EXPERTS)
    mask = known[:, None] & (offs_n < N)[None, :]
    rows = tl.minimum(tile * ROWS + tl.arange(0, ROWS), K - 1).to(tl.int64)[:, None, None]
    w = tl.load(weight_ptr + (expert[None, :, None] * K + rows) * N + offs_n[None, None, :], mask=mask[None], other=0)
    scale = tl.load(topk_weights_ptr + slots, mask=known, other=0.0)[None, :, None]
    if SCALES == "channel":
        moe_prefetch_lines(scale_ptr + tl.where(known, expert, 0) * K + tile * ROWS)
    if SCALES == "block":
        # A vector lies in one block of scales, and so do the tile's rows.
        offs_v = block % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N // vector) * vector
        scales = scale_ptr + (expert * tl.cdiv(K, 128) + tile * ROWS // 128)[:, None] * tl.cdiv(N, 128)
        mask_v = known[:, None] & (offs_v < N)[None, :]
        scale *= tl.load(scales + (offs_v // 128)[None, :], mask=mask_v, other=0.0)[None]
    return w, scale, slots.to(tl.int64)[:, None] * N + offs_n[None, :], mask


@triton.jit
def _moe_vector_experts(ids_ptr, token, group, E, TOPK: tl.constexpr, EXPERTS: tl.constexpr):
    """The experts of a group of a token's slots, int64 ``[EXPERTS]``, and whether each is one.

    Whatever an invalid slot's weight and memory hold, NaN included, is not read.
    """
    offs_j = group * EXPERTS + tl.arange(0, EXPERTS)
    e = tl.load(ids_ptr + token * TOPK + offs_j, mask=offs_j < TOPK, other=-1)
    return e.to(tl.int64), (e >= 0) & (e < E)
