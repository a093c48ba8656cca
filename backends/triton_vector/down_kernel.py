# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""Device code of `vector_down`."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.device import moe_e4m3_sums, moe_e4m3_to_fp32, moe_output_row, moe_output_token
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
    TOPK: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    STEPS_N: tl.constexpr, EXPERTS_FIRST: tl.constexpr, SCALES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    vector: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth
    piece: tl.constexpr = 8 if vector == 16 else vector  # elements of the intermediate that a thread loads at once
    vectors: tl.constexpr = CHUNK // vector
    first: tl.constexpr = EXPERTS if EXPERTS_FIRST else ROWS
    second: tl.constexpr = ROWS if EXPERTS_FIRST else EXPERTS
    steps: tl.constexpr = STEPS_N * ((TOPK + EXPERTS - 1) // EXPERTS)
    token, tile = moe_output_token(addresses_ptr, peer_rows).to(tl.int32), tl.program_id(1)
    moe_pdl_release(PDL)
    # The kernels before have waited for the router, so that ids and topk weights are there.
    offs_r = tile * ROWS + tl.arange(0, ROWS)
    mask_r = offs_r < K
    w, scales, slots, known = _moe_vector_down_step(
        weight_ptr, scale_ptr, topk_weights_ptr, ids_ptr, token, tile, 0, K, N, E,
        TOPK, ROWS, EXPERTS, CHUNK, CHUNKS, STEPS_N, EXPERTS_FIRST, SCALES,
    )  # fmt: skip
    if bias_ptr is not None:  # read while the first product still runs
        bias = tl.zeros([ROWS], dtype=tl.float32)
        for j in range(TOPK):
            e = tl.load(ids_ptr + token * TOPK + j)
            valid = (e >= 0) & (e < E)
            biases = tl.load(bias_ptr + e.to(tl.int64) * K + offs_r, mask=mask_r & valid, other=0.0).to(tl.float32)
            bias += biases * tl.load(topk_weights_ptr + token * TOPK + j, mask=valid, other=0.0)
    moe_pdl_wait(PDL)

    acc = tl.zeros([vectors, first, second], dtype=tl.float32)
    for step in range(steps):
        now, now_scales, now_known = w, scales, known[None, :, None]
        x_rows = inner_ptr + slots.to(tl.int64)[None, :, None] * N
        if steps > 1:
            w, scales, slots, known = _moe_vector_down_step(
                weight_ptr, scale_ptr, topk_weights_ptr, ids_ptr, token, tile, step + 1, K, N, E,
                TOPK, ROWS, EXPERTS, CHUNK, CHUNKS, STEPS_N, EXPERTS_FIRST, SCALES,
            )  # fmt: skip
        # Products wait for x, and x for the barrier: else the compiler delays loads of weights behind products.
        tl.debug_barrier()
        x, x_high = (), ()
        for chunk in tl.static_range(CHUNKS):
            offs_v = (step % STEPS_N * CHUNKS + chunk) * CHUNK + tl.arange(0, vectors) * vector
            offs_x = offs_v[:, None, None] + tl.arange(0, piece)[None, None, :]
            x += (tl.load(x_rows + offs_x, mask=now_known & (offs_x < N), other=0.0),)
            if vector > piece:  # one load brings half of what a vector of weights needs
                offs_x += piece
                x_high += (tl.load(x_rows + offs_x, mask=now_known & (offs_x < N), other=0.0),)
        for chunk in tl.static_range(CHUNKS):
            values = now[chunk].to(tl.float32) if SCALES == "none" else moe_e4m3_to_fp32(now[chunk])
            if vector > piece:
                halves = tl.permute(tl.reshape(values, [vectors, first, second, 2, piece]), (0, 1, 2, 4, 3))
                low, high = halves.split()
                sums = tl.sum(high * _moe_over_rows(x_high[chunk].to(tl.float32), EXPERTS_FIRST), axis=3)
                sums += tl.sum(low * _moe_over_rows(x[chunk].to(tl.float32), EXPERTS_FIRST), axis=3)
            else:
                sums = tl.sum(values * _moe_over_rows(x[chunk].to(tl.float32), EXPERTS_FIRST), axis=3)
            acc += sums * now_scales[chunk]
    # Two sums instead of one of a reshaped tensor: where warps divide experts, rows and vectors, Triton 3.6 stores
    # their shares of that sum in each other's places (mended by pull request 9219 of triton-lang/triton).
    out = tl.sum(tl.sum(acc, axis=1 if EXPERTS_FIRST else 2), axis=0)  # [ROWS]
    if SCALES != "none":
        out = moe_e4m3_sums(out)
    if bias_ptr is not None:
        out += bias
    row = moe_output_row(out_ptr, addresses_ptr, offset, peer_rows, token.to(tl.int64), K)
    tl.store(row + offs_r, out.to(out_ptr.dtype.element_ty), mask=mask_r)


@triton.jit
def _moe_vector_down_step(
    weight_ptr, scale_ptr, topk_weights_ptr, ids_ptr, token, tile, step, K, N, E,
    TOPK: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    STEPS_N: tl.constexpr, EXPERTS_FIRST: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """What a CTA reads beside the intermediate for some chunks of columns and experts; zeros after the last step.

    Triton divides dimensions among lanes, then warps, then registers in their order: vectors of a chunk, experts, rows.
    Experts before rows, threads share no element of the intermediate, and need fewer registers.

    Returns:
        Of each chunk, the weights ``[vectors, EXPERTS, ROWS, vector]``, and what to multiply the sums of their vectors
        by, topk weight times scale, which broadcasts to ``[vectors, EXPERTS, ROWS]``; the slots ``[EXPERTS]``, and
        whether each has a valid id. Unless EXPERTS_FIRST, ROWS comes before EXPERTS.
    """
    vector: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth
    offs_j = step // STEPS_N * EXPERTS + tl.arange(0, EXPERTS)
    e = tl.load(ids_ptr + token * TOPK + offs_j, mask=offs_j < TOPK, other=-1)
    # Whatever an invalid slot's weight and memory hold, NaN included, is not read.
    expert, known = e.to(tl.int64), (e >= 0) & (e < E)
    slots = token * TOPK + offs_j
    rows = tl.minimum(tile * ROWS + tl.arange(0, ROWS), K - 1)
    # [1, EXPERTS, ROWS] or [1, ROWS, EXPERTS]
    expert_rows = _moe_over_rows(expert[None, :], EXPERTS_FIRST) * K
    expert_rows += rows[None, None, :] if EXPERTS_FIRST else rows[None, :, None]
    known_rows = _moe_over_rows(known[None, :], EXPERTS_FIRST)
    w_rows = weight_ptr + (expert_rows * N)[:, :, :, None]
    factor = _moe_over_rows(tl.load(topk_weights_ptr + slots, mask=known, other=0.0)[None, :], EXPERTS_FIRST)
    if SCALES == "channel":
        factor *= tl.load(scale_ptr + expert_rows, mask=known_rows, other=0.0)
    # See gate_up; but a CTA that takes several steps is slower with it, by 1 % to 3 % of the layer.
    once: tl.constexpr = STEPS_N == 1 and EXPERTS >= TOPK
    eviction: tl.constexpr = "evict_first" if SCALES == "none" and once else ""
    w, scales = (), ()
    for chunk in tl.static_range(CHUNKS):
        offs_v = (step % STEPS_N * CHUNKS + chunk) * CHUNK + tl.arange(0, CHUNK // vector) * vector
        mask_v = known[None, :] & (offs_v < N)[:, None]
        offs_n = offs_v[:, None, None, None] + tl.arange(0, vector)[None, None, None, :]
        mask = known_rows[:, :, :, None] & (offs_n < N)
        w += (tl.load(w_rows + offs_n, mask=mask, other=0, eviction_policy=eviction),)
        scale = factor
        if SCALES == "block":
            # A vector lies in one block of scales, and so do the tile's rows.
            blocks = scale_ptr + (expert * tl.cdiv(K, 128) + tile * ROWS // 128) * tl.cdiv(N, 128)
            block_scale = tl.load(blocks[None, :] + (offs_v // 128)[:, None], mask=mask_v, other=0.0)
            scale *= _moe_over_rows(block_scale, EXPERTS_FIRST)
        scales += (scale,)
    return w, scales, slots, known


@triton.jit
def _moe_over_rows(by_expert, EXPERTS_FIRST: tl.constexpr):
    """What vectors and experts have, ``[vectors, EXPERTS, …]``, with a dimension for rows after or before experts."""
    return tl.expand_dims(by_expert, 2 if EXPERTS_FIRST else 1)
