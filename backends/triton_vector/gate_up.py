# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The first product for experts with hardly a token each: weights from memory to registers, no tensor core.

A CTA serves one slot. It reads its rows of gate_up once, 16 bytes at a time with all of a chunk in flight, multiplies
in fp32, and adds across threads only at the end. Slots that share an expert run side by side, so that the second reads
the L2.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.device import moe_activate
from moe_dispatch.backends.triton_common.fast_launch import fast_launch

if TYPE_CHECKING:
    from torch import Tensor

    from moe_dispatch.backends.triton_splitk.config import SplitKConfig
    from moe_dispatch.experts import ExpertWeights


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
    if PDL:
        if not FP8:
            # The router's kernel may still run. In block FP8 the quantising kernel has waited for it.
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    e = tl.load(ids_ptr + slot)
    if (e < 0) | (e >= E):
        if PDL and FP8:
            # A kernel that ends before its predecessor would release its successor too early.
            tl.extra.cuda.gdc_wait()
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
    if PDL and FP8:
        tl.extra.cuda.gdc_wait()

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


def vector_gate_up(
    x: "Tensor",
    x_scale: "Tensor | None",
    experts: "ExpertWeights",
    topk_ids: "Tensor",
    inner: "Tensor",
    config: "SplitKConfig",
) -> None:
    """Launch the first product of the vector method.

    Args:
        x: ``[M, K]``, or its e4m3 codes.
        x_scale: fp32 multipliers of the codes ``[M, ⌈K/128⌉]``.
        experts: Checked weights.
        topk_ids: int32 or int64 ``[M, topk]``.
        inner: Written where a slot's id is valid: ``[M·topk, N]`` activated, or in block FP8 fp32
            ``[1, 2, M·topk, N]`` (``1`` for ``2`` without a gate) before bias and activation.
        config: Tile sizes.
    """
    parts = 2 if experts.gated else 1
    columns = config.vector_rows // parts
    block_k = min(config.vector_columns, max(128, triton.next_power_of_2(experts.K)))
    grid = (topk_ids.numel(), triton.cdiv(experts.N, columns))
    _moe_vector_gate_up_kernel[grid](
        x, x_scale, experts.gate_up, experts.gate_up_scale, experts.gate_up_bias, topk_ids,
        inner,
        topk_ids.numel(), experts.K, experts.N, experts.E,
        TOPK=topk_ids.shape[1], COLUMNS=columns, BLOCK_K=block_k, BLOCKS=triton.cdiv(experts.K, block_k),
        EVEN_N=experts.N % columns == 0, PDL=config.pdl, FP8=experts.dtype == "fp8", GATED=experts.gated,
        INTERLEAVED=experts.interleaved, HAS_BIAS=experts.gate_up_bias is not None, ACTIVATION=experts.activation,
        PARTIAL=config.partial_sums(experts.dtype, gated=experts.gated),
        num_warps=config.vector_warps, **({"launch_pdl": True} if config.pdl else {}),
    )  # fmt: skip
