"""What transformers calls for an experts module that asked for "moe_dispatch"."""

import torch
from torch import Tensor, nn

from moe_dispatch.integrations.transformers.eager import eager_forward


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **others: object
) -> Tensor:
    """An experts module's forward: what transformers calls once registered.

    Args:
        module: One that transformers decorated with ``use_experts_implementation``.
        hidden_states: ``[M, K]``.
        top_k_index: ``[M, topk]``; an id equal to the number of experts is expert parallelism's "not mine".
        top_k_weights: ``[M, topk]``.
        **others: What else transformers hands to an implementation. None of it is known here, so a layer that gets any
            keeps its own implementation.

    Returns:
        ``[M, K]``.
    """
    if torch.compiler.is_compiling():
        from moe_dispatch.integrations.transformers.traced import traced_forward

        return traced_forward(module, hidden_states, top_k_index, top_k_weights, **others)
    return eager_forward(module, hidden_states, top_k_index, top_k_weights, **others)
