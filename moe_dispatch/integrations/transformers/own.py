"""What transformers would have run for a layer without this integration."""

import torch
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_dispatch.errors import warn
from moe_dispatch.integrations.transformers.layout import model_forward

_warned: set[tuple[type, str]] = set()


def own_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **others: object
) -> Tensor:
    """The layer by transformers' default: ``grouped_mm``; for a single token on an accelerator ``batched_mm``.

    ``generate`` switches its decoding from the one to the other off the CPU, and cannot for a layer that asked for
    "moe_dispatch". Here decoding is seen by its one token; more of them would copy too many experts' weights.
    Not the loop that the model's file spells out: where expert parallelism marks the ids of other ranks, some of
    those loops fail, and none can be compiled in one graph. It is for what the others refuse: FP8 with static scales
    of activations, and FP64, for which torch has no grouped product.
    """
    static = getattr(module, "activation_scheme", "dynamic") == "static"
    if static or (hidden_states.dtype == torch.float64 and not torch.compiler.is_compiling()):
        looped: Tensor = model_forward(module)(module, hidden_states, top_k_index, top_k_weights, **others)
        return looped
    interface = ALL_FP8_EXPERTS_FUNCTIONS if isinstance(module, FP8Experts) else ALL_EXPERTS_FUNCTIONS
    single = hidden_states.device.type != "cpu" and hidden_states.shape[0] == 1
    function = interface["batched_mm" if single else "grouped_mm"]
    out: Tensor = function(module, hidden_states, top_k_index, top_k_weights, **others)
    return out


def warn_once(module: nn.Module, reason: str) -> None:
    """Warn that a layer is not dispatched: once for each class and reason."""
    kind = (type(module), reason)
    if kind not in _warned:
        _warned.add(kind)
        warn(f"{type(module).__name__} keeps transformers' own implementation, undispatched but right: {reason}")
