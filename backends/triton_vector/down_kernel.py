# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `vector_down`."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.pdl import moe_pdl_release, moe_pdl_wait


@fast_launch
@triton.jit(do_not_specialize=["E"])
def _moe_vector_down_kernel(
    # inputs
    inner_ptr, inner_scale_ptr, weight_ptr, scale_ptr, bias_ptr, topk_weights_ptr, ids_ptr,
    # outputs
    out_ptr,
    # shapes
    K, N, E,
    # constants
    TOPK: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS_N: tl.constexpr,
    PDL: tl.constexpr, FP8: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    vector: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth
    blocks: tl.constexpr = BLOCKS_N * ((TOPK + EXPERTS - 1) // EXPERTS)
    token, tile = tl.program_id(0), tl.program_id(1)
    moe_pdl_release(PDL)
    offs_r = tile * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(offs_r, K - 1).to(tl.int64)[:, None, None]
    offs_j = tl.arange(0, EXPERTS)
    offs_n = tl.arange(0, BLOCK_N)
    slots = ids_ptr + token * TOPK  # the kernels before have waited for the router, so ids are there
    e = tl.load(slots + offs_j, mask=offs_j < TOPK, other=-1)
    mine = (e >= 0) & (e < E)  # whatever an invalid slot's weight and memory hold, NaN included, is not read
    mask = mine[:, None] & (offs_n < N)[None, :]  # [EXPERTS, BLOCK_N]
    w = tl.load(
        weight_ptr + (e.to(tl.int64)[None, :, None] * K + rows) * N + offs_n[None, None, :], mask=mask[None], other=0.0
    )
    moe_pdl_wait(PDL)

    acc = tl.zeros([ROWS, EXPERTS, BLOCK_N // vector], dtype=tl.float32)
    for block in range(blocks):
        now = w
        x_j, x_n, x_e, x_mine, x_mask = offs_j, offs_n, e, mine, mask
        if blocks > 1:
            following = block + 1
            offs_n = (following % BLOCKS_N) * BLOCK_N + tl.arange(0, BLOCK_N)
            if EXPERTS < TOPK:
                offs_j = (following // BLOCKS_N) * EXPERTS + tl.arange(0, EXPERTS)
                e = tl.load(slots + offs_j, mask=offs_j < TOPK, other=-1)
                mine = (e >= 0) & (e < E)
            mask = mine[:, None] & (offs_n < N)[None, :] & (following < blocks)
            w = tl.load(
                weight_ptr + (e.to(tl.int64)[None, :, None] * K + rows) * N + offs_n[None, None, :],
                mask=mask[None],
                other=0.0,
            )
        # Products wait for x, and x for the barrier: else the compiler delays loads of weights behind products.
        tl.debug_barrier()
        x_rows = (token * TOPK + x_j).to(tl.int64)[:, None] * N
        x = tl.load(inner_ptr + x_rows + x_n[None, :], mask=x_mask, other=0.0).to(tl.float32)
        share = tl.load(topk_weights_ptr + token * TOPK + x_j, mask=x_mine, other=0.0)[:, None]  # [EXPERTS, 1]
        if FP8:
            groups: tl.constexpr = BLOCK_N // 128
            offs_g = (block % BLOCKS_N) * groups + tl.arange(0, groups)
            w_scales = scale_ptr + (x_e.to(tl.int64) * tl.cdiv(K, 128) + tile * ROWS // 128)[:, None] * tl.cdiv(N, 128)
            mask_g = x_mine[:, None] & (offs_g * 128 < N)[None, :]
            x_scales = inner_scale_ptr + (token * TOPK + x_j)[:, None] * tl.cdiv(N, 128)
            scale = tl.load(w_scales + offs_g[None, :], mask=mask_g, other=0.0)
            scale *= tl.load(x_scales + offs_g[None, :], mask=mask_g, other=0.0) * share  # [EXPERTS, groups]
            x = tl.reshape(tl.reshape(x, [EXPERTS, groups, 128]) * scale[:, :, None], [EXPERTS, BLOCK_N])
        else:
            x *= share
        product = now.to(tl.float32) * x[None]
        acc += tl.sum(tl.reshape(product, [ROWS, EXPERTS, BLOCK_N // vector, vector]), axis=3)
    out = tl.sum(tl.reshape(acc, [ROWS, EXPERTS * (BLOCK_N // vector)]), axis=1)  # [ROWS]
    mask_r = offs_r < K
    if HAS_BIAS:
        for j in range(TOPK):
            e_bias = tl.load(slots + j)
            known = (e_bias >= 0) & (e_bias < E)
            bias = tl.load(bias_ptr + e_bias.to(tl.int64) * K + offs_r, mask=mask_r & known, other=0.0).to(tl.float32)
            out += bias * tl.load(topk_weights_ptr + token * TOPK + j, mask=known, other=0.0)
    tl.store(out_ptr + token.to(tl.int64) * K + offs_r, out.to(out_ptr.dtype.element_ty), mask=mask_r)
