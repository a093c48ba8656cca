# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""A kernel that only applies an activation, to fp32 values."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.device import moe_activate


@triton.jit
def _moe_activated_values_kernel(gate_ptr, up_ptr, out_ptr, ACTIVATION: tl.constexpr, SIZE: tl.constexpr):
    offs = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    out = moe_activate(tl.load(gate_ptr + offs), tl.load(up_ptr + offs), ACTIVATION)
    tl.store(out_ptr + offs, out)
