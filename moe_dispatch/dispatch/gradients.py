"""Whether a call must be differentiable."""

import torch
from torch import Tensor

from moe_dispatch.dispatch.internals import forward_mode_entered
from moe_dispatch.experts import ExpertWeights


def needs_grad(hidden_states: Tensor, experts: ExpertWeights, topk_weights: Tensor) -> bool:
    """Whether autograd is recording and a tensor of this call requires a gradient, or forward mode is at work."""
    if forward_mode_entered(hidden_states, topk_weights):
        return True
    return torch.is_grad_enabled() and (
        hidden_states.requires_grad or topk_weights.requires_grad or experts.requires_grad
    )
