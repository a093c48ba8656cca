# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device functions that several kernels share: the activation, rows and biases of gate_up, e4m3 and its values.

Imported by kernel modules only: it needs Triton. The arithmetic is that of `moe_dispatch.numerics`.
"""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.features import interpreting
from moe_dispatch.backends.triton_common.internals import lowers_for
from moe_dispatch.numerics import FP8_MAX, SMALLEST_AMAX

# Where the conversion from fp32 to e4m3 is not correctly rounded: in Triton's interpreter, which rounds up and loses
# the carry, and where kernels are lowered for a device before sm_90 (see `moe_fp8_codes`) while they run on a newer
# one, so that the device's own capability does not tell.
_ROUNDS_BADLY = tl.constexpr(interpreting() or lowers_for("sm80", "sm86", "sm89"))
# Where e4m3 is no type of its own, or is lowered for a device on which it is none.
_LACKS_E4M3 = tl.constexpr(interpreting() or lowers_for("sm80", "sm86"))
_INTERPRETED = tl.constexpr(interpreting())
_FP8_MAX = tl.constexpr(FP8_MAX)
_SMALLEST_AMAX = tl.constexpr(SMALLEST_AMAX)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)
_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


@triton.constexpr_function
def moe_swiglu_parameter(ACTIVATION, name):
    """A parameter of an activation that is a SwiGLU, when a kernel is compiled; None where it has none."""
    from moe_dispatch.activations import swiglu

    return getattr(swiglu(ACTIVATION), name)


@triton.jit
def moe_sigmoid(x):
    """1 / (1 + exp(-x)) of an fp32 tile, by bare instructions: what a factor times it is, a quotient would be as well.

    On the device a quotient is the product with the reciprocal too, and its checks of ranges are half of an epilogue's
    work. They matter below x = -87.34 alone: there a quotient is not zero before exp overflows at -88.73, and this is.
    """
    if _INTERPRETED:
        out = 1.0 / (1.0 + tl.exp(-x))
    else:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * _MINUS_LOG2_E], dtype=tl.float32, is_pure=True, pack=1
        )
        out = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], dtype=tl.float32, is_pure=True, pack=1
        )
    return out


@triton.jit
def moe_activate(gate, up, ACTIVATION: tl.constexpr):
    """The activation of fp32 tiles of one shape; where there is no gate, `up` is not used and may be anything."""
    if ACTIVATION == "relu2":
        rectified = tl.where(gate > 0, gate, gate * 0.0)  # keeps NaN, which maximum would drop
        out = rectified * rectified
    elif ACTIVATION == "silu":
        out = gate * moe_sigmoid(gate) * up
    elif ACTIVATION == "gelu":
        out = 0.5 * gate * (1.0 + tl.erf(gate * _SQRT_HALF)) * up
    elif ACTIVATION == "gelu_tanh":
        # 0.5 · (1 + tanh z) is sigmoid(2z).
        z = _SQRT_2_OVER_PI * (gate + 0.044715 * gate * gate * gate)
        out = gate * moe_sigmoid(2.0 * z) * up
    else:
        ALPHA: tl.constexpr = moe_swiglu_parameter(ACTIVATION, "alpha")
        SHIFT: tl.constexpr = moe_swiglu_parameter(ACTIVATION, "shift")
        LIMIT: tl.constexpr = moe_swiglu_parameter(ACTIVATION, "limit")
        if LIMIT is not None:
            gate = tl.where(gate > LIMIT, LIMIT, gate)
            up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        factor = _moe_cap(gate, moe_swiglu_parameter(ACTIVATION, "gate_cap"))
        up = _moe_cap(up, moe_swiglu_parameter(ACTIVATION, "up_cap"))
        # The sigmoid first: of large numbers, (up + shift) · factor could be infinite, and zero times that is NaN.
        out = factor * moe_sigmoid(gate * ALPHA) * (up + SHIFT)
    return out


@triton.jit
def _moe_cap(x, CAP: tl.constexpr):
    """CAP · tanh(x / CAP); x itself where CAP is None."""
    if CAP is not None:
        z = x * (1.0 / CAP)
        # Near zero the difference from 1 would leave nothing of the fraction: there it is tanh's series, to z⁹.
        series = 1.0 + z * z * (-1 / 3 + z * z * (2 / 15 + z * z * (-17 / 315 + z * z * (62 / 2835))))
        x = tl.where(tl.abs(z) < 0.25, x * series, CAP * (1.0 - 2.0 * moe_sigmoid(-2.0 * z)))
    return x


@triton.jit
def _moe_cap_slope(capped, CAP: tl.constexpr):
    """The derivative of `_moe_cap`, from its result."""
    slope = tl.full(capped.shape, 1.0, tl.float32)
    if CAP is not None:
        slope = 1.0 - capped * capped * (1.0 / (CAP * CAP))
    return slope


@triton.jit
def moe_activation_gradient(gate, up, d_inner, ACTIVATION: tl.constexpr):
    """The gradients of gate and up, where `d_inner` is that of `moe_activate`; fp32 tiles of one shape.

    At a clamp's limit the gradient passes, as torch has it. Where there is no gate, the second result means nothing.
    """
    if ACTIVATION == "relu2":
        d_gate = 2.0 * tl.where(gate > 0, gate, gate * 0.0) * d_inner
        d_up = d_gate
    elif ACTIVATION == "silu":
        sigmoid = moe_sigmoid(gate)
        d_gate = d_inner * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        d_up = d_inner * gate * sigmoid
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(gate * _SQRT_HALF))
        d_gate = d_inner * up * (share + gate * _INVERSE_SQRT_2_PI * tl.exp(-0.5 * gate * gate))
        d_up = d_inner * gate * share
    elif ACTIVATION == "gelu_tanh":
        z = _SQRT_2_OVER_PI * (gate + 0.044715 * gate * gate * gate)
        share = moe_sigmoid(2.0 * z)
        slope = 2.0 * _SQRT_2_OVER_PI * (1.0 + 3.0 * 0.044715 * gate * gate)
        d_gate = d_inner * up * share * (1.0 + gate * (1.0 - share) * slope)
        d_up = d_inner * gate * share
    else:
        ALPHA: tl.constexpr = moe_swiglu_parameter(ACTIVATION, "alpha")
        SHIFT: tl.constexpr = moe_swiglu_parameter(ACTIVATION, "shift")
        LIMIT: tl.constexpr = moe_swiglu_parameter(ACTIVATION, "limit")
        GATE_CAP: tl.constexpr = moe_swiglu_parameter(ACTIVATION, "gate_cap")
        UP_CAP: tl.constexpr = moe_swiglu_parameter(ACTIVATION, "up_cap")
        passed_gate, passed_up = gate, up
        if LIMIT is not None:
            gate = tl.where(gate > LIMIT, LIMIT, gate)
            up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        factor, capped_up = _moe_cap(gate, GATE_CAP), _moe_cap(up, UP_CAP)
        sigmoid = moe_sigmoid(gate * ALPHA)
        slope = sigmoid * (_moe_cap_slope(factor, GATE_CAP) + ALPHA * factor * (1.0 - sigmoid))
        d_gate = d_inner * (capped_up + SHIFT) * slope
        d_up = d_inner * factor * sigmoid * _moe_cap_slope(capped_up, UP_CAP)
        if LIMIT is not None:
            d_gate = tl.where(passed_gate > LIMIT, 0.0, d_gate)
            d_up = tl.where((passed_up > LIMIT) | (passed_up < -LIMIT), 0.0, d_up)
    return d_gate, d_up


@triton.jit
def moe_gate_up_row(column, part, N, PARTS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Which of an expert's gate_up rows computes a column of the intermediate.

    Args:
        column: Columns of the intermediate, 0…N-1.
        part: 0 for the gate's row and 1 for up's; always 0 where PARTS is 1. May be a constant or a tensor.
        N: Intermediate size.
        PARTS: 2, or 1 for an activation without a gate.
        INTERLEAVED: Whether gate and up rows alternate, instead of all gate rows first.
    """
    return column * PARTS + part if INTERLEAVED else part * N + column


@triton.jit
def moe_gate_up_bias(biases, column, part, N, mask, PARTS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The biases, in fp32, of the gate_up rows that `moe_gate_up_row` names; 0 where the mask is off.

    `biases` is where an expert's biases start: one pointer, or several in a shape that broadcasts with `column`.
    """
    return tl.load(biases + moe_gate_up_row(column, part, N, PARTS, INTERLEAVED), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def moe_fp8_amax(values, AXIS: tl.constexpr):
    """The greatest magnitude of fp32 values along an axis; NaN if there is one, so that its group becomes NaN."""
    # Read as integers, magnitudes keep their order and NaN is above infinity, so that a plain maximum will do.
    magnitudes = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(magnitudes, AXIS).to(tl.float32, bitcast=True)


@triton.jit
def moe_fp8_scale(amax):
    """The multiplier of a group whose greatest magnitude is `amax`; the numerics of `quantize_rows_torch`."""
    clamped = tl.where(amax < _SMALLEST_AMAX, _SMALLEST_AMAX, amax)
    return tl.div_rn(clamped, tl.full(clamped.shape, _FP8_MAX, tl.float32))


@triton.jit
def moe_fp8_codes(values, scale):
    """e4m3 codes of fp32 values; `scale` has their shape."""
    # Before sm_90 Triton converts by way of fp16, truncating, which turns values just above a tie into ties.
    if _ROUNDS_BADLY or not tl.target_info.cuda_capability_geq(9, 0):
        codes = tl.div_rn(values, scale)
        codes = tl.where(codes > _FP8_MAX, _FP8_MAX, tl.where(codes < -_FP8_MAX, -_FP8_MAX, codes))
        codes = _moe_round_to_e4m3(codes)
    else:
        # The correctly rounded quotient from one reciprocal per group and three operations per element (Markstein's
        # division); the plain product with the reciprocal would change codes on a tie. The conversion saturates.
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        quotient = values * inverse
        codes = tl.fma(tl.fma(-quotient, scale, values), inverse, quotient)
    return codes.to(tl.float8e4nv)


@triton.jit
def _moe_round_to_e4m3(values):
    """The nearest e4m3 value of each, ties to even."""
    bits = values.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)
    subnormal = (values + 24576.0) - 24576.0  # 1.5 · 2^14: its last bit is 2^-9
    rounded = tl.where(tl.abs(values) < 0.015625, subnormal, normal)
    return tl.where(values == values, rounded, values)  # noqa: PLR0124 - a NaN is not itself


def _pairs(codes: str, pairs: tuple[str, str], shift: int) -> str:
    """PTX that moves four e4m3 codes of one register to two pairs of 16 bits, as BF16 or FP16 has their fields.

    A code is extended by its sign and shifted, and a mask keeps one sign, exponent and mantissa. The exponent is too
    small by the difference of the biases: what results is the code's value, subnormal ones included, divided by 2^120
    in BF16 (`shift` is 4) or by 2^8 in FP16 (7). NaN becomes 480 divided by that; the greatest magnitude is 448.
    """
    mask = 0x8000 | 0x7F << shift
    selected = zip(pairs, ("0x9180", "0xB3A2"), strict=True)
    return "".join(f"""
    prmt.b32 {pair}, {codes}, 0, {selector};
    shl.b32 {pair}, {pair}, {shift};
    and.b32 {pair}, {pair}, 0x{mask:04x}{mask:04x};""" for pair, selector in selected)  # fmt: skip


def _values(dtype: str, shift: int, power: int, overflow: int) -> tl.constexpr:
    """PTX of `moe_fp8_values` for ``"bf16"`` or ``"f16"``, given the bits of the power of two and of another factor.

    A value times that factor overflows for 480 alone, and zero times infinity is NaN.
    """
    exact = "".join(f"""
    fma.rn.{dtype}x2 {pair}, {pair}, power, minus_zero;
    fma.rn.{dtype}x2 infinite, {pair}, overflow, minus_zero;
    fma.rn.{dtype}x2 {pair}, infinite, zero, {pair};""" for pair in ("$0", "$1"))  # fmt: skip
    return tl.constexpr(f"""{{
    .reg .b32 infinite, power, overflow, zero, minus_zero;
    mov.b32 zero, 0;
    mov.b32 minus_zero, 0x80008000;
    mov.b32 power, 0x{power:04x}{power:04x};
    mov.b32 overflow, 0x{overflow:04x}{overflow:04x};{_pairs("$2", ("$0", "$1"), shift)}{exact}
    }}""")  # fmt: skip


_TO_BF16 = _values("bf16", 4, 0x7B80, 0x7B0D)  # 2^120; 1.1015625 · 2^119
_TO_FP16 = _values("f16", 7, 0x5C00, 0x5860)  # 2^8; 140
_TO_SMALL_BF16 = tl.constexpr("{" + _pairs("$2", ("$0", "$1"), 4) + "}")
_TO_SMALL_FP16 = tl.constexpr("{" + _pairs("$2", ("$0", "$1"), 7) + "}")
# Adding 1 to the magnitude of NaN, and to no other, reaches its code's uppermost bit.
_TO_MARKS = tl.constexpr("""{
    and.b32 $0, $1, 0x7F7F7F7F;
    add.u32 $0, $0, 0x01010101;
    and.b32 $0, $0, 0x80808080;
}""")
# Four codes become four fp32 by way of FP16. 144 · 2^8: 448 · 144 is an FP16 number, and 480 · 144 overflows.
_TO_MULTIPLES = tl.constexpr("""{
    .reg .b32 first, second, factor;
    .reg .b16 lower, upper;
    mov.b32 factor, 0x78807880;""" + _pairs("$4", ("first", "second"), 7) + "".join(f"""
    mul.rn.f16x2 {pair}, {pair}, factor;
    mov.b32 {{lower, upper}}, {pair};
    cvt.f32.f16 ${place}, lower;
    cvt.f32.f16 ${place + 1}, upper;""" for pair, place in (("first", 0), ("second", 2))) + "}")  # fmt: skip
_MULTIPLE = tl.constexpr(144.0)


@triton.jit
def moe_fp8_values(codes, dtype: tl.constexpr):
    """The exact values in BF16 or FP16 of e4m3 codes that are given as bytes; NaN stays NaN.

    For devices without e4m3, to which neither Triton nor PTX converts it.
    """
    if _INTERPRETED:
        # The interpreter has no PTX, and computes BF16 wrongly: FP16, from which other types follow exactly.
        bits = ((codes & 0x80).to(tl.uint16) << 8) | ((codes & 0x7F).to(tl.uint16) << 7)
        values = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        values = tl.where((codes & 0x7F) == 0x7F, float("nan"), values).to(dtype)
    elif dtype == tl.bfloat16:
        values = tl.inline_asm_elementwise(_TO_BF16, "=&r,=&r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        tl.static_assert(dtype == tl.float16, "values are BF16 or FP16")
        values = tl.inline_asm_elementwise(_TO_FP16, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)
    return values


@triton.constexpr_function
def moe_fp8_unit(dtype):
    """What `moe_fp8_parts` divides by."""
    return 2.0**120 if dtype == tl.bfloat16 else 2.0**8


@triton.jit
def moe_fp8_parts(codes, dtype: tl.constexpr):
    """Like `moe_fp8_values`, but the scaling by a power of two and NaN are left to the product.

    Returns:
        The values divided by `moe_fp8_unit`, with ±480 divided by it in place of NaN; and int8 marks, -128 for NaN and
        else 0.
    """
    if _INTERPRETED:
        bits = ((codes & 0x80).to(tl.uint16) << 8) | ((codes & 0x7F).to(tl.uint16) << 7)
        values = bits.to(tl.float16, bitcast=True).to(dtype)
        marks = tl.where((codes & 0x7F) == 0x7F, -128, 0).to(tl.int8)
    else:
        # Two operations, because Triton 3.8 runs an operation with two results twice.
        marks = tl.inline_asm_elementwise(_TO_MARKS, "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4)
        if dtype == tl.bfloat16:
            values = tl.inline_asm_elementwise(
                _TO_SMALL_BF16, "=&r,=&r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
            )
        else:
            tl.static_assert(dtype == tl.float16, "values are BF16 or FP16")
            values = tl.inline_asm_elementwise(
                _TO_SMALL_FP16, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
            )
    return values, marks


@triton.jit
def moe_e4m3_to_fp32(codes):
    """The values, exact, of e4m3 codes that are given as bytes; `moe_e4m3_sums` takes sums of their products.

    Where a device or Triton lacks the type they are multiples, infinite for NaN, which take fewer instructions.
    """
    if _INTERPRETED:
        values = moe_fp8_values(codes, tl.float16).to(tl.float32) * _MULTIPLE
    elif _LACKS_E4M3 or not tl.target_info.cuda_capability_geq(8, 9):
        values = tl.inline_asm_elementwise(
            _TO_MULTIPLES, "=&f,=&f,=&f,=&f,r", [codes], dtype=tl.float32, is_pure=True, pack=4
        )
    else:
        values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return values


@triton.jit
def moe_e4m3_sums(sums):
    """Sums of products with what `moe_e4m3_to_fp32` returns, as they are with the values; NaN where infinite."""
    if _LACKS_E4M3 or not tl.target_info.cuda_capability_geq(8, 9):
        sums = tl.where(tl.abs(sums) < float("inf"), sums / _MULTIPLE, float("nan"))
    return sums


@triton.jit
def moe_output_token(addresses_ptr, peer_rows):
    """The token that a program of the first grid dimension sums, int64.

    Where the output lies in several ranks' memory, successive programs take successive ranks, so that the links work
    all the time.
    """
    token = tl.program_id(0).to(tl.int64)
    if addresses_ptr is not None:
        ranks = tl.num_programs(0) // peer_rows
        token = token % ranks * peer_rows + token // ranks
    return token


@triton.jit
def moe_output_row(out_ptr, addresses_ptr, offset, peer_rows, token, K):
    """Where a token's row of the output begins; see `PeerRows` for the rows of several ranks.

    Where there are addresses, `out_ptr` has the output's dtype only. The token's number is an int64.
    """
    if addresses_ptr is not None:
        address = tl.load(addresses_ptr + token // peer_rows) + offset
        out_ptr = tl.multiple_of(address.to(tl.pointer_type(out_ptr.dtype.element_ty)), 16)
        token = token % peer_rows
    return out_ptr + token * K


@triton.jit
def moe_prefetch_lines(pointers):
    """Bring the lines of memory at these pointers to the L2 without waiting for them."""
    if not _INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l", [pointers.to(tl.int64, bitcast=True)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
