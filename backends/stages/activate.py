"""The activation between the two products: from the columns of gate and up to the intermediate."""

import math
from typing import Final

import torch
from torch import Tensor

from moe_dispatch.activations import UNGATED, Activation
from moe_dispatch.backends.stages.quantize import empty_scales, scale_strides
from moe_dispatch.backends.stages.route import Routing
from moe_dispatch.backends.triton_common.features import on_triton
from moe_dispatch.backends.triton_common.launch_options import pdl_option
from moe_dispatch.numerics import FP8, activate_torch, quantize_rows_torch
from moe_dispatch.problem import QUANT_BLOCK

# Groups of 128 values per program, a power of two. On an H200 at 131072 slots and N=768, 16 groups take 129 µs and 8
# take 195 µs.
_TILE_GROUPS: Final = 16


def activate(
    gate_up: Tensor,
    routing: Routing,
    activation: Activation,
    *,
    interleaved: bool = False,
    bias: Tensor | None = None,
    topk_ids: Tensor | None = None,
    topk_weights: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Add the bias and apply the activation, in fp32, to the rows that hold a slot.

    Args:
        gate_up: ``[rows, 2N]``, or ``[rows, N]`` for an ungated activation; contiguous.
        routing: From `route`; rows without a slot are neither read nor written.
        activation: See `MoEProblem`.
        interleaved: Whether gate and up columns alternate, instead of all gate columns first.
        bias: ``[E, 2N]`` (``[E, N]`` ungated), added before the activation; needs `topk_ids`.
        topk_ids: int32 or int64 ``[M, topk]``; read only with a bias.
        topk_weights: fp32 ``[M, topk]``, to multiply each row by the weight of its slot as far as that is between -1
            and 1, so that neither the row nor what the next product makes of it leaves the range of FP16 where the
            weighted result does not; `combine` multiplies by the rest.
        pdl: Launch as a programmatic dependent of the kernel before (sm_90 and newer).

    Returns:
        ``[rows, N]`` in gate_up's dtype.
    """
    if not on_triton(gate_up):
        out = activate_torch(add_bias(gate_up, routing, bias, topk_ids), activation, interleaved=interleaved)
        if topk_weights is not None:
            share = topk_weights.flatten()[routing.slot_of_row.clamp(min=0).long()]
            share = share / share.abs().clamp(min=1.0)
            out = (out.float() * share[:, None]).to(out.dtype)
        return out
    out = gate_up.new_empty(gate_up.shape[0], _columns(gate_up, activation))
    _launch(gate_up, routing, activation, interleaved, bias, topk_ids, topk_weights, out, None, pdl)
    return out


def activate_quantize(
    gate_up: Tensor,
    routing: Routing,
    activation: Activation,
    *,
    interleaved: bool = False,
    bias: Tensor | None = None,
    topk_ids: Tensor | None = None,
    column_major_scales: bool = False,
    capacity: int | None = None,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `activate`, with the result quantised per row and 128 columns in the same pass.

    `column_major_scales` and `capacity` are those of `gather_quantize`.

    Returns:
        e4m3 ``[rows, N]`` and fp32 multipliers, laid out as those of `gather_quantize`.
    """
    rows, N = gate_up.shape[0], _columns(gate_up, activation)
    scale = empty_scales(rows, N, gate_up, column_major=column_major_scales, capacity=capacity)
    if not on_triton(gate_up):
        wide = add_bias(gate_up, routing, bias, topk_ids).float()
        codes, plain = quantize_rows_torch(activate_torch(wide, activation, interleaved=interleaved))
        return codes, scale.copy_(plain.view(scale.shape))
    out = torch.empty(rows, N, dtype=FP8, device=gate_up.device)
    _launch(gate_up, routing, activation, interleaved, bias, topk_ids, None, out, scale, pdl)
    return out, scale


def _columns(gate_up: Tensor, activation: Activation) -> int:
    return gate_up.shape[1] if activation in UNGATED else gate_up.shape[1] // 2


def add_bias(gate_up: Tensor, routing: Routing, bias: Tensor | None, topk_ids: Tensor | None) -> Tensor:
    """Add each row's bias, if there is one; in torch. See `activate`."""
    if bias is None or topk_ids is None:
        return gate_up
    ids = topk_ids.flatten()[routing.slot_of_row.clamp(min=0).long()].long()
    # A row without a slot gets the first slot's expert here, which may be none of 0…E-1.
    return gate_up + bias[ids.clamp(0, bias.shape[0] - 1)].to(gate_up.dtype)


def _launch(
    gate_up: Tensor,
    routing: Routing,
    activation: Activation,
    interleaved: bool,
    bias: Tensor | None,
    topk_ids: Tensor | None,
    topk_weights: Tensor | None,
    out: Tensor,
    scale: Tensor | None,
    pdl: bool,
) -> None:
    from moe_dispatch.backends.stages.activate_kernel import _moe_activate_kernel

    rows, N = out.shape
    slots = routing.row_of_slot.shape[0]
    if slots == 0:
        return
    # A program takes as many columns as divide them evenly, and as many slots as fill its _TILE_GROUPS.
    groups = math.gcd(math.ceil(N / QUANT_BLOCK), _TILE_GROUPS)
    block_s = _TILE_GROUPS // groups
    _moe_activate_kernel[(math.ceil(slots / block_s) * math.ceil(N / (groups * QUANT_BLOCK)),)](
        # inputs
        gate_up, routing.row_of_slot, bias, None if bias is None else topk_ids, topk_weights,
        # outputs
        out, scale,
        # shapes
        slots, N, gate_up.shape[1], *scale_strides(scale, rows),
        # constants
        ACTIVATION=activation, INTERLEAVED=interleaved, QUANTIZE=scale is not None, SLOTS=block_s, GROUPS=groups,
        PDL=pdl, num_warps=4, **pdl_option(pdl),
    )  # fmt: skip
