# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device functions for MXFP4 weights beside BF16 activations (see `moe_dispatch.mxfp4`). Needs Triton.

A product may add its columns in any order. A block of them is taken as four products, each of every fourth column:
four codes lie in 16 bits and four activations in 64, so that shifts and masks separate them, where codes in the order
of memory would have to change places between registers.
"""

import re

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.features import interpreting
from moe_dispatch.problem import MX_BLOCK

_INTERPRETED = tl.constexpr(interpreting())
_BLOCK = tl.constexpr(MX_BLOCK)
# What `moe_mxfp4_values` leaves out of every value, and the result of a product has to be multiplied by.
MOE_MXFP4_UNIT = tl.constexpr(1.0 if interpreting() else 2.0**32)


# Two words of four codes each become four pairs of BF16, but for the 126 between the biases of both exponents. A code
# is isolated; one product moves a copy of it to where BF16 has its sign, and another to where it has the last two bits
# of the exponent and the first of the mantissa; a mask keeps those.
_CODES_TO_BF16 = tl.constexpr("""{
    .reg .b32 upper, code;
    shr.u32 upper, $4, 8;
    and.b32 code, $4, 0x000F000F;
    mul.lo.u32 code, code, 0x1040;
    and.b32 $0, code, 0x81C081C0;
    and.b32 code, $4, 0x00F000F0;
    mul.lo.u32 code, code, 0x0104;
    and.b32 $1, code, 0x81C081C0;
    and.b32 code, upper, 0x000F000F;
    mul.lo.u32 code, code, 0x1040;
    and.b32 $2, code, 0x81C081C0;
    and.b32 code, upper, 0x00F000F0;
    mul.lo.u32 code, code, 0x0104;
    and.b32 $3, code, 0x81C081C0;
}""")
# The same, each pair times the factor that words side by side share.
_CODES_TO_SCALED_BF16 = tl.constexpr(
    re.sub(
        r"and.b32 (\$.), code.*",
        r"\g<0> fma.rn.bf16x2 \1, \1, $5, minus_zero;",
        _CODES_TO_BF16.value.replace("code;", "code, minus_zero; mov.b32 minus_zero, 0x80008000;", 1),
    )
)


@triton.jit
def moe_mxfp4_factors(exponents):
    """What the uint8 `exponents` multiply values by: pairs of equal BF16 numbers; fp32 in the interpreter.

    The difference of the biases and the scale are one factor, so that a value takes one multiplication. That is exact
    for scales from 2^-100 to 2^33; greater ones give NaN, as the exponent 255 does, and smaller ones lose bits.
    """
    bits = exponents.to(tl.int32)
    if _INTERPRETED:
        factors = tl.where(bits == 255, float("nan"), (bits << 23).to(tl.float32, bitcast=True))
    else:
        # 2^(s - 127 + 126 - 32), whose exponent has a bias of 127 in turn.
        factors = tl.where(bits > 160, 0x7FC0, (bits + 94) << 7) * 0x10001
    return factors


@triton.jit
def moe_mxfp4_values(words, exponents, dtype: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The values of weights, divided by MOE_MXFP4_UNIT, by column modulo 4: four tiles ``[ROWS, BLOCK_K/4]``.

    Args:
        words: int16 ``[ROWS, BLOCK_K/4]``, four codes each.
        exponents: uint8 ``[ROWS, BLOCK_K/32]``, or what `moe_mxfp4_factors` made of them.
        dtype: BF16; in the interpreter, which computes BF16 wrongly, FP16.
        ROWS: Rows.
        BLOCK_K: Columns.
    """
    GIVEN: tl.constexpr = exponents.dtype != tl.uint8
    factor = _moe_for_words(exponents if GIVEN else moe_mxfp4_factors(exponents), ROWS, BLOCK_K)
    if _INTERPRETED:
        first = _moe_interpreted_values(words, factor, 0, dtype)
        second = _moe_interpreted_values(words, factor, 4, dtype)
        third = _moe_interpreted_values(words, factor, 8, dtype)
        fourth = _moe_interpreted_values(words, factor, 12, dtype)
    else:
        tl.static_assert(dtype == tl.bfloat16, "MXFP4 is multiplied in BF16")
        if GIVEN:
            first, second, third, fourth = tl.inline_asm_elementwise(
                _CODES_TO_SCALED_BF16, "=r,=r,=r,=r,r,r,r", [words, factor],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            first, second, third, fourth = tl.inline_asm_elementwise(
                _CODES_TO_BF16, "=r,=r,=r,=r,r", [words],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
            )  # fmt: skip
            factor = factor.to(tl.int16).to(tl.bfloat16, bitcast=True)
            first, second, third, fourth = first * factor, second * factor, third * factor, fourth * factor
    return first, second, third, fourth


@triton.jit
def moe_every_fourth(words, dtype: tl.constexpr):
    """Activations that were loaded as int64, four in each, by column modulo 4: four tiles of the words' shape."""
    first = words.to(tl.int16).to(dtype, bitcast=True)
    second = (words >> 16).to(tl.int16).to(dtype, bitcast=True)
    third = (words >> 32).to(tl.int16).to(dtype, bitcast=True)
    fourth = (words >> 48).to(tl.int16).to(dtype, bitcast=True)
    return first, second, third, fourth


@triton.jit
def _moe_for_words(scale, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """``[ROWS, BLOCK_K/32]`` repeated for each word of four codes."""
    scale = tl.broadcast_to(scale[:, :, None], [ROWS, BLOCK_K // _BLOCK, _BLOCK // 4])
    return tl.reshape(scale, [ROWS, BLOCK_K // 4])


@triton.jit
def _moe_interpreted_values(words, scale, SHIFT: tl.constexpr, dtype: tl.constexpr):
    code = (words.to(tl.int32) >> SHIFT) & 15
    bits = ((code & 8) << 28) | ((code & 7) << 22)
    return (bits.to(tl.float32, bitcast=True) * 2.0**126 * scale).to(dtype)
