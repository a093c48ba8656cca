"""Gathering rows, and quantising activations: e4m3 with one fp32 multiplier per row and 128 columns, or per row.

The first scheme, that of block FP8, is DeepSeek-V3's (technical report, section 3.3.2); the second goes with weights
that have a scale per channel.
"""

import math
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from moe_dispatch.arrived_rows import TravellingRows
from moe_dispatch.backends.stages.route import Routing
from moe_dispatch.backends.triton_common.features import on_triton
from moe_dispatch.backends.triton_common.launch_options import next_power_of_2, pdl_option
from moe_dispatch.backends.triton_common.quantization import Quantization
from moe_dispatch.numerics import FP8, QuantizedRows, quantize_rows_torch
from moe_dispatch.problem import QUANT_BLOCK

# From this many column-major multipliers on, `gather_quantize` writes those of the tokens first and spreads them over
# their rows in a second pass, which writes whole sectors of memory. (H200, DeepSeek-V3, 16384 tokens: one pass takes
# 446 µs, and 324 µs where multipliers are row-major.)
_SPREAD_FROM: Final = 1 << 20
_SPREAD_ROWS: Final = 64
# DeepGEMM's TMA loads of scales need each column to start on 16 bytes: four fp32 rows.
_SCALE_ROWS = 4


def quantize_rows(rows: Tensor, *, per_token: bool = False, pdl: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise ``[R, C]`` per row and 128 columns, or per row; C may be anything.

    Args:
        rows: BF16, FP16 or FP32 ``[R, C]``, contiguous.
        per_token: Whether a row has one multiplier.
        pdl: Launch as a programmatic dependent of the kernel before (sm_90 and newer).

    Returns:
        e4m3 ``[R, C]`` and fp32 multipliers ``[R, ⌈C/128⌉]``, or ``[R, 1]`` per token.
    """
    R, C = rows.shape
    scale = empty_scales(R, 1 if per_token else C, rows, column_major=False)
    if not on_triton(rows):
        codes, plain = quantize_rows_torch(rows, per_token=per_token)
        return codes, scale.copy_(plain)
    from moe_dispatch.backends.stages.quantize_kernel import _moe_quantize_rows_kernel

    codes = rows.new_empty(R, C, dtype=FP8)
    if per_token:
        block_r, groups, width = 1, 1, max(QUANT_BLOCK, next_power_of_2(C))
        warps = min(16, max(1, width // 256))
    else:
        groups, width, warps = column_groups(C), QUANT_BLOCK, 4
        block_r = max(1, 16 // groups)
        groups = min(groups, 32 // block_r)
    if R:
        _moe_quantize_rows_kernel[(math.ceil(R / block_r), math.ceil(C / (groups * width)))](
            # inputs
            rows,
            # outputs
            codes, scale,
            # shapes
            R, C, scale.stride(0), scale.stride(1),
            # constants
            BLOCK_R=block_r, GROUPS=groups, WIDTH=width, PDL=pdl, num_warps=warps, **pdl_option(pdl),
        )  # fmt: skip
    return codes, scale


def activations(
    rows: Tensor | QuantizedRows, quantization: Quantization, *, pdl: bool
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Rows as the first product reads them, with their multipliers; where it reads FP8, other rows are quantised."""
    if quantization.activations and not isinstance(rows, QuantizedRows):
        return quantize_rows(rows, per_token=quantization.per_token, pdl=pdl)
    return _values_and_scale(rows)


def gather_quantize(
    hidden_states: Tensor | QuantizedRows | TravellingRows,
    routing: Routing,
    topk: int,
    *,
    column_major_scales: bool = False,
    capacity: int | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """Quantise each token once, unless it is quantised, and write it to all its rows.

    Args:
        hidden_states: ``[M, K]``, contiguous.
        routing: From `route`; rows without a slot are left unwritten.
        topk: Experts per token.
        column_major_scales: Lay the multipliers out with strides (1, rows rounded up to 4), as DeepGEMM's TMA reads
            them; row-major otherwise.
        capacity: Lay the multipliers out expert by expert instead, as DeepGEMM's masked layout has them. The capacity
            of the routing, a multiple of 4.
        out: Contiguous e4m3 ``[rows, K]`` to write the codes to; fresh memory if None.
        pdl: Launch as a programmatic dependent of the kernel before (sm_90 and newer).

    Returns:
        e4m3 ``[rows, K]`` and fp32 multipliers ``[rows, ⌈K/128⌉]``; with a capacity
        ``[E, capacity, ⌈K/128⌉]`` with strides (⌈K/128⌉·capacity, 1, capacity).
    """
    travels = isinstance(hidden_states, TravellingRows)
    all_rows = hidden_states.rows if isinstance(hidden_states, TravellingRows) else hidden_states
    x, x_scale = _values_and_scale(all_rows)
    rows, K = routing.slot_of_row.shape[0], x.shape[1]
    scale = empty_scales(rows, K, x, column_major=column_major_scales, capacity=capacity)
    if not on_triton(x):
        gathered = gather(x, routing, topk)
        plain = (gathered, gather(x_scale, routing, topk)) if x_scale is not None else quantize_rows_torch(gathered)
        return plain[0] if out is None else out.copy_(plain[0]), scale.copy_(plain[1].view(scale.shape))
    codes = x.new_empty(rows, K, dtype=FP8) if out is None else out
    spreads = column_major_scales and capacity is None and spreads_scales(routing.row_of_slot.shape[0], K)
    by_token = empty_scales(x.shape[0], K, x, column_major=False) if spreads and x_scale is None else x_scale
    for tokens, part, part_scale in _pieces(hidden_states):
        slots = routing.row_of_slot[tokens.start * topk : tokens.stop * topk]
        if not spreads:
            _launch_gather(part, slots, topk, codes, scale, pdl, x_scale=part_scale)
        elif part_scale is None and by_token is not None:
            # The rank's own multipliers may be there already, and are written once more.
            _launch_gather(part, slots, topk, codes, by_token[tokens], pdl, spread=True)
        else:
            _launch_gather(part, slots, topk, codes, None, pdl)
        pdl = pdl and not travels  # what waits for another stream is no programmatic dependent
    if spreads and by_token is not None:
        _spread(by_token, routing, topk, scale, pdl)
    return codes, scale


def gather(
    hidden_states: Tensor, routing: Routing, topk: int, *, out: Tensor | None = None, pdl: bool = False
) -> Tensor:
    """Copy each token to all its rows; rows without a slot are left unwritten. See `gather_quantize`.

    Returns:
        ``[rows, K]`` in hidden_states' dtype.
    """
    slot_of_row = routing.slot_of_row
    if not on_triton(hidden_states):
        rows = hidden_states[slot_of_row.clamp(min=0).long() // topk]
        return rows if out is None else out.copy_(rows)
    if out is None:
        out = hidden_states.new_empty(slot_of_row.shape[0], hidden_states.shape[1])
    _launch_gather(hidden_states, routing.row_of_slot, topk, out, None, pdl)
    return out


def empty_scales(rows: int, columns: int, like: Tensor, *, column_major: bool, capacity: int | None = None) -> Tensor:
    """Fresh memory, on the device of `like`, for the multipliers of ``[rows, columns]``; see `gather_quantize`."""
    groups = math.ceil(columns / QUANT_BLOCK)
    if capacity is not None:
        return like.new_empty(rows // capacity, groups, capacity, dtype=torch.float32).transpose(1, 2)
    if not column_major:
        return like.new_empty(rows, groups, dtype=torch.float32)
    aligned = math.ceil(rows / _SCALE_ROWS) * _SCALE_ROWS
    return like.new_empty(groups, aligned, dtype=torch.float32).t().narrow(0, 0, rows)


def scale_strides(scale: Tensor | None, rows: int) -> tuple[int, int, int, int]:
    """How a kernel finds the multiplier of a row and a group of columns.

    Returns:
        Rows per span (an expert's capacity, or all rows), and the strides in elements of a span, a row within its span,
        and a group.
    """
    if scale is None:
        return rows, 0, 0, 0
    if scale.dim() == 2:
        return rows, 0, scale.stride(0), scale.stride(1)
    return scale.shape[1], scale.stride(0), scale.stride(1), scale.stride(2)


def spreads_scales(slots: int, columns: int) -> bool:
    """Whether `gather_quantize` writes column-major multipliers in a second pass, which reads `Routing.slot_of_row`."""
    return slots * math.ceil(columns / QUANT_BLOCK) >= _SPREAD_FROM


def column_groups(columns: int) -> int:
    """Groups of 128 columns per program. Eight keep a warp's loads wide and leave enough programs at few rows."""
    return min(8, next_power_of_2(math.ceil(columns / QUANT_BLOCK)))


def _values_and_scale(rows: Tensor | QuantizedRows) -> tuple[Tensor, Tensor | None]:
    return (rows.codes, rows.scale) if isinstance(rows, QuantizedRows) else (rows, None)


def _pieces(
    rows: Tensor | QuantizedRows | TravellingRows,
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Runs of tokens with their values and multipliers: all; or this rank's and, once they are here, the others'."""
    if not isinstance(rows, TravellingRows):
        x, x_scale = _values_and_scale(rows)
        yield slice(0, x.shape[0]), x, x_scale
        return
    own = slice(rows.first, rows.first + rows.own.shape[0])
    yield own, rows.own, None
    for _, x, x_scale in _pieces(rows.wait()):
        for part in (slice(0, own.start), slice(own.stop, x.shape[0])):
            if part.start < part.stop:
                yield part, x[part], None if x_scale is None else x_scale[part]


def _launch_gather(
    x: Tensor, row_of_slot: Tensor, topk: int, out: Tensor, scale: Tensor | None, pdl: bool, *, spread: bool = False,
    x_scale: Tensor | None = None,
) -> None:  # fmt: skip
    from moe_dispatch.backends.stages.quantize_kernel import _moe_gather_kernel

    M, K = x.shape
    if x.dtype == FP8:  # copied as bytes
        x, out = x.view(torch.uint8), out.view(torch.uint8)
    groups = column_groups(K)
    if M:
        _moe_gather_kernel[(M * math.ceil(K / (groups * QUANT_BLOCK)),)](
            # inputs
            x, x_scale, row_of_slot,
            # outputs
            out, scale,
            # shapes
            K, *scale_strides(scale, out.shape[0]),
            # constants
            SPREAD=spread, TOPK=topk, TOPK_POW2=next_power_of_2(topk),
            GROUPS=groups, PDL=pdl, num_warps=4, **pdl_option(pdl),
        )  # fmt: skip


def _spread(by_token: Tensor, routing: Routing, topk: int, scale: Tensor, pdl: bool) -> None:
    """Give every row the multipliers of its token: row-major ``[M, groups]`` to column-major ``[rows, groups]``."""
    from moe_dispatch.backends.stages.quantize_kernel import _moe_spread_scales_kernel

    rows, groups = scale.shape
    block_g = min(64, next_power_of_2(groups))
    _moe_spread_scales_kernel[(math.ceil(rows / _SPREAD_ROWS),)](
        # inputs
        by_token, routing.slot_of_row,
        # outputs
        scale,
        # shapes
        rows, groups, scale.stride(1),
        # constants
        TOPK=topk, BLOCK_R=_SPREAD_ROWS, BLOCK_G=block_g, PDL=pdl, num_warps=4, **pdl_option(pdl),
    )  # fmt: skip
