"""The activation between the two products: gate and up rows in, the intermediate out."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dispatch.problem import UNGATED, Activation

# gpt-oss's clamped SwiGLU (openai/gpt-oss, `swiglu`): (clamp(up) + 1) · gate · sigmoid(alpha · gate).
SWIGLU_OAI_ALPHA = 1.702
SWIGLU_OAI_LIMIT = 7.0


def activate_torch(gate_up: Tensor, activation: Activation, *, interleaved: bool = False) -> Tensor:
    """Apply the activation along the last dimension.

    Args:
        gate_up: ``[…, 2N]``, gate first or alternating; ``[…, N]`` for an ungated activation.
        activation: See `MoEProblem`.
        interleaved: Whether gate and up columns alternate.

    Returns:
        ``[…, N]`` in the same dtype.
    """
    if activation in UNGATED:
        return F.relu(gate_up).square()
    if interleaved:
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    else:
        gate, up = gate_up.chunk(2, dim=-1)
    if activation == "swiglu_oai":
        gate = gate.clamp(max=SWIGLU_OAI_LIMIT)
        up = up.clamp(-SWIGLU_OAI_LIMIT, SWIGLU_OAI_LIMIT)
        return (up + 1) * gate * torch.sigmoid(SWIGLU_OAI_ALPHA * gate)
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up
