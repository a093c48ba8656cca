# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `activate` and `activate_quantize`."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.device import (
    moe_activate,
    moe_fp8_amax,
    moe_fp8_codes,
    moe_fp8_scale,
    moe_gate_up_bias,
    moe_gate_up_row,
)
from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.pdl import moe_pdl_wait_and_release


@fast_launch
@triton.jit
def _moe_activate_kernel(
    # inputs
    gate_up_ptr,
    row_of_slot_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    # outputs
    out_ptr,
    scale_ptr,
    # shapes
    slots,
    N,
    gate_up_rows,
    span,
    stride_scale_span,
    stride_scale_row,
    stride_scale_group,
    # constants
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes SLOTS slots and GROUPS * 128 columns of their rows. Rows that are padding cost nothing."""
    blocks = tl.cdiv(N, GROUPS * 128)
    offs_s = tl.program_id(0) // blocks * SLOTS + tl.arange(0, SLOTS)
    block = tl.program_id(0) % blocks
    offs_n = block * GROUPS * 128 + tl.arange(0, GROUPS * 128)
    moe_pdl_wait_and_release(PDL)
    row = tl.load(row_of_slot_ptr + offs_s, mask=offs_s < slots, other=-1)
    mask_s = row >= 0
    mask = mask_s[:, None] & (offs_n < N)[None, :]
    GATED: tl.constexpr = ACTIVATION != "relu2"
    PARTS: tl.constexpr = 2 if GATED else 1
    offs_gate = moe_gate_up_row(offs_n, 0, N, PARTS, INTERLEAVED)
    row_ptrs = gate_up_ptr + row.to(tl.int64)[:, None] * gate_up_rows
    gate = tl.load(row_ptrs + offs_gate[None, :], mask=mask, other=0.0).to(tl.float32)
    up = gate
    if GATED:
        offs_up = moe_gate_up_row(offs_n, 1, N, PARTS, INTERLEAVED)
        up = tl.load(row_ptrs + offs_up[None, :], mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        expert = tl.load(ids_ptr + offs_s, mask=mask_s, other=0).to(tl.int64)
        biases = bias_ptr + expert[:, None] * gate_up_rows
        gate += moe_gate_up_bias(biases, offs_n[None, :], 0, N, mask, PARTS, INTERLEAVED)
        if GATED:
            up += moe_gate_up_bias(biases, offs_n[None, :], 1, N, mask, PARTS, INTERLEAVED)
    out = moe_activate(gate, up, ACTIVATION)  # [SLOTS, GROUPS * 128]
    if weights_ptr is not None:
        share = tl.load(weights_ptr + offs_s, mask=mask_s, other=0.0)
        out *= (share / tl.maximum(tl.abs(share), 1.0))[:, None]
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * N + offs_n[None, :]
    if QUANTIZE:
        grouped = tl.reshape(out, [SLOTS, GROUPS, 128])
        scale = moe_fp8_scale(moe_fp8_amax(grouped, 2))  # [SLOTS, GROUPS]
        codes = moe_fp8_codes(grouped, tl.broadcast_to(scale[:, :, None], [SLOTS, GROUPS, 128]))
        tl.store(out_ptrs, tl.reshape(codes, [SLOTS, GROUPS * 128]), mask=mask)
        offs_g = block * GROUPS + tl.arange(0, GROUPS)
        first = (row // span).to(tl.int64) * stride_scale_span + (row % span).to(tl.int64) * stride_scale_row
        scale_ptrs = scale_ptr + first[:, None] + offs_g[None, :] * stride_scale_group
        tl.store(scale_ptrs, scale, mask=mask_s[:, None] & (offs_g * 128 < N)[None, :])
    else:
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)
