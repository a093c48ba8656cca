"""Which calls are differentiated, and what computes their gradients.

A call that autograd records (reverse mode) runs the backend that it would run without recording; only its inputs are
kept, and the module `BACKWARD` computes the gradients from them. Everything else that differentiates has to look inside
of the backend: forward mode, torch.func's transforms, and second derivatives. Only the reference allows that.
"""

import functools
import importlib
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Final, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from moe_dispatch.backend import Inputs
from moe_dispatch.dispatch.internals import any_autocast_enabled, forward_mode_entered
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine

BACKWARD: Final = "moe_dispatch.backends.backward"  # imported at the first gradient, as backends are when they are used


class Wanted(NamedTuple):
    """Of which tensors a backward computes the gradient. A frozen one's costs nothing, and FP8 weights have none."""

    hidden_states: bool = False
    topk_weights: bool = False
    gate_up: bool = False
    down: bool = False
    gate_up_bias: bool = False
    down_bias: bool = False


class Gradients(NamedTuple):
    """The gradients of one call, each in shape and dtype of its tensor; None where it is not wanted.

    Attributes:
        hidden_states: ``[M, K]``.
        topk_weights: ``[M, topk]``; zero for slots with an id outside 0…E-1.
        gate_up: ``[E, 2N, K]``, or ``[E, N, K]`` ungated; zero for experts without a token, as the next three.
        down: ``[E, K, N]``.
        gate_up_bias: ``[E, 2N]``, or ``[E, N]`` ungated.
        down_bias: ``[E, K]``.
    """

    hidden_states: Tensor | None = None
    topk_weights: Tensor | None = None
    gate_up: Tensor | None = None
    down: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class _Backward(Protocol):
    """The module named by `BACKWARD`."""

    @staticmethod
    def backward(gradient: Tensor, inputs: Inputs, wanted: Wanted, machine: Machine) -> Gradients:
        """Compute the gradients of one call."""

    @staticmethod
    def explain(experts: ExpertWeights, machine: Machine) -> str:
        """Say how the gradients of this layer are computed on this machine, and why not faster."""


def is_any_recorded(tensors: Iterable[Tensor]) -> bool:
    """Whether autograd records what is done with one of the tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def is_recorded(hidden_states: Tensor, experts: ExpertWeights, topk_weights: Tensor) -> bool:
    """Whether autograd is recording and a tensor of this call requires a gradient."""
    return torch.is_grad_enabled() and (
        hidden_states.requires_grad or topk_weights.requires_grad or experts.requires_grad
    )


def needs_grad(hidden_states: Tensor, experts: ExpertWeights, topk_weights: Tensor) -> bool:
    """Whether the operations of whatever runs this call have to be differentiable one by one.

    A recorded call reaches a backend with recording off; see `is_recorded`.
    """
    return forward_mode_entered(hidden_states, topk_weights) or is_recorded(hidden_states, experts, topk_weights)


def compute_gradients(gradient: Tensor, inputs: Inputs, wanted: Wanted, machine: Machine) -> Gradients:
    """Compute the gradients of a call from its checked inputs and the gradient of its output, in any strides.

    The layer's GPU is the current device.
    """
    hidden_states, experts, topk_weights, topk_ids = inputs
    contiguous = (hidden_states.contiguous(), experts, topk_weights.contiguous(), topk_ids.contiguous())
    device = experts.device.type
    rounding = any_autocast_enabled() and torch.is_autocast_enabled(device)
    # A backward started under autocast rounds no more than one started outside.
    with torch.autocast(device, enabled=False) if rounding else nullcontext():
        gradients = _backward().backward(gradient.contiguous(), contiguous, wanted, machine)
    if gradients.topk_weights is None:
        return gradients
    return gradients._replace(topk_weights=gradients.topk_weights.to(topk_weights.dtype))


def explain_backward(experts: ExpertWeights, machine: Machine) -> str:
    """Say how the gradients of a layer are computed on a machine."""
    return _backward().explain(experts, machine)


@functools.cache
def _backward() -> _Backward:
    return cast("_Backward", importlib.import_module(BACKWARD))
