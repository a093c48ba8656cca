"""The way out of a compiled graph. Apart, because the decorator imports all of torch's compiler."""

import torch
from torch import Tensor

from moe_dispatch.api import dispatch
from moe_dispatch.experts import ExpertWeights


@torch.compiler.disable  # type: ignore[untyped-decorator]
def dispatch_uncompiled(
    hidden_states: Tensor, experts: ExpertWeights, topk_weights: Tensor, topk_ids: Tensor, backend: str | None
) -> Tensor:
    """`dispatch`, at a break in the graph: the reference's loop launches what the routing asks for."""
    return dispatch(hidden_states, experts, topk_weights, topk_ids, backend)
