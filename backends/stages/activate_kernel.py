# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Device code of `activate` and `activate_quantize`."""

import triton
import triton.language as tl

from ..launch import fast_launch
from .device import moe_activate, moe_fp8_amax, moe_fp8_codes, moe_fp8_scale


@fast_launch
@triton.jit
def _moe_activate_kernel(
    # inputs
    gate_up_ptr,
    row_of_slot_ptr,
    bias_ptr,
    ids_ptr,
    # outputs
    out_ptr,
    scale_ptr,
    # shapes
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
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per slot and GROUPS * 128 columns, so that padding costs nothing."""
    blocks = tl.cdiv(N, GROUPS * 128)
    slot = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    offs_n = block * GROUPS * 128 + tl.arange(0, GROUPS * 128)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.load(row_of_slot_ptr + slot)
    if row < 0:
        return
    mask = offs_n < N
    offs_gate = offs_n * 2 if INTERLEAVED else offs_n
    offs_up = offs_n * 2 + 1 if INTERLEAVED else N + offs_n
    row_ptr = gate_up_ptr + row.to(tl.int64) * gate_up_rows
    gate = tl.load(row_ptr + offs_gate, mask=mask, other=0.0).to(tl.float32)
    up = None
    if ACTIVATION != "relu2":
        up = tl.load(row_ptr + offs_up, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        expert_ptr = bias_ptr + tl.load(ids_ptr + slot).to(tl.int64) * gate_up_rows
        gate += tl.load(expert_ptr + offs_gate, mask=mask, other=0.0).to(tl.float32)
        if ACTIVATION != "relu2":
            up += tl.load(expert_ptr + offs_up, mask=mask, other=0.0).to(tl.float32)
    out = moe_activate(gate, up, ACTIVATION)  # [GROUPS * 128]
    out_ptrs = out_ptr + row.to(tl.int64) * N + offs_n
    if QUANTIZE:
        grouped = tl.reshape(out, [GROUPS, 128])
        scale = moe_fp8_scale(moe_fp8_amax(grouped, 1))  # [GROUPS]
        codes = moe_fp8_codes(grouped, tl.broadcast_to(scale[:, None], [GROUPS, 128]))
        tl.store(out_ptrs, tl.reshape(codes, [GROUPS * 128]), mask=mask)
        offs_g = block * GROUPS + tl.arange(0, GROUPS)
        first = (row // span).to(tl.int64) * stride_scale_span + (row % span).to(tl.int64) * stride_scale_row
        tl.store(scale_ptr + first + offs_g * stride_scale_group, scale, mask=offs_g * 128 < N)
    else:
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)
