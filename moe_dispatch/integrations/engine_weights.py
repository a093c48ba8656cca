"""The tensors of an engine's expert layer as `ExpertWeights`, and how a reload that moves them is noticed."""

from collections.abc import Sequence

from torch import Tensor

from moe_dispatch.experts import ExpertWeights


def addresses(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Where the tensors lie, 0 for what is none; a reload that moves one of them changes this."""
    return tuple(tensor.data_ptr() if isinstance(tensor, Tensor) else 0 for tensor in tensors)


def wrap(
    tensors: Sequence[Tensor | None], activation: str, *, interleaved: bool, routed_experts: int | None = None
) -> ExpertWeights:
    """An engine's tensors, without copies.

    They are gate_up, down, gate_up_scale, down_scale, gate_up_bias and down_bias, None for those that the layer does
    not have. See `ExpertWeights`, also for the rest.

    Raises:
        InvalidInputError: The tensors are not in a form that it takes.
    """
    gate_up, down, gate_up_scale, down_scale, gate_up_bias, down_bias = (
        None if tensor is None else tensor.detach() for tensor in tensors
    )
    assert gate_up is not None and down is not None  # noqa: S101, PT018 - every layer has both
    return ExpertWeights(
        gate_up, down, gate_up_scale=gate_up_scale, down_scale=down_scale, gate_up_bias=gate_up_bias,
        down_bias=down_bias, activation=activation, interleaved=interleaved, routed_experts=routed_experts,
    )  # fmt: skip
