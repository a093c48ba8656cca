"""A layer's first call: two tokens through its understood form and through the model's own forward."""

import weakref
from typing import Final

import torch
from torch import Tensor, nn

from moe_dispatch.experts import ExpertWeights
from moe_dispatch.integrations.transformers.layout import model_forward
from moe_dispatch.measure.inputs import LayerInputs
from moe_dispatch.measure.verify import reference_outputs, relative_error

# ‖reference − own‖ / ‖own‖. What the model rounds, TF32 products included, stays below; another computation does not.
_TOLERANCE: Final = {torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_FP8_TOLERANCE: Final = 0.15  # activations are rounded to e4m3, in blocks that the model may choose otherwise

_compared: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def disagreement(module: nn.Module, experts: ExpertWeights, dtype: torch.dtype) -> str:
    """Why the module does not compute what its layout says; empty if it does, or if it was compared before.

    The model's own forward is the truth, and the reference backend stands for all of ours: whether a backend agrees
    with the reference is asked elsewhere. The tokens are drawn, because those of a call may be padding and its ids
    those of other ranks. One synchronisation with the device, once in a module's life; none while a graph is captured.
    """
    if module in _compared or _capturing(experts.device):
        return ""
    _compared.add(module)
    inputs = _tokens(experts, dtype)
    with torch.no_grad(), torch.autocast(experts.device.type, enabled=False):
        try:
            own: Tensor = model_forward(module)(module, inputs.hidden_states, inputs.topk_ids, inputs.topk_weights)
        except Exception:  # noqa: BLE001 - the model's loop may need a library that is missing; then nothing is compared
            return ""
        (expected,) = reference_outputs(experts, [inputs])
    if not bool(own.isfinite().all()):
        return ""  # weights that were never loaded
    error = relative_error(expected, own.float())
    tolerance = _FP8_TOLERANCE if experts.fp8 else _TOLERANCE[dtype]
    if error <= tolerance:
        return ""
    return (
        f"two tokens through its own forward differ from what its attributes describe by {error:.2g} of the norm "
        f"({tolerance:g} is allowed)"
    )


def _tokens(experts: ExpertWeights, dtype: torch.dtype) -> LayerInputs:
    """Two tokens that choose up to four experts, the last one among them, with weights that tell slots apart."""
    generator, device = torch.Generator("cpu").manual_seed(0), experts.device
    hidden = torch.randn(2, experts.K, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)
    ids = torch.tensor([[0, 1], [2, -1]], dtype=torch.int64, device=device) % experts.E
    return LayerInputs(hidden, torch.tensor([[0.75, 0.25], [0.375, 0.5]], dtype=dtype, device=device), ids)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
