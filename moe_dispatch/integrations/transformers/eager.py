"""A layer's forward outside of a trace."""

from torch import Tensor, nn

from moe_dispatch.api import moe_forward
from moe_dispatch.integrations.transformers.own import own_forward, warn_once
from moe_dispatch.integrations.transformers.takeover import take_over


def eager_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **others: object
) -> Tensor:
    """Dispatch the layer, or run its own implementation and warn once why; see `experts_forward`."""
    taken = take_over(module, hidden_states.dtype, tuple(others))
    if taken.experts is not None:
        return moe_forward(hidden_states, taken.experts, top_k_weights, top_k_index)
    warn_once(module, taken.reason)
    return own_forward(module, hidden_states, top_k_index, top_k_weights, **others)
