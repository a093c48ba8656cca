"""Gathering and activation slot by slot, for a buffer that is nearly all padding.

With a fixed number of rows per expert (`route` with a capacity) there are hundreds of empty rows for each real one.
The stages of quantize.py and activate.py look at every row; these look at slots, of which there are M·topk, and lay
multipliers out expert by expert, as DeepGEMM's masked GEMM reads them.
"""

import math

import torch
from torch import Tensor

from moe_dispatch.experts import FP8
from moe_dispatch.problem import QUANT_BLOCK, UNGATED, Activation

from ..triton_support import on_triton
from .activate import activate_torch
from .quantize import gather, quantize_rows_torch
from .route import Routing


def spread(hidden_states: Tensor, routing: Routing, topk: int) -> Tensor:
    """Copy each slot's token to its row: ``[M, K]`` to ``[rows, K]``; rows without a slot are left unwritten."""
    if not on_triton(hidden_states):
        return gather(hidden_states, routing, topk)
    out = hidden_states.new_empty(routing.slot_of_row.shape[0], hidden_states.shape[1])
    _launch_spread(hidden_states, routing, topk, 1, out, None)
    return out


def spread_quantize(hidden_states: Tensor, routing: Routing, topk: int, capacity: int) -> tuple[Tensor, Tensor]:
    """`spread`, quantised per row and 128 columns on the way.

    Args:
        hidden_states: ``[M, K]``.
        routing: From `route` with this capacity.
        topk: Experts per token.
        capacity: Rows per expert, a multiple of 4.

    Returns:
        e4m3 ``[rows, K]`` and fp32 multipliers ``[E, capacity, ⌈K/128⌉]`` with strides (⌈K/128⌉·capacity, 1, capacity).
    """
    rows, K = routing.slot_of_row.shape[0], hidden_states.shape[1]
    if not on_triton(hidden_states):
        codes, plain = quantize_rows_torch(gather(hidden_states, routing, topk))
        return codes, empty_expert_scales(rows, K, capacity, hidden_states.device).copy_(_by_expert(plain, capacity))
    scale = empty_expert_scales(rows, K, capacity, hidden_states.device)
    out = torch.empty(rows, K, dtype=FP8, device=hidden_states.device)
    _launch_spread(hidden_states, routing, topk, capacity, out, scale)
    return out, scale


def activate_spread(
    gate_up: Tensor,
    routing: Routing,
    activation: Activation,
    capacity: int,
    *,
    interleaved: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """Apply bias and activation to the rows that hold a slot.

    Args:
        gate_up: ``[rows, 2N]``, or ``[rows, N]`` for an ungated activation; contiguous.
        routing: From `route` with this capacity; rows without a slot are neither read nor written.
        activation: See `MoEProblem`.
        capacity: Rows per expert.
        interleaved: Whether gate and up columns alternate.
        bias: ``[E, 2N]`` (``[E, N]`` ungated), added first.

    Returns:
        ``[rows, N]`` in gate_up's dtype.
    """
    if not on_triton(gate_up):
        return activate_torch(_biased(gate_up, bias, capacity), activation, interleaved=interleaved)
    out = gate_up.new_empty(gate_up.shape[0], _columns(gate_up, activation))
    _launch_activate(gate_up, routing, activation, capacity, interleaved, bias, out, None)
    return out


def activate_spread_quantize(
    gate_up: Tensor,
    routing: Routing,
    activation: Activation,
    capacity: int,
    *,
    interleaved: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`activate_spread`, and the result quantised per row and 128 columns in the same pass.

    Args:
        gate_up: As for `activate_spread`.
        routing: As for `activate_spread`.
        activation: As for `activate_spread`.
        capacity: Rows per expert, a multiple of 4.
        interleaved: As for `activate_spread`.
        bias: As for `activate_spread`.

    Returns:
        e4m3 ``[rows, N]`` and fp32 multipliers as of `spread_quantize`.
    """
    rows, N = gate_up.shape[0], _columns(gate_up, activation)
    scale = empty_expert_scales(rows, N, capacity, gate_up.device)
    if not on_triton(gate_up):
        wide = _biased(gate_up, bias, capacity).float()
        codes, plain = quantize_rows_torch(activate_torch(wide, activation, interleaved=interleaved))
        return codes, scale.copy_(_by_expert(plain, capacity))
    out = torch.empty(rows, N, dtype=FP8, device=gate_up.device)
    _launch_activate(gate_up, routing, activation, capacity, interleaved, bias, out, scale)
    return out, scale


def empty_expert_scales(rows: int, columns: int, capacity: int, device: torch.device) -> Tensor:
    """Fresh memory for the multipliers of ``[rows, columns]``, see `spread_quantize`."""
    groups = math.ceil(columns / QUANT_BLOCK)
    return torch.empty(rows // capacity, groups, capacity, dtype=torch.float32, device=device).transpose(1, 2)


def _by_expert(scale: Tensor, capacity: int) -> Tensor:
    return scale.view(-1, capacity, scale.shape[1])


def _columns(gate_up: Tensor, activation: Activation) -> int:
    return gate_up.shape[1] if activation in UNGATED else gate_up.shape[1] // 2


def _biased(gate_up: Tensor, bias: Tensor | None, capacity: int) -> Tensor:
    return gate_up if bias is None else gate_up + bias.to(gate_up.dtype).repeat_interleave(capacity, dim=0)


def _groups(columns: int) -> int:
    """Groups of 128 columns per program: eight keep a warp's loads wide and leave enough programs at few slots."""
    return min(8, 1 << (math.ceil(columns / QUANT_BLOCK) - 1).bit_length())


def _launch_spread(x: Tensor, routing: Routing, topk: int, capacity: int, out: Tensor, scale: Tensor | None) -> None:
    from .spread_kernel import _moe_spread_kernel

    slots, K = routing.row_of_slot.shape[0], x.shape[1]
    groups = _groups(K)
    _moe_spread_kernel[(slots, math.ceil(K / (groups * QUANT_BLOCK)))](
        # inputs
        x, routing.row_of_slot,
        # outputs
        out, scale,
        # shapes
        K, topk, capacity,
        # constants
        GROUPS=groups, num_warps=4,
    )  # fmt: skip


def _launch_activate(
    gate_up: Tensor,
    routing: Routing,
    activation: Activation,
    capacity: int,
    interleaved: bool,
    bias: Tensor | None,
    out: Tensor,
    scale: Tensor | None,
) -> None:
    from .spread_kernel import _moe_activate_spread_kernel

    slots, N = routing.row_of_slot.shape[0], out.shape[1]
    groups = _groups(N)
    _moe_activate_spread_kernel[(slots, math.ceil(N / (groups * QUANT_BLOCK)))](
        # inputs
        gate_up, routing.row_of_slot, bias,
        # outputs
        out, scale,
        # shapes
        N, gate_up.shape[1], capacity,
        # constants
        ACTIVATION=activation, INTERLEAVED=interleaved, GROUPS=groups, num_warps=4,
    )  # fmt: skip
