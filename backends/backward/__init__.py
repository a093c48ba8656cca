"""The gradients of a recorded call, from its inputs: the same for whichever backend ran the forward.

The product with gate_up and the activation are computed again, so that a layer keeps nothing between forward and
backward but its inputs. The product with down is not: with g = down[e]ᵀ·gradient, the gradient of a slot's weight is
⟨g, activation⟩ (as in SonicMoE, arXiv 2512.14080), plus ⟨gradient, down_bias[e]⟩.

Two ways to compute them: `grouped`, one product for all experts, and `by_expert`, in a loop. Neither adds atomically,
so the same inputs give the same bits.
"""

from typing import Final

import torch
from torch import Tensor

from moe_dispatch.backend import Inputs
from moe_dispatch.backends.backward import by_expert, grouped
from moe_dispatch.dispatch.gradients import Gradients, Wanted
from moe_dispatch.errors import warn
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.guard import foreign_errors
from moe_dispatch.machine import Machine
from moe_dispatch.system import failures

_failed: Final[list[str]] = []  # why the grouped products are not used any more in this process, if they failed


def backward(gradient: Tensor, inputs: Inputs, wanted: Wanted, machine: Machine) -> Gradients:
    """Compute the gradients of one call: grouped where that serves, else expert by expert.

    FP8 weights are dequantised expert by expert. The quantisation of the activations counts as the identity
    (straight-through), as its own derivative is zero almost everywhere.

    Args:
        gradient: ``[M, K]``, that of the output; contiguous.
        inputs: The checked and contiguous inputs of the call, topk_weights in any float dtype.
        wanted: Which gradients to compute.
        machine: The layer's machine.

    Returns:
        The wanted gradients; that of topk_weights in its dtype or in fp32.
    """
    if not gradient.shape[0]:
        return _zeros(inputs, wanted)
    if not _failed and not grouped.reasons_against(inputs[1], machine, topk=inputs[3].shape[1]):
        try:
            return grouped.backward(gradient, inputs, wanted)
        except foreign_errors() as error:
            # Memory may be there the next time, and nothing runs any more on a lost device.
            if failures.out_of_memory(error) or failures.lost_device(error) or failures.broken_capture(error):
                raise
            _failed.append(failures.summary(error))
            warn(
                f"the grouped products for gradients failed and are not used any more in this process: {_failed[0]}. "
                "Gradients are computed expert by expert instead, which is slower."
            )
    return by_expert.backward(gradient, inputs, wanted)


def explain(experts: ExpertWeights, machine: Machine) -> str:
    """Say how the gradients of this layer are computed on this machine, and why not faster."""
    reasons = [*grouped.reasons_against(experts, machine), *(f"they failed: {error}" for error in _failed)]
    if not reasons:
        return "gradients are computed by grouped products over all experts"
    return f"gradients are computed expert by expert; grouped products do not serve: {'; '.join(reasons)}"


def _zeros(inputs: Inputs, wanted: Wanted) -> Gradients:
    """Without a token, everything has a gradient of zeros: data parallelism waits for one of every parameter."""
    hidden_states, experts, topk_weights, _ = inputs
    layer = (experts.gate_up, experts.down, experts.gate_up_bias, experts.down_bias)
    return Gradients(
        *(
            torch.zeros_like(tensor) if tensor is not None and is_wanted else None
            for tensor, is_wanted in zip((hidden_states, topk_weights, *layer), wanted, strict=True)
        )
    )
