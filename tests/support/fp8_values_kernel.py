# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Kernels around `moe_fp8_values` and `moe_fp8_parts`, to test them by themselves."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.device import moe_fp8_parts, moe_fp8_unit, moe_fp8_values


@triton.jit
def _moe_values_of_codes_kernel(codes_ptr, values_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    values = moe_fp8_values(tl.load(codes_ptr + offs), values_ptr.dtype.element_ty)
    tl.store(values_ptr + offs, values)


@triton.jit
def _moe_parts_of_codes_kernel(codes_ptr, values_ptr, marks_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    values, marks = moe_fp8_parts(tl.load(codes_ptr + offs), values_ptr.dtype.element_ty)
    values = values.to(tl.float32) * moe_fp8_unit(values_ptr.dtype.element_ty)
    tl.store(values_ptr + offs, values.to(values_ptr.dtype.element_ty))
    tl.store(marks_ptr + offs, marks)
