"""Gradients by torch's grouped products: one product for all experts, and no synchronisation with the host."""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dispatch.backend import Inputs
from moe_dispatch.backends.stages.activate_backward import activate_backward
from moe_dispatch.backends.stages.combine import combine
from moe_dispatch.backends.stages.quantize import gather
from moe_dispatch.backends.stages.route import route
from moe_dispatch.backends.torch_grouped import MOST_FUSED_EXPERTS
from moe_dispatch.backends.triton_common.features import stage_reasons, unrolled_reasons
from moe_dispatch.dispatch.gradients import Gradients, Wanted
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine

# torch has grouped kernels for BF16 on compute capability 9.x and 10.x; elsewhere it multiplies group by group. On
# 10.x the product over the rows of experts without any gives garbage (pytorch issue 172439), and NaN where rows follow
# the last expert's (193633).
_MAJOR: Final = 9
# Up to this many slots one launch routes: on an H200 it takes 4 µs longer than three, and each takes the host 13 to 20.
_ONE_LAUNCH_SLOTS: Final = 8192
_ALIGNED: Final = 8  # values in the 16 bytes on which torch wants each row of an operand to start


def reasons_against(experts: ExpertWeights, machine: Machine, topk: int = 1) -> tuple[str, ...]:
    """Why the gradients of a layer's calls cannot be computed by grouped products; empty if they can."""
    reasons = list(stage_reasons(machine))
    if experts.dtype != "bf16" or machine.capability is None or machine.capability[0] != _MAJOR:
        where = "a CPU" if machine.capability is None else "compute capability {}.{}".format(*machine.capability)
        reasons.append(f"they need bf16 weights and compute capability {_MAJOR}.x, got {experts.dtype} on {where}")
    reasons += [
        f"they need {letter} % {_ALIGNED} == 0, got {letter}={value}"
        for letter, value in (("K", experts.K), ("N", experts.N))
        if value % _ALIGNED
    ]
    if experts.E > MOST_FUSED_EXPERTS:
        reasons.append(f"they take at most {MOST_FUSED_EXPERTS} experts, got E={experts.E}")
    return (*reasons, *unrolled_reasons(topk))


def backward(gradient: Tensor, inputs: Inputs, wanted: Wanted) -> Gradients:
    """Compute the gradients of one call; arguments as of `moe_dispatch.backends.backward.backward`, M ≥ 1.

    Memory beside inputs and gradients: at most M·topk rows of 2K + 3N values (2K + 2N ungated), in the weights' dtype.
    Rows past the last expert's hold no slot; no product and no stage reads or writes them.
    """
    hidden_states, experts, topk_weights, topk_ids = inputs
    topk = topk_ids.shape[1]
    if experts.down_bias is not None:
        topk_weights = topk_weights.float()  # whose gradient is a sum of two
    routing = route(topk_ids, experts.E, by_row=False, one_launch_up_to=_ONE_LAUNCH_SLOTS)
    ends = routing.ends
    x = gather(hidden_states, routing, topk)
    product = F.grouped_mm(x, experts.gate_up.transpose(1, 2), offs=ends)
    d_out = gather(gradient, routing, topk)
    d_inner = F.grouped_mm(d_out, experts.down, offs=ends)  # of the unweighted activation
    inner, d_product, d_weights = activate_backward(
        product, d_inner, routing, topk_weights, experts.activation, interleaved=experts.interleaved,
        bias=experts.gate_up_bias, topk_ids=topk_ids,
    )  # fmt: skip
    del product, d_inner  # whose memory the two now have
    d_down = _weight_gradient(d_out, inner, ends, experts) if wanted.down else None
    del d_out, inner
    d_gate_up = _weight_gradient(d_product, x, ends, experts) if wanted.gate_up else None
    del x
    d_hidden = None
    if wanted.hidden_states:
        d_rows = F.grouped_mm(d_product, experts.gate_up, offs=ends)
        d_hidden = combine(d_rows, routing.row_of_slot, None, torch.empty_like(hidden_states))
    d_gate_up_bias = d_down_bias = None
    if experts.gate_up_bias is not None and wanted.gate_up_bias:
        d_gate_up_bias = _sum_rows(d_product, ends).to(experts.gate_up_bias.dtype)
    if experts.down_bias is not None:
        if wanted.down_bias:
            shares = _shares(topk_weights, topk_ids, experts.E)
            d_down_bias = (shares.t() @ gradient.float()).to(experts.down_bias.dtype)
        if wanted.topk_weights:
            d_weights += _at_ids(gradient.float() @ experts.down_bias.float().t(), topk_ids)
    return Gradients(
        d_hidden, d_weights if wanted.topk_weights else None, d_gate_up, d_down, d_gate_up_bias, d_down_bias
    )


def _weight_gradient(d_rows: Tensor, rows: Tensor, ends: Tensor, experts: ExpertWeights) -> Tensor:
    """``d_rows[e]ᵀ @ rows[e]`` for each expert, stored as its weights are."""
    if experts.transposed:
        return F.grouped_mm(rows.t(), d_rows, offs=ends).transpose(1, 2)
    return F.grouped_mm(d_rows.t(), rows, offs=ends)


def _sum_rows(rows: Tensor, ends: Tensor) -> Tensor:
    """Sum each expert's rows, as a product with ones: ``[rows, C]`` to ``[E, C]``."""
    ones = rows.new_ones(rows.shape[0], _ALIGNED)
    return F.grouped_mm(ones.t(), rows, offs=ends)[:, 0]


def _shares(topk_weights: Tensor, topk_ids: Tensor, E: int) -> Tensor:
    """The weight with which each token goes to each expert: ``[M, E]``."""
    chosen = topk_ids[:, :, None] == torch.arange(E, device=topk_ids.device)
    return torch.where(chosen, topk_weights[:, :, None], 0.0).sum(dim=1)


def _at_ids(values: Tensor, topk_ids: Tensor) -> Tensor:
    """``[M, E]`` to ``[M, topk]``: each token's values at its experts, and 0 at ids outside 0…E-1."""
    E = values.shape[1]
    ids = topk_ids.long()
    return torch.where((ids >= 0) & (ids < E), values.gather(1, ids.clamp(0, E - 1)), 0.0)
