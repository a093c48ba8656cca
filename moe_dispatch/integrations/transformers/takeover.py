"""Whether a layer is dispatched in a call, and with which weights."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_dispatch.dispatch.autocast import autocasts
from moe_dispatch.dispatch.checks import ACTIVATIONS
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.integrations.transformers.comparison import disagreement
from moe_dispatch.integrations.transformers.layout import LAYOUT, layout_of
from moe_dispatch.integrations.transformers.weights import experts_of, sources_of
from moe_dispatch.numerics import FP8
from moe_dispatch.tensor_memory import tensor_fault
from moe_dispatch.weight_checks import DTYPE_NAMES


class Taken(NamedTuple):
    """A layer's weights for one call, or why it keeps its own implementation.

    Attributes:
        experts: The weights; None where the layer keeps its own implementation.
        reason: Why it does.
        sources: The module's tensors, which `experts` holds only weakly: keep this object for the call.
    """

    experts: ExpertWeights | None
    reason: str = ""
    sources: tuple[Tensor, ...] = ()


def take_over(module: nn.Module, dtype: torch.dtype, others: Sequence[str] = ()) -> Taken:
    """The module's weights for a call outside of a trace.

    `others` are the names of arguments that the call has beside the three that are known.
    """
    layout = layout_of(module)
    if reason := layout.unfit or unknown_arguments(others):
        return Taken(None, reason)
    sources = sources_of(module, layout)
    if reason := unfit_tensors(sources, dtype):
        return Taken(None, reason)
    try:
        experts = experts_of(module, layout, sources)
    except InvalidInputError as error:
        return Taken(None, str(error))
    if reason := disagreement(module, experts, dtype if experts.quantized else experts.gate_up.dtype):
        setattr(module, LAYOUT, dataclasses.replace(layout, unfit=reason))
        return Taken(None, reason)
    return Taken(experts, sources=sources)


def unknown_arguments(others: Sequence[str]) -> str:
    """Why a call with further arguments is not dispatched; empty if it has none."""
    return f"its forward was called with {', '.join(others)}, which is not known here" if others else ""


def unfit_tensors(sources: Sequence[Tensor], dtype: torch.dtype) -> str:
    """Why backends cannot compute with these weights and hidden_states of this dtype; empty if they can."""
    weight = sources[0]
    for source in sources:
        if fault := tensor_fault("its weight", source):
            return fault
    if not all(source.is_contiguous() for source in sources):
        return "its weights are not contiguous, and a copy of them could be stale"
    if weight.dtype not in DTYPE_NAMES or weight.device.type not in ("cpu", "cuda"):
        return f"its weights are {weight.dtype} on {weight.device}"
    if weight.dtype not in (FP8, dtype) and not (dtype in ACTIVATIONS and autocasts(weight.device)):
        return f"hidden_states are {dtype} and its weights {weight.dtype}, which only autocast brings together"
    return ""
