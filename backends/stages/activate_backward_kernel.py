# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `activate_backward`."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.device import (
    moe_activate,
    moe_activation_gradient,
    moe_gate_up_bias,
    moe_gate_up_row,
)
from moe_dispatch.backends.triton_common.fast_launch import fast_launch


@fast_launch
@triton.jit
def _moe_activate_backward_kernel(
    # inputs
    row_of_slot_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    # inputs and outputs
    gate_up_ptr,
    inner_ptr,
    # outputs
    d_weights_ptr,
    # shapes
    N,
    gate_up_rows,
    # constants
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program takes a slot's row. Each element is read before it is overwritten, by the same program."""
    slot = tl.program_id(0)
    row = tl.load(row_of_slot_ptr + slot).to(tl.int64)
    GATED: tl.constexpr = ACTIVATION != "relu2"
    PARTS: tl.constexpr = 2 if GATED else 1
    weight = tl.load(weights_ptr + slot, mask=row >= 0, other=0.0).to(tl.float32)
    expert = row
    if bias_ptr is not None:
        expert = tl.load(ids_ptr + slot, mask=row >= 0, other=0).to(tl.int64)
    products = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = (offs_n < N) & (row >= 0)
        gate_ptrs = gate_up_ptr + row * gate_up_rows + moe_gate_up_row(offs_n, 0, N, PARTS, INTERLEAVED)
        up_ptrs = gate_up_ptr + row * gate_up_rows + moe_gate_up_row(offs_n, PARTS - 1, N, PARTS, INTERLEAVED)
        inner_ptrs = inner_ptr + row * N + offs_n
        gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptrs, mask=mask, other=0.0).to(tl.float32) if GATED else gate
        d_inner = tl.load(inner_ptrs, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            biases = bias_ptr + expert * gate_up_rows
            gate += moe_gate_up_bias(biases, offs_n, 0, N, mask, PARTS, INTERLEAVED)
            if GATED:
                up += moe_gate_up_bias(biases, offs_n, 1, N, mask, PARTS, INTERLEAVED)
        inner = moe_activate(gate, up, ACTIVATION)
        products += tl.where(mask, inner * d_inner, 0.0)
        d_gate, d_up = moe_activation_gradient(gate, up, d_inner * weight, ACTIVATION)
        tl.store(inner_ptrs, (inner * weight).to(inner_ptr.dtype.element_ty), mask=mask)
        tl.store(gate_ptrs, d_gate.to(gate_up_ptr.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(up_ptrs, d_up.to(gate_up_ptr.dtype.element_ty), mask=mask)
    tl.store(d_weights_ptr + slot, tl.sum(products, 0))
