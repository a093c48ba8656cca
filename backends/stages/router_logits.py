"""Router logits in fp32: for few tokens one launch that reads the weight once, where cuBLAS splits the sum in two."""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dispatch.backends.triton_common.features import on_triton
from moe_dispatch.backends.triton_common.launch_options import next_power_of_2, pdl_option

# A program holds one expert's row in registers and multiplies it with one token; the rows are read again for each
# token. cuBLAS takes what is larger.
MAX_TOKENS: Final = 8
MAX_COLUMNS: Final = 16384


def router_logits(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, *, pdl: bool = False) -> Tensor:
    """Multiply tokens with the router's weight, without gradients; sums and result are in fp32.

    Args:
        hidden_states: ``[M, K]``, fp32, BF16 or FP16.
        weight: ``[E, K]``, likewise.
        bias: ``[E]``, likewise.
        pdl: Launch as a programmatic dependent of the kernel before (sm_90 and newer).

    Returns:
        fp32 ``[M, E]``.
    """
    M, K = hidden_states.shape
    if on_triton(hidden_states) and 0 < M <= MAX_TOKENS and K <= MAX_COLUMNS:
        from moe_dispatch.backends.stages.router_logits_kernel import _moe_router_logits_kernel

        hidden_states, weight = hidden_states.contiguous(), weight.contiguous()
        logits = torch.empty(M, weight.shape[0], dtype=torch.float32, device=hidden_states.device)
        _moe_router_logits_kernel[(weight.shape[0], M)](
            # inputs
            hidden_states, weight, bias,
            # outputs
            logits,
            # shapes
            weight.shape[0],
            # constants
            K=K, BLOCK_K=next_power_of_2(K), PDL=pdl, num_warps=8 if K > 2048 else 4, **pdl_option(pdl),
        )  # fmt: skip
        return logits
    if hidden_states.is_cuda and hidden_states.dtype == weight.dtype != torch.float32:
        # BF16 operands with a result in fp32, without copies of either.
        if bias is None:
            return torch.mm(hidden_states, weight.t(), out_dtype=torch.float32)
        return torch.addmm(bias, hidden_states, weight.t(), out_dtype=torch.float32)
    return router_logits_torch(hidden_states, weight, bias)


def router_logits_torch(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `router_logits`, in torch and differentiable; autocast does not reach it, and knows no meta device."""
    if hidden_states.is_meta:
        return F.linear(hidden_states, weight, bias).float()
    with torch.autocast(hidden_states.device.type, enabled=False):
        return F.linear(hidden_states.float(), weight.float(), None if bias is None else bias.float())
