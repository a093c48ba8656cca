"""The activation again, and its derivative, between the products of a backward."""

import torch
from torch import Tensor

from moe_dispatch.activations import Activation
from moe_dispatch.backends.stages.activate import add_bias
from moe_dispatch.backends.stages.route import Routing
from moe_dispatch.backends.triton_common.features import on_triton
from moe_dispatch.backends.triton_common.launch_options import next_power_of_2
from moe_dispatch.dispatch.internals import recording_in_modes
from moe_dispatch.numerics import activate_torch


def activate_backward(
    gate_up: Tensor,
    d_inner: Tensor,
    routing: Routing,
    topk_weights: Tensor,
    activation: Activation,
    *,
    interleaved: bool = False,
    bias: Tensor | None = None,
    topk_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Activate each row, weight it by its slot's weight, and take the weighted row's gradient back to gate_up.

    `gate_up`, the product without the bias, and `d_inner`, ``[rows, N]``, the gradient of the weighted activation, are
    contiguous and overwritten; `topk_weights`, ``[M, topk]``, is contiguous in any float dtype. The rest is as for
    `activate`.

    Returns:
        The weighted activation ``[rows, N]`` in the memory of `d_inner`; the gradient of `gate_up` in its memory; and
        that of topk_weights ``[M, topk]`` in its dtype, zero for slots without a row.
    """
    slots = routing.row_of_slot.shape[0]
    if not on_triton(gate_up):
        slot_of_row, row_of_slot = routing.slot_of_row.clamp(min=0).long(), routing.row_of_slot
        share = topk_weights.float().flatten()[slot_of_row][:, None]
        inner, d_gate_up = activate_backward_torch(
            add_bias(gate_up, routing, bias, topk_ids), d_inner, share, activation, interleaved=interleaved
        )
        d_share = (d_inner.float() * inner.float()).sum(dim=1)[row_of_slot.clamp(min=0).long()]
        d_weights = torch.where(row_of_slot >= 0, d_share, 0.0).view(topk_weights.shape).to(topk_weights.dtype)
        return d_inner.copy_(inner * share), gate_up.copy_(d_gate_up), d_weights
    from moe_dispatch.backends.stages.activate_backward_kernel import _moe_activate_backward_kernel

    N = d_inner.shape[1]
    d_weights = torch.empty_like(topk_weights)
    block = min(1024, next_power_of_2(N))
    _moe_activate_backward_kernel[(slots,)](
        # inputs
        routing.row_of_slot, bias, None if bias is None else topk_ids, topk_weights,
        # inputs and outputs
        gate_up, d_inner,
        # outputs
        d_weights,
        # shapes
        N, gate_up.shape[1],
        # constants
        ACTIVATION=activation, INTERLEAVED=interleaved, BLOCK_N=block, num_warps=4,
    )  # fmt: skip
    return d_inner, gate_up, d_weights


def activate_backward_torch(
    gate_up: Tensor, d_inner: Tensor, share: Tensor, activation: Activation, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """The activation and its derivative for some rows, in fp32, by torch's autograd of `activate_torch`.

    `gate_up` includes the bias; `share`, fp32 ``[rows, 1]``, is the weight of each row's slot. See `activate_backward`.

    Returns:
        The unweighted activation, fp32 ``[rows, N]``, and the gradient of `gate_up` in its dtype.
    """
    with recording_in_modes(), torch.enable_grad():
        leaf = gate_up.detach().float().requires_grad_()
        inner = activate_torch(leaf, activation, interleaved=interleaved)
        (d_gate_up,) = torch.autograd.grad(inner, leaf, d_inner.float() * share)
    return inner.detach(), d_gate_up.to(gate_up.dtype)
