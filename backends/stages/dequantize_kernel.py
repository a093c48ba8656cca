# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `dequantize_mxfp4_into`."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.mxfp4 import MOE_MXFP4_UNIT, moe_mxfp4_values


@fast_launch
@triton.jit
def _moe_dequantize_mxfp4_kernel(words_ptr, exponents_ptr, values_ptr, COUNT, WORDS: tl.constexpr):
    # Eight words share an exponent, wherever a row ends.
    first = tl.program_id(0).to(tl.int64) * WORDS
    rows = tl.arange(0, WORDS // 64)[:, None]
    offs_w = first + rows * 64 + tl.arange(0, 64)[None, :]
    offs_s = first // 8 + rows * 8 + tl.arange(0, 8)[None, :]
    mask = offs_w < COUNT
    words = tl.load(words_ptr + offs_w, mask=mask, other=0)
    exponents = tl.load(exponents_ptr + offs_s, mask=offs_s < COUNT // 8, other=0)
    dtype: tl.constexpr = values_ptr.dtype.element_ty
    w0, w1, w2, w3 = moe_mxfp4_values(words, exponents, dtype, WORDS // 64, 256)
    low = _moe_bits(w0) | (_moe_bits(w1) << 16)
    high = _moe_bits(w2) | (_moe_bits(w3) << 16)
    tl.store(values_ptr.to(tl.pointer_type(tl.int64)) + offs_w, low | (high << 32), mask=mask)


@triton.jit
def _moe_bits(value):
    """Of 16-bit values, which get back the unit that they lack: int64 with zeros above."""
    return (value * MOE_MXFP4_UNIT).to(value.dtype).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
