"""A random layer with inputs and the right answers to them, on which an implementation can be judged and timed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dispatch.experts import ExpertWeights
from moe_dispatch.measure.inputs import LayerInputs, make_inputs
from moe_dispatch.measure.verify import reference_outputs
from moe_dispatch.problem import MoEProblem
from moe_dispatch.workloads import ROUTINGS, RoutingDistribution, make_experts


@dataclass(frozen=True, eq=False)
class SampleLayer:
    """A layer to run and what it must give.

    Attributes:
        inputs: Distinct inputs, each with a routing of its own.
        truths: The fp32 output ``[M, K]`` of each input.
    """

    experts: ExpertWeights
    inputs: tuple[LayerInputs, ...]
    truths: tuple[Tensor, ...]


def sample_layer(
    problem: MoEProblem,
    device: torch.device | str,
    *,
    routing: RoutingDistribution = ROUTINGS["uniform"],
    quantize_activations: bool = True,
) -> SampleLayer:
    """Draw a layer of a problem's shape, dtypes and activation, and one input with its right answer.

    Every call draws the same, and the same routing on every device. The answers for FP8 weights are those with
    quantised activations, unless `quantize_activations` is off.
    """
    generator = torch.Generator(device).manual_seed(0)
    experts = make_experts(
        problem, problem.dtype, device, generator, act_dtype=problem.act_dtype, transposed=problem.transposed
    )
    inputs = make_inputs(problem, routing, device, count=1)
    return with_truths(experts, inputs, quantize_activations=quantize_activations)


def with_truths(
    experts: ExpertWeights, inputs: tuple[LayerInputs, ...], *, quantize_activations: bool = True
) -> SampleLayer:
    """Weights and inputs that exist already, with their fp32 outputs; see `sample_layer`."""
    truths = reference_outputs(experts, inputs, quantize_activations=quantize_activations)
    return SampleLayer(experts, inputs, truths)
