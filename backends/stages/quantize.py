"""Activations to block FP8: e4m3 with one fp32 multiplier per row and 128 columns (DeepSeek-V3, section 3.3.2)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dispatch.experts import FP8, FP8_MAX, fp8_multiplier
from moe_dispatch.problem import QUANT_BLOCK

from ..triton_support import on_triton
from .route import Routing

# DeepGEMM's TMA loads of scales need each column to start on 16 bytes: four fp32 rows.
_SCALE_ROWS = 4


def quantize_rows(rows: Tensor, *, column_major_scales: bool = False, pdl: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise ``[R, C]`` per row and 128 columns; C may be anything.

    Args:
        rows: BF16, FP16 or FP32, contiguous.
        column_major_scales: Lay the multipliers out as DeepGEMM wants them, see `gather_quantize`.
        pdl: Launch as a programmatic dependent of the kernel before (sm_90).

    Returns:
        e4m3 ``[R, C]`` and fp32 multipliers ``[R, ⌈C/128⌉]``.
    """
    if not on_triton(rows):
        codes, scale = quantize_rows_torch(rows)
        return codes, _column_major(scale) if column_major_scales else scale
    return _launch(rows, rows.shape[0], None, 1, column_major_scales, pdl)


def gather_quantize(
    hidden_states: Tensor, routing: Routing, topk: int, *, column_major_scales: bool = False, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """Copy each row's token to its row and quantise it on the way.

    Args:
        hidden_states: ``[M, K]``.
        routing: From `route`; rows without a slot are left unwritten.
        topk: Experts per token.
        column_major_scales: Lay the multipliers out with strides (1, rows rounded up to 4), as DeepGEMM's TMA reads
            them; row-major otherwise.
        pdl: Launch as a programmatic dependent of the kernel before (sm_90).

    Returns:
        e4m3 ``[rows, K]`` and fp32 multipliers ``[rows, ⌈K/128⌉]``.
    """
    if not on_triton(hidden_states):
        codes, scale = quantize_rows_torch(gather(hidden_states, routing, topk))
        return codes, _column_major(scale) if column_major_scales else scale
    return _launch(hidden_states, routing.slot_of_row.shape[0], routing, topk, column_major_scales, pdl)


def gather(hidden_states: Tensor, routing: Routing, topk: int, *, pdl: bool = False) -> Tensor:
    """Copy each row's token to its row: ``[M, K]`` to ``[rows, K]``; rows without a slot are left unwritten."""
    slot_of_row = routing.slot_of_row
    if not on_triton(hidden_states):
        return hidden_states[slot_of_row.clamp(min=0).long() // topk]
    from .quantize_kernel import _moe_gather_kernel

    rows, K = slot_of_row.shape[0], hidden_states.shape[1]
    out = hidden_states.new_empty(rows, K)
    block_c = min(1024, 1 << (K - 1).bit_length())
    block_r = max(1, 4096 // block_c)
    _moe_gather_kernel[(math.ceil(rows / block_r), math.ceil(K / block_c))](
        # inputs
        hidden_states, slot_of_row,
        # outputs
        out,
        # shapes
        rows, K, topk,
        # constants
        BLOCK_R=block_r, BLOCK_C=block_c, PDL=pdl, num_warps=4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out


def quantize_rows_torch(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise ``[R, C]`` per row and 128 columns; the reference of `quantize_rows`.

    Returns:
        e4m3 ``[R, C]`` and fp32 multipliers ``[R, ⌈C/128⌉]``.
    """
    R, C = rows.shape
    groups = math.ceil(C / QUANT_BLOCK)
    padded = F.pad(rows.float(), (0, groups * QUANT_BLOCK - C)).view(R, groups, QUANT_BLOCK)
    scale = fp8_multiplier(padded.abs().amax(dim=2))
    codes = (padded / scale[:, :, None]).clamp(-FP8_MAX, FP8_MAX)
    return codes.view(R, -1)[:, :C].to(FP8).contiguous(), scale


def empty_scales(rows: int, columns: int, device: torch.device, *, column_major: bool) -> Tensor:
    """Fresh memory for the multipliers of ``[rows, columns]``, see `gather_quantize`."""
    groups = math.ceil(columns / QUANT_BLOCK)
    if not column_major:
        return torch.empty(rows, groups, dtype=torch.float32, device=device)
    aligned = math.ceil(rows / _SCALE_ROWS) * _SCALE_ROWS
    return torch.empty(groups, aligned, dtype=torch.float32, device=device).t()[:rows]


def _column_major(scale: Tensor) -> Tensor:
    return empty_scales(scale.shape[0], scale.shape[1] * QUANT_BLOCK, scale.device, column_major=True).copy_(scale)


def _launch(
    x: Tensor, rows: int, routing: Routing | None, topk: int, column_major_scales: bool, pdl: bool
) -> tuple[Tensor, Tensor]:
    from .quantize_kernel import _moe_quantize_rows_kernel

    columns = x.shape[1]
    codes = torch.empty(rows, columns, dtype=FP8, device=x.device)
    scale = empty_scales(rows, columns, x.device, column_major=column_major_scales)
    groups = min(8, 1 << (math.ceil(columns / QUANT_BLOCK) - 1).bit_length())
    # Column-major multipliers are written a few rows at a time, so that a warp's stores share a sector.
    block_r = 8 if column_major_scales else max(1, 16 // groups)
    groups = min(groups, 32 // block_r)
    if rows:
        _moe_quantize_rows_kernel[(math.ceil(rows / block_r), math.ceil(columns / (groups * QUANT_BLOCK)))](
            # inputs
            x, routing.slot_of_row if routing else None,
            # outputs
            codes, scale,
            # shapes
            rows, columns, topk, scale.stride(0), scale.stride(1),
            # constants
            GATHER=routing is not None, BLOCK_R=block_r, GROUPS=groups, PDL=pdl, num_warps=4,
            **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
    return codes, scale
