"""Gradients expert by expert, for any device and dtype: torch's plain products over each expert's rows.

The host reads how many rows each expert has, so this cannot be captured in a CUDA graph.
"""

import torch
from torch import Tensor

from moe_dispatch.backend import Inputs
from moe_dispatch.backends.reference import weights_of_expert
from moe_dispatch.backends.stages.activate_backward import activate_backward_torch
from moe_dispatch.backends.stages.combine import combine_torch
from moe_dispatch.backends.stages.route import route_torch
from moe_dispatch.dispatch.gradients import Gradients, Wanted
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.numerics import round_rows_through_fp8


def backward(gradient: Tensor, inputs: Inputs, wanted: Wanted) -> Gradients:
    """Compute the gradients of one call; arguments as of `moe_dispatch.backends.backward.backward`, M ≥ 1.

    Memory beside inputs and gradients: ``[M·topk, K]`` for the rows of hidden_states' gradient, and what one expert's
    rows take.
    """
    hidden_states, experts, topk_weights, topk_ids = inputs
    M, topk = topk_ids.shape
    dtype, per_token = _product_dtype(experts), experts.dtype == "fp8_channel"
    routing = route_torch(topk_ids, experts.E)
    slot_of_row = routing.slot_of_row.long()
    weights = topk_weights.float().flatten()
    # Gradients: of a weight matrix in its own memory, where its expert's part is written.
    d_rows = torch.empty(M * topk, experts.K, dtype=dtype, device=gradient.device) if wanted.hidden_states else None
    d_weights = torch.zeros_like(weights) if wanted.topk_weights else None
    d_gate_up, d_down, d_gate_up_bias, d_down_bias = (
        torch.empty_like(tensor) if tensor is not None and is_wanted else None
        for tensor, is_wanted in zip(
            (experts.gate_up, experts.down, experts.gate_up_bias, experts.down_bias), wanted[2:], strict=True
        )
    )
    start = 0
    for e, end in enumerate(routing.ends.tolist()):
        if start == end:
            for whole in (d_gate_up, d_down, d_gate_up_bias, d_down_bias):
                if whole is not None:
                    whole[e].zero_()
            continue
        slots = slot_of_row[start:end]
        tokens = slots // topk
        x, d_out, share = hidden_states[tokens].to(dtype), gradient[tokens].to(dtype), weights[slots][:, None]
        gate_up, down = (weight.to(dtype) for weight in weights_of_expert(experts, e))
        if experts.fp8:
            x = round_rows_through_fp8(x, per_token=per_token)
        product = x @ gate_up.t()
        if experts.gate_up_bias is not None:
            product += experts.gate_up_bias[e].to(dtype)
        d_inner = d_out @ down  # of the unweighted activation
        inner, d_product = activate_backward_torch(
            product, d_inner, share, experts.activation, interleaved=experts.interleaved
        )
        if d_weights is not None:
            read = round_rows_through_fp8(inner, per_token=per_token) if experts.fp8 else inner
            d_share = (d_inner.float() * read.float()).sum(dim=1)
            if experts.down_bias is not None:
                d_share += d_out.float() @ experts.down_bias[e].float()
            d_weights[slots] = d_share
        if d_down is not None:
            _product_into(d_down[e], d_out.t(), (inner * share).to(dtype))
        if d_gate_up is not None:
            _product_into(d_gate_up[e], d_product.t(), x)
        if d_down_bias is not None:
            d_down_bias[e] = (d_out.float() * share).sum(dim=0)
        if d_gate_up_bias is not None:
            d_gate_up_bias[e] = d_product.sum(dim=0, dtype=torch.float32)
        if d_rows is not None:
            torch.mm(d_product, gate_up, out=d_rows[start:end])
        start = end
    d_hidden = None
    if d_rows is not None:
        ones = torch.ones_like(weights).view(M, topk)
        d_hidden = combine_torch(d_rows, routing.row_of_slot, ones, hidden_states.dtype, weighted=True)
    d_topk_weights = None if d_weights is None else d_weights.view(M, topk)
    return Gradients(d_hidden, d_topk_weights, d_gate_up, d_down, d_gate_up_bias, d_down_bias)


def _product_dtype(experts: ExpertWeights) -> torch.dtype:
    """BF16 on a GPU for BF16 weights, else FP32, for the same reasons as the reference: see there."""
    return torch.bfloat16 if experts.dtype == "bf16" and experts.device.type == "cuda" else torch.float32


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)
