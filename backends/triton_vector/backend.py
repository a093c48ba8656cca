"""Decode with hardly a token per expert: what counts is to start soon and to read weights at full bandwidth."""

import math

from torch import Tensor

from moe_dispatch.backend import BackendConfig
from moe_dispatch.backends.stages.combine import Out
from moe_dispatch.backends.triton_common.backend import TritonBackend
from moe_dispatch.backends.triton_common.features import triton_requirements
from moe_dispatch.backends.triton_vector.config import (
    TritonVectorConfig,
    candidate_configs,
    default_config,
    shared_memory_bytes,
)
from moe_dispatch.backends.triton_vector.down import vector_down
from moe_dispatch.backends.triton_vector.gate_up import vector_gate_up
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.problem import ELEMENT_BYTES, MoEProblem


class TritonVectorBackend(TritonBackend):
    """Two products without tensor cores, each slot served by itself; the second sums over a token's experts.

    Weights go from memory straight to registers, which starts faster than a pipeline through shared memory. Slots that
    share an expert read its weights once each. Deterministic: a token's experts are added in the order of its slots.

    With FP8 weights, hidden_states and the intermediate are not quantised: the products are those of dequantised
    weights, in fp32.
    """

    name = "triton_vector"
    requirements = triton_requirements(fp8_forms=True)
    config_type = TritonVectorConfig
    stores_to_peers = True
    most_topk = math.inf  # its loop over a token's experts is not unrolled
    most_slots = 4096  # Far beyond the few slots for which it is made: each reads its expert's weights by itself.

    def quantizes_activations(self, problem: MoEProblem) -> bool:
        """See `Backend.quantizes_activations`: not with FP8 weights on any device."""
        return not problem.fp8

    def least_shared_memory(self, problem: MoEProblem) -> int:
        """See `TritonBackend.least_shared_memory`."""
        return shared_memory_bytes(default_config(problem, self._features))

    def configs(self, problem: MoEProblem) -> tuple[TritonVectorConfig, ...]:
        """See `Backend.configs`."""
        return candidate_configs(problem, self._features)

    def workspace_bytes(self, problem: MoEProblem, config: BackendConfig) -> int:
        """See `Backend.workspace_bytes`."""
        return problem.slots * problem.N * ELEMENT_BYTES[problem.act_dtype]

    def launch(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,
        out: Out,
    ) -> Out:
        """See `TritonBackend.launch`."""
        if not isinstance(config, TritonVectorConfig):
            raise InvalidInputError(f"triton_vector takes a TritonVectorConfig, got {type(config).__name__}")
        inner = hidden_states.new_empty(topk_ids.numel(), experts.N)
        vector_gate_up(hidden_states, experts, topk_ids, inner, config)
        vector_down(inner, experts, topk_weights, topk_ids, out, config)
        return out
