# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Device code of `activate` and `activate_quantize`."""

import triton
import triton.language as tl

from .device import moe_activate, moe_fp8_amax, moe_fp8_codes, moe_fp8_scale


@triton.jit
def _moe_activate_kernel(
    # inputs
    gate_up_ptr,
    slot_of_row_ptr,
    bias_ptr,
    ids_ptr,
    # outputs
    out_ptr,
    scale_ptr,
    # shapes
    rows,
    N,
    gate_up_rows,
    stride_scale_row,
    stride_scale_group,
    # constants
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_n = tl.program_id(1) * GROUPS * 128 + tl.arange(0, GROUPS * 128)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slot_of_row_ptr + offs_r, mask=offs_r < rows, other=-1)
    mask_r = slot >= 0
    mask = mask_r[:, None] & (offs_n < N)[None, :]
    row_ptrs = gate_up_ptr + offs_r.to(tl.int64)[:, None] * gate_up_rows
    offs_gate = offs_n * 2 if INTERLEAVED else offs_n
    offs_up = offs_n * 2 + 1 if INTERLEAVED else N + offs_n
    gate = tl.load(row_ptrs + offs_gate[None, :], mask=mask, other=0.0).to(tl.float32)
    up = None
    if ACTIVATION != "relu2":
        up = tl.load(row_ptrs + offs_up[None, :], mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        expert = tl.load(ids_ptr + tl.maximum(slot, 0), mask=mask_r, other=0).to(tl.int64)
        bias_ptrs = bias_ptr + expert[:, None] * gate_up_rows
        gate += tl.load(bias_ptrs + offs_gate[None, :], mask=mask, other=0.0).to(tl.float32)
        if ACTIVATION != "relu2":
            up += tl.load(bias_ptrs + offs_up[None, :], mask=mask, other=0.0).to(tl.float32)
    out = moe_activate(gate, up, ACTIVATION)  # [BLOCK_R, GROUPS * 128]
    out_ptrs = out_ptr + offs_r.to(tl.int64)[:, None] * N + offs_n[None, :]
    if QUANTIZE:
        grouped = tl.reshape(out, [BLOCK_R, GROUPS, 128])
        scale = moe_fp8_scale(moe_fp8_amax(grouped, 2))  # [BLOCK_R, GROUPS]
        codes = moe_fp8_codes(grouped, tl.broadcast_to(scale[:, :, None], [BLOCK_R, GROUPS, 128]))
        tl.store(out_ptrs, tl.reshape(codes, [BLOCK_R, GROUPS * 128]), mask=mask)
        offs_g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
        scale_ptrs = scale_ptr + offs_r.to(tl.int64)[:, None] * stride_scale_row + offs_g[None, :] * stride_scale_group
        tl.store(scale_ptrs, scale, mask=mask_r[:, None] & (offs_g * 128 < N)[None, :])
    else:
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)
