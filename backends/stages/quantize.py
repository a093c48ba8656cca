"""Activations to block FP8: e4m3 with one fp32 multiplier per row and 128 columns (DeepSeek-V3, section 3.3.2)."""

import math

import torch.nn.functional as F
from torch import Tensor

from moe_dispatch.experts import FP8, FP8_MAX, SMALLEST_AMAX
from moe_dispatch.problem import QUANT_BLOCK


def quantize_rows_torch(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise ``[R, C]`` per row and 128 columns.

    Returns:
        e4m3 ``[R, C]`` and fp32 multipliers ``[R, ⌈C/128⌉]``.
    """
    R, C = rows.shape
    groups = math.ceil(C / QUANT_BLOCK)
    padded = F.pad(rows.float(), (0, groups * QUANT_BLOCK - C)).view(R, groups, QUANT_BLOCK)
    scale = padded.abs().amax(dim=2).clamp(min=SMALLEST_AMAX) / FP8_MAX
    codes = (padded / scale[:, :, None]).clamp(-FP8_MAX, FP8_MAX)
    return codes.view(R, -1)[:, :C].to(FP8).contiguous(), scale
