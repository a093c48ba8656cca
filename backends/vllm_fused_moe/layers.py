"""What vLLM is told about a layer on every call, made once per layer.

Nothing here is a copy of weights. A description refers to the very tensors of an `ExpertWeights`, so memory that is
replaced under them (``tensor.data = …``) is read from then on; it is made anew when the tensors themselves are others.
"""

import weakref
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from moe_dispatch.activations import Activation
from moe_dispatch.backends.vllm_fused_moe.library import Library, fp8_config, require_fp32_scales
from moe_dispatch.experts import ExpertWeights

# Ours to vLLM's `MoEActivation`. vLLM's gelu is the exact one; releases before 0.24 have no tanh approximation.
ACTIVATIONS: Final[dict[Activation, str]] = {
    "silu": "silu",
    "gelu": "gelu",
    "swiglu_oai": "swigluoai",
    "relu2": "relu2_no_mul",
}


@dataclass(frozen=True)
class Layer:
    """vLLM's words for a layer.

    Attributes:
        activation: A member of vLLM's `MoEActivation`.
        quant_config: vLLM's description of scales and biases; None for plain weights without biases.
    """

    activation: Any
    quant_config: Any
    tensors: tuple[Tensor | None, ...]


_layers: Final[weakref.WeakKeyDictionary[ExpertWeights, Layer]] = weakref.WeakKeyDictionary()
# Kept for the life of the process, a few bytes per number of experts: a captured graph goes on reading its map when the
# layer, or the backend, that it was captured with is gone.
_expert_maps: Final[dict[tuple[int, torch.device], Tensor]] = {}


def layer(library: Library, experts: ExpertWeights) -> Layer:
    """The description of a layer's weights, remembered as long as the weights live.

    Raises:
        BackendUnavailableError: The weights are block FP8, and vLLM would round multipliers.
    """
    tensors = (experts.gate_up_scale, experts.down_scale, experts.gate_up_bias, experts.down_bias)
    known = _layers.get(experts)
    if known is not None and all(now is then for now, then in zip(tensors, known.tensors, strict=True)):
        return known
    quant_config = None
    if experts.fp8:
        if experts.dtype == "fp8":
            require_fp32_scales()
        quant_config = fp8_config(library, experts)
    elif experts.gate_up_bias is not None:
        quant_config = library.biased_config(experts.gate_up_bias, experts.down_bias)
    made = _layers[experts] = Layer(library.activation(ACTIVATIONS[experts.activation]), quant_config, tensors)
    return made


def expert_map(E: int, device: torch.device) -> Tensor:
    """int32 ``[E + 1]``: each expert maps to itself, and E, which stands for foreign experts, to -1.

    The first call for a device waits until the map is written: layers on other streams share it, without an event.
    """
    known = _expert_maps.get((E, device))
    if known is not None:
        return known
    made = torch.arange(E + 1, dtype=torch.int32, device=device)
    made[E:].fill_(-1)
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return made  # memory of the captured graph, written when that graph is replayed
            torch.cuda.current_stream().synchronize()
    return _expert_maps.setdefault((E, device), made)
