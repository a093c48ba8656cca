# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Device code of spread.py: one program per slot and stretch of columns."""

import triton
import triton.language as tl

from .device import moe_activate, moe_fp8_codes, moe_fp8_scale


@triton.jit
def _moe_store_quantized(values, out_ptr, scale_ptr, row, columns, capacity, GROUPS: tl.constexpr):
    """Store fp32 values ``[GROUPS * 128]`` of a row as e4m3, their multipliers expert by expert, rows adjacent."""
    offs_c = tl.program_id(1) * GROUPS * 128 + tl.arange(0, GROUPS * 128)
    offs_g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    grouped = tl.reshape(values, [GROUPS, 128])
    scale = moe_fp8_scale(tl.max(tl.abs(grouped), 1))  # [GROUPS]
    codes = moe_fp8_codes(grouped, tl.broadcast_to(scale[:, None], [GROUPS, 128]))
    tl.store(out_ptr + row * columns + offs_c, tl.reshape(codes, [GROUPS * 128]), mask=offs_c < columns)
    first = row // capacity * tl.cdiv(columns, 128) * capacity + row % capacity
    tl.store(scale_ptr + first + offs_g * capacity, scale, mask=offs_g * 128 < columns)


@triton.jit
def _moe_spread_kernel(
    # inputs
    x_ptr,
    row_of_slot_ptr,
    # outputs
    out_ptr,
    scale_ptr,
    # shapes
    columns,
    topk,
    capacity,
    # constants
    GROUPS: tl.constexpr,
):
    slot = tl.program_id(0)
    offs_c = tl.program_id(1) * GROUPS * 128 + tl.arange(0, GROUPS * 128)
    row = tl.load(row_of_slot_ptr + slot).to(tl.int64)
    if row < 0:
        return
    mask = offs_c < columns
    x = tl.load(x_ptr + (slot // topk).to(tl.int64) * columns + offs_c, mask=mask, other=0.0)
    if scale_ptr is None:
        tl.store(out_ptr + row * columns + offs_c, x, mask=mask)
    else:
        _moe_store_quantized(x.to(tl.float32), out_ptr, scale_ptr, row, columns, capacity, GROUPS)


@triton.jit
def _moe_activate_spread_kernel(
    # inputs
    gate_up_ptr,
    row_of_slot_ptr,
    bias_ptr,
    # outputs
    out_ptr,
    scale_ptr,
    # shapes
    N,
    gate_up_rows,
    capacity,
    # constants
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GROUPS: tl.constexpr,
):
    offs_n = tl.program_id(1) * GROUPS * 128 + tl.arange(0, GROUPS * 128)
    row = tl.load(row_of_slot_ptr + tl.program_id(0)).to(tl.int64)
    if row < 0:
        return
    mask = offs_n < N
    offs_gate = offs_n * 2 if INTERLEAVED else offs_n
    offs_up = offs_n * 2 + 1 if INTERLEAVED else N + offs_n
    row_ptr = gate_up_ptr + row * gate_up_rows
    gate = tl.load(row_ptr + offs_gate, mask=mask, other=0.0).to(tl.float32)
    up = None
    if ACTIVATION != "relu2":
        up = tl.load(row_ptr + offs_up, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        row_bias_ptr = bias_ptr + row // capacity * gate_up_rows
        gate += tl.load(row_bias_ptr + offs_gate, mask=mask, other=0.0).to(tl.float32)
        if ACTIVATION != "relu2":
            up += tl.load(row_bias_ptr + offs_up, mask=mask, other=0.0).to(tl.float32)
    out = moe_activate(gate, up, ACTIVATION)
    if scale_ptr is None:
        tl.store(out_ptr + row * N + offs_n, out.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        _moe_store_quantized(out, out_ptr, scale_ptr, row, N, capacity, GROUPS)
