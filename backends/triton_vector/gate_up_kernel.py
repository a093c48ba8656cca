# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `vector_gate_up`."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.device import moe_activate
from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.pdl import moe_pdl_release, moe_pdl_wait


@fast_launch
@triton.jit(do_not_specialize=["S", "E"])
def _moe_vector_gate_up_kernel(
    # inputs
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, bias_ptr, ids_ptr,
    # outputs
    inner_ptr,
    # shapes
    S, K, N, E,
    # constants
    TOPK: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCKS: tl.constexpr, EVEN_N: tl.constexpr,
    PDL: tl.constexpr, FP8: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = 2 if GATED else 1
    vector: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth
    slot, tile = tl.program_id(0), tl.program_id(1)
    if not FP8:
        # The kernel that wrote the ids may still run. In block FP8 the quantising kernel has waited for it.
        moe_pdl_wait(PDL)
    moe_pdl_release(PDL)
    e = tl.load(ids_ptr + slot)
    if (e < 0) | (e >= E):
        if FP8:
            # A kernel that ends before its predecessor would release its successor too early.
            moe_pdl_wait(PDL)
        return
    expert = e.to(tl.int64)

    # Past N they repeat the last row.
    offs_n = tile * COLUMNS + tl.arange(0, COLUMNS)
    column = tl.minimum(offs_n, N - 1)[None, :]
    part = tl.arange(0, parts)[:, None]
    row = column * parts + part if INTERLEAVED else part * N + column
    w_rows = (weight_ptr + (expert * parts * N + row) * K)[:, :, None]  # [parts, COLUMNS, 1]
    offs_k = tl.arange(0, BLOCK_K)
    w = tl.load(w_rows + offs_k[None, None, :], mask=(offs_k < K)[None, None, :], other=0.0)
    if FP8:
        moe_pdl_wait(PDL)

    x_row = (slot // TOPK).to(tl.int64)
    acc = tl.zeros([parts, COLUMNS, BLOCK_K // vector], dtype=tl.float32)
    for block in range(BLOCKS):
        now = w
        offs_x = offs_k
        if BLOCKS > 1:
            offs_k += BLOCK_K
            w = tl.load(w_rows + offs_k[None, None, :], mask=(offs_k < K)[None, None, :], other=0.0)
        # Products wait for x, and x for the barrier: else the compiler delays loads of weights behind products.
        tl.debug_barrier()
        x = tl.load(x_ptr + x_row * K + offs_x, mask=offs_x < K, other=0.0).to(tl.float32)[None, None, :]
        if FP8:
            groups: tl.constexpr = BLOCK_K // 128
            offs_g = block * groups + tl.arange(0, groups)
            mask_g = offs_g * 128 < K
            x_scale = tl.load(x_scale_ptr + x_row * tl.cdiv(K, 128) + offs_g, mask=mask_g, other=0.0)
            # The rows of a part lie in one block of scales, unless N shifts those of up.
            block_row = (part * N + tile * COLUMNS if EVEN_N and not INTERLEAVED else row) // 128
            w_scales = scale_ptr + (expert * tl.cdiv(parts * N, 128) + block_row) * tl.cdiv(K, 128)
            scale = tl.load(w_scales[:, :, None] + offs_g[None, None, :], mask=mask_g[None, None, :], other=0.0)
            scale *= x_scale[None, None, :]  # [parts, 1 or COLUMNS, groups]
            x = tl.reshape(x, [1, 1, groups, 128]) * scale[:, :, :, None]
            x = tl.reshape(x, [parts, scale.shape[1], BLOCK_K])
        product = now.to(tl.float32) * x
        acc += tl.sum(tl.reshape(product, [parts, COLUMNS, BLOCK_K // vector, vector]), axis=3)
    gate = tl.sum(acc, axis=2)  # [parts, COLUMNS]
    up = None
    if GATED:
        gate, up = tl.permute(gate, (1, 0)).split()
    else:
        gate = tl.reshape(gate, [COLUMNS])
    mask_n = offs_n < N
    inner = inner_ptr + slot.to(tl.int64) * N + offs_n
    if PARTIAL:
        # Planes [parts, S, N]: the next kernel activates and quantises them.
        tl.store(inner, gate, mask=mask_n)
        if GATED:
            tl.store(inner + S.to(tl.int64) * N, up, mask=mask_n)
    else:
        if HAS_BIAS:
            biases = bias_ptr + expert * parts * N
            step: tl.constexpr = 2 if INTERLEAVED else 1
            gate += tl.load(biases + offs_n * step, mask=mask_n, other=0.0).to(tl.float32)
            if GATED:
                up_biases = biases + (1 if INTERLEAVED else N)
                up += tl.load(up_biases + offs_n * step, mask=mask_n, other=0.0).to(tl.float32)
        out = moe_activate(gate, up, ACTIVATION)
        tl.store(inner, out.to(inner_ptr.dtype.element_ty), mask=mask_n)
