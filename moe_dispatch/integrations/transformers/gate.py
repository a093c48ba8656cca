"""Which activation an experts module computes between its two products, found by running it."""

import itertools
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from moe_dispatch.activations import ACTIVATIONS, UNGATED, Activation, SwiGLU
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.numerics import activate_torch

# fp32 rounding apart, a known activation agrees exactly; GELU and its tanh form already differ by 5e-4.
_TOLERANCE: Final = 1e-5
# What the gates of transformers read of their module. A change of one of them changes the gate.
GATE_ATTRIBUTES: Final = ("act_fn", "alpha", "limit", "swiglu_alpha", "swiglu_limit", "gate_softcap", "up_softcap")


def gate_state(module: Any) -> tuple[object, ...]:
    """What the module's gate depends on, by which a change after the inspection is noticed."""
    # Not by getattr: asked on every call, and a module's search for an attribute that it lacks takes a microsecond.
    plain, submodules = module.__dict__, module._modules
    return tuple([plain.get(name) or submodules.get(name) for name in GATE_ATTRIBUTES])


def recognise_gate(module: Any, weight: Tensor, *, gated: bool, interleaved: bool) -> Activation | None:
    """The activation that the module's gate computes, or None if it is none of ours.

    The gate is run on numbers that tell all of ours apart. Its name would not do: what a parameter means differs from
    gate to gate, and hub kernels replace activations under the same name.

    Args:
        module: The experts module; a gated one has ``_apply_gate``, another one ``act_fn``.
        weight: One of its weights; the gate is run on its device, because some activations take CUDA tensors only.
        gated: Whether the module multiplies an activated gate with an up projection.
        interleaved: Whether gate and up columns alternate.
    """
    function = getattr(module, "act_fn", None)
    if isinstance(function, nn.Module) and any(True for _ in function.parameters()):
        return None  # it learns: what it computes today is not what it computes tomorrow
    device = weight.device if weight.device.type == "cuda" else torch.device("cpu")
    # Values beyond every clamp limit in use, and dense ones where GELU and its tanh form differ.
    gate = torch.cat([
        torch.linspace(-14.0, 14.0, 113, dtype=torch.float32, device=device),
        torch.tensor([-1e3, -40.0, 40.0, 1e3], dtype=torch.float32, device=device),
    ])  # fmt: skip
    up = gate.roll(37)
    columns = torch.stack([gate, up], dim=1).flatten() if interleaved else torch.cat([gate, up])
    columns = (columns if gated else gate)[None]
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            computed = module._apply_gate(columns) if gated else module.act_fn(columns)
    except Exception:  # noqa: BLE001 - a gate that needs other inputs is simply not one of ours
        return None
    for activation in _candidates(module, gated=gated):
        expected = activate_torch(columns, activation, interleaved=interleaved)
        if computed.shape == expected.shape and torch.allclose(
            computed.float(), expected, rtol=_TOLERANCE, atol=_TOLERANCE
        ):
            return activation
    return None


def _candidates(module: Any, *, gated: bool) -> Iterator[Activation]:
    """What the gate may compute: the activations with a name, and SwiGLU with the parameters that the module has."""
    yield from (activation for activation in ACTIVATIONS if (activation not in UNGATED) == gated)
    if not gated:
        return
    act_fn = getattr(module, "act_fn", None)
    # A plain layer's activation holds them as modules, an FP8 layer itself as numbers.
    caps = [
        getattr(getattr(act_fn, name, None), "softcap", None) or getattr(module, name, None)
        for name in ("gate_softcap", "up_softcap")
    ]
    alphas = {1.0, *_attributes(module, "alpha", "swiglu_alpha")}
    limits = {None, *_attributes(module, "limit", "swiglu_limit")}
    for alpha, limit, shift in itertools.product(alphas, limits, (0.0, 1.0)):
        try:
            yield str(SwiGLU(alpha, limit, shift, *caps))
        except InvalidInputError:  # such as a limit that is infinite, in which case another candidate has none
            continue


def _attributes(module: Any, *names: str) -> Iterator[Any]:
    """Those that the module has, without None."""
    yield from (value for name in names if (value := getattr(module, name, None)) is not None)
