# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""A kernel around `moe_fp8_values`, to test it by itself."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.device import moe_fp8_values


@triton.jit
def _moe_values_of_codes_kernel(codes_ptr, values_ptr):
    offs = tl.arange(0, 256)
    values = moe_fp8_values(tl.load(codes_ptr + offs), values_ptr.dtype.element_ty)
    tl.store(values_ptr + offs, values)
