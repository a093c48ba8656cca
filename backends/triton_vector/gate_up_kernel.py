# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `vector_gate_up`."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.device import (
    moe_activate,
    moe_e4m3_to_fp32,
    moe_gate_up_bias,
    moe_gate_up_row,
)
from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.pdl import moe_pdl_release, moe_pdl_wait


@fast_launch
@triton.jit(do_not_specialize=["E"])
def _moe_vector_gate_up_kernel(
    # inputs
    x_ptr, weight_ptr, scale_ptr, bias_ptr, ids_ptr,
    # outputs
    inner_ptr,
    # shapes
    K, N, E,
    # constants
    TOPK: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCKS: tl.constexpr, EVEN_N: tl.constexpr,
    SCALES: tl.constexpr, PDL: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = 2 if GATED else 1
    vector: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth
    vectors: tl.constexpr = BLOCK_K // vector
    slot, tile = tl.program_id(0), tl.program_id(1)
    moe_pdl_wait(PDL)  # the kernel that wrote the ids may still run
    moe_pdl_release(PDL)
    e = tl.load(ids_ptr + slot)
    if (e >= 0) & (e < E):
        expert = e.to(tl.int64)
        # Past N they repeat the last row.
        offs_n = tile * COLUMNS + tl.arange(0, COLUMNS)
        part = tl.arange(0, parts)[:, None]
        row = moe_gate_up_row(tl.minimum(offs_n, N - 1)[None, :], part, N, parts, INTERLEAVED)
        w_rows = (weight_ptr + (expert * parts * N + row) * K)[:, :, None]  # [parts, COLUMNS, 1]
        offs_k = tl.arange(0, BLOCK_K)
        w = tl.load(w_rows + offs_k[None, None, :], mask=(offs_k < K)[None, None, :], other=0)

        offs_v = tl.arange(0, vectors) * vector  # a vector lies in one block of scales
        if SCALES == "block":
            # The rows of a part lie in one block of scales, unless N shifts those of up.
            block_row = (part * N + tile * COLUMNS if EVEN_N and not INTERLEAVED else row) // 128
            scales = (scale_ptr + (expert * tl.cdiv(parts * N, 128) + block_row) * tl.cdiv(K, 128))[:, :, None]
            scale = tl.load(scales + (offs_v // 128)[None, None, :], mask=(offs_v < K)[None, None, :], other=0.0)
        # What multiplies sums, or is added to them, is on its way together with the weights.
        if SCALES == "channel":
            channel_scale = tl.load(scale_ptr + expert * parts * N + row)
        if bias_ptr is not None:
            biases = bias_ptr + expert * parts * N
            gate_bias = moe_gate_up_bias(biases, offs_n, 0, N, offs_n < N, parts, INTERLEAVED)
            if GATED:
                up_bias = moe_gate_up_bias(biases, offs_n, 1, N, offs_n < N, parts, INTERLEAVED)

        x_row = (slot // TOPK).to(tl.int64)
        acc = tl.zeros([parts, COLUMNS, vectors], dtype=tl.float32)
        for _ in range(BLOCKS):
            now = w
            offs_x = offs_k
            if SCALES == "block":
                now_scale = scale
            if BLOCKS > 1:
                offs_k += BLOCK_K
                w = tl.load(w_rows + offs_k[None, None, :], mask=(offs_k < K)[None, None, :], other=0)
                if SCALES == "block":
                    offs_v += BLOCK_K
                    mask_v = (offs_v < K)[None, None, :]
                    scale = tl.load(scales + (offs_v // 128)[None, None, :], mask=mask_v, other=0.0)
            # Products wait for x, and x for the barrier: else the compiler delays loads of weights behind products.
            tl.debug_barrier()
            x = tl.load(x_ptr + x_row * K + offs_x, mask=offs_x < K, other=0.0).to(tl.float32)[None, None, :]
            values = now.to(tl.float32) if SCALES == "none" else moe_e4m3_to_fp32(now)
            sums = tl.sum(tl.reshape(values * x, [parts, COLUMNS, vectors, vector]), axis=3)
            acc += sums * now_scale if SCALES == "block" else sums
        gate = tl.sum(acc, axis=2)  # [parts, COLUMNS]
        if SCALES == "channel":
            gate *= channel_scale
        up = None
        if GATED:
            gate, up = tl.permute(gate, (1, 0)).split()
        else:
            gate = tl.reshape(gate, [COLUMNS])
        if bias_ptr is not None:
            gate += gate_bias
            if GATED:
                up += up_bias
        out = moe_activate(gate, up, ACTIVATION)
        tl.store(inner_ptr + slot.to(tl.int64) * N + offs_n, out.to(inner_ptr.dtype.element_ty), mask=offs_n < N)
