"""`moe_forward` as one custom operator, so that torch.compile takes it whole.

The operator receives the layer's tensors one by one: what a compiled graph caches on disk must not depend on an object
of the process that compiled it. It has no gradient: where one is needed, `moe_forward` leaves the compiled graph.
"""

from typing import cast, get_args

import torch
from torch import Tensor

from moe_dispatch.experts import ExpertWeights
from moe_dispatch.problem import Activation


def call(
    hidden_states: Tensor, experts: ExpertWeights, topk_weights: Tensor, topk_ids: Tensor, backend: str | None
) -> Tensor:
    """Run a checked call through the operator."""
    return cast(
        "Tensor",
        torch.ops.moe_dispatch.forward(
            hidden_states,
            topk_weights,
            topk_ids,
            experts.gate_up,
            experts.down,
            experts.gate_up_scale,
            experts.down_scale,
            experts.gate_up_bias,
            experts.down_bias,
            experts.activation,
            experts.interleaved,
            backend or "",
        ),
    )


@torch.library.custom_op("moe_dispatch::forward", mutates_args=())
def _forward(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    interleaved: bool,
    backend: str,
) -> Tensor:
    from moe_dispatch.api import dispatch  # api imports this module

    experts = ExpertWeights(
        gate_up.detach(),
        down.detach(),
        gate_up_scale=gate_up_scale,
        down_scale=down_scale,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        activation=_activation(activation),
        interleaved=interleaved,
    )
    return dispatch(hidden_states, experts, topk_weights, topk_ids, backend or None)


@_forward.register_fake
def _(hidden_states: Tensor, *_args: object) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def _activation(name: str) -> Activation:
    assert name in get_args(Activation)  # noqa: S101 - it comes from a checked ExpertWeights
    return cast("Activation", name)
