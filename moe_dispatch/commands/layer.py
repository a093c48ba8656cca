"""A layer as the commands run it: through the public `moe_forward`, as a user's model would."""

from moe_dispatch.api import moe_forward
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.measure import Call


def dispatched(experts: ExpertWeights, backend: str | None = None) -> Call:
    """`moe_forward` with its weights bound."""
    return lambda inputs: moe_forward(
        inputs.hidden_states, experts, inputs.topk_weights, inputs.topk_ids, backend=backend
    )
