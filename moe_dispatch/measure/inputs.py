"""Random inputs of a layer, each with a routing of its own, and calls with everything else bound."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from moe_dispatch.backend import Backend, BackendConfig, Run
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.guard import foreign_errors
from moe_dispatch.problem import MoEProblem
from moe_dispatch.system.failures import lost_device
from moe_dispatch.workloads import RoutingDistribution, torch_dtype

DISTINCT_INPUTS: Final = 8


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """The inputs of one layer call, besides the weights.

    Attributes:
        hidden_states: ``[M, K]``.
        topk_weights: fp32 ``[M, topk]``.
        topk_ids: int32 ``[M, topk]``.
    """

    hidden_states: Tensor
    topk_weights: Tensor
    topk_ids: Tensor

    def clone(self) -> "LayerInputs":
        """A copy of the tensors."""
        return LayerInputs(self.hidden_states.clone(), self.topk_weights.clone(), self.topk_ids.clone())

    def copy_(self, other: "LayerInputs") -> None:
        """Overwrite the values in place, as the static inputs of a CUDA graph need."""
        self.hidden_states.copy_(other.hidden_states)
        self.topk_weights.copy_(other.topk_weights)
        self.topk_ids.copy_(other.topk_ids)

    @property
    def hit_experts(self) -> int:
        """Number of distinct experts with at least one token."""
        distinct: Tensor = torch.unique(self.topk_ids)
        return distinct.numel()


Call = Callable[[LayerInputs], Tensor]


def make_inputs(
    problem: MoEProblem,
    routing: RoutingDistribution,
    device: torch.device | str,
    count: int = DISTINCT_INPUTS,
    seed: int = 0,
) -> tuple[LayerInputs, ...]:
    """Draw random inputs, each with a routing of its own; the same seed gives the same routings on every device.

    Raises:
        InvalidInputError: `count` is below 1.
    """
    if count < 1:
        raise InvalidInputError(f"count must be at least 1, got {count}")
    place = torch.device(device)
    on_device = torch.Generator(place).manual_seed(seed)
    on_host = torch.Generator().manual_seed(seed)
    dtype = torch_dtype(problem.act_dtype)
    drawn = []
    for _ in range(count):
        hidden = torch.randn(problem.M, problem.K, generator=on_device, device=place, dtype=torch.float32).to(dtype)
        drawn.append(LayerInputs(hidden, *routing.sample(problem.M, problem.E, problem.topk, place, on_host)))
    return tuple(drawn)


def backend_call(backend: Backend, experts: ExpertWeights, config: BackendConfig) -> Call:
    """A backend with its weights and configuration bound."""
    run = backend.run
    return lambda inputs: run(inputs.hidden_states, experts, inputs.topk_weights, inputs.topk_ids, config)


def fast_path_call(backend: Backend, experts: ExpertWeights, config: BackendConfig, inputs: LayerInputs) -> Call:
    """A backend as `moe_forward` calls it eagerly after a few calls of one kind: with its `fast_path`, if it has one.

    It has run before on the inputs, which are of the kind that will be called.
    """
    run: Run = backend.run
    try:
        arguments = inputs.hidden_states, experts, inputs.topk_weights, inputs.topk_ids
        run = backend.fast_path(arguments, config) or run
    except foreign_errors() as error:
        if lost_device(error):
            raise
    return lambda each: run(each.hidden_states, experts, each.topk_weights, each.topk_ids, config)


def synchronize(device: torch.device) -> None:
    """Wait for the device's work; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timing_events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """A start and an end for `torch.cuda.Event.elapsed_time`."""
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
