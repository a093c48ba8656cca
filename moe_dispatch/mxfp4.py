"""MXFP4 in torch: E2M1 codes with a power of two for every 32 of them along a row.

The form is that of the OCP Microscaling Formats specification, v1.0 (2023), in which gpt-oss is published. A byte holds
two codes, that of the even column in its low half: a sign, two bits of exponent, one of mantissa. A scale is an
exponent of eight bits (E8M0): s stands for 2^(s - 127), and 255 for NaN.
"""

import itertools
from typing import Final

import torch
from torch import Tensor

from moe_dispatch.problem import MX_BLOCK

MAGNITUDES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LARGEST_EXPONENT: Final = 2  # of a code: 4 and 6 are 1 and 1.5 times 2²
_BIAS: Final = 127
_NAN: Final = 255


def quantize_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise weights by the specification's conversion (its section 6.3).

    The scale of 32 weights is a quarter of the greatest power of two that is not above their greatest magnitude, so
    that 6 stands for up to 8 times the scale. Codes are the nearest, ties to even. Where one of the 32 is NaN or
    infinite, for which there are no codes, all of them become NaN.

    Args:
        weight: ``[E, R, C]`` of any float dtype; C is a multiple of 32.

    Returns:
        Bytes ``[E, R, C/2]`` and scales ``[E, R, C/32]``, both uint8.
    """
    E, R, C = weight.shape
    codes = torch.empty(E, R, C // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(E, R, C // MX_BLOCK, dtype=torch.uint8, device=weight.device)
    for e in range(E):  # one expert at a time, as fp32 copies of a whole layer would not fit beside it
        blocks = weight[e].float().view(R, C // MX_BLOCK, MX_BLOCK)
        amax = blocks.abs().amax(dim=2)
        exponent = torch.frexp(amax).exponent - 1 - _LARGEST_EXPONENT  # frexp's fraction is from 0.5 to 1
        exponent = exponent.where(amax > 0, -_BIAS).clamp(-_BIAS, _NAN - 1 - _BIAS)
        values = torch.ldexp(blocks, -exponent[:, :, None])
        code = (_nearest(values.abs()) + 8 * values.signbit()).view(R, C // 2, 2)
        codes[e] = code[:, :, 0] + 16 * code[:, :, 1]
        scale[e] = (exponent + _BIAS).where(amax.isfinite(), _NAN)
    return codes, scale


def dequantize_mxfp4(codes: Tensor, scale: Tensor) -> Tensor:
    """Undo `quantize_mxfp4`, for one expert or all.

    Args:
        codes: Bytes ``[…, R, C/2]``.
        scale: uint8 ``[…, R, C/32]``.

    Returns:
        fp32 ``[…, R, C]``.
    """
    values = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)], dtype=torch.float32, device=codes.device)
    pairs = torch.stack([values[(codes & 15).int()], values[(codes >> 4).int()]], dim=-1)
    multipliers = scale.view(torch.float8_e8m0fnu).float()
    return pairs.flatten(-2) * multipliers.repeat_interleave(MX_BLOCK, dim=-1)


def _nearest(magnitudes: Tensor) -> Tensor:
    """The nearest codes, without sign: the number of midpoints that are passed. A midpoint goes to the even code."""
    code = torch.zeros_like(magnitudes, dtype=torch.uint8)
    for number, (low, high) in enumerate(itertools.pairwise(MAGNITUDES)):
        middle = (low + high) / 2
        code += magnitudes >= middle if number % 2 else magnitudes > middle
    return code
