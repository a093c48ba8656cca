"""Our Triton backend for middle and large token counts, on every device that Triton compiles for."""

from torch import Tensor

from moe_dispatch.backend import BackendConfig
from moe_dispatch.backends.stages.combine import combine, rows_dtype
from moe_dispatch.backends.stages.quantize import empty_scales, quantize_rows
from moe_dispatch.backends.stages.route import route
from moe_dispatch.backends.triton_common.backend import TritonBackend
from moe_dispatch.backends.triton_persistent.config import (
    TritonPersistentConfig,
    least_shared_memory,
    persistent_configs,
)
from moe_dispatch.backends.triton_persistent.product import product
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.numerics import FP8
from moe_dispatch.problem import ELEMENT_BYTES, MoEProblem
from moe_dispatch.workloads import torch_dtype


class TritonPersistentBackend(TritonBackend):
    """Padding-free grouped products: route, [quantise], gate-up with the activation inside, down, combine.

    Every launch of a product is one wave of programs, which find on the device which tiles there are. Deterministic:
    rows are placed in the order of their slots, and nothing is added atomically.
    """

    name = "triton_persistent"
    config_type = TritonPersistentConfig

    def least_shared_memory(self, problem: MoEProblem) -> int:
        """See `TritonBackend.least_shared_memory`."""
        return least_shared_memory(problem, self._features)

    def configs(self, problem: MoEProblem) -> tuple[BackendConfig, ...]:
        """See `Backend.configs`."""
        return persistent_configs(problem, self._features)

    def workspace_bytes(self, problem: MoEProblem, config: BackendConfig) -> int:  # noqa: ARG002
        """See `Backend.workspace_bytes`."""
        element = ELEMENT_BYTES[problem.dtype]
        codes = problem.M * problem.K if problem.dtype == "fp8" else 0
        row = problem.N * element + problem.K * rows_dtype(torch_dtype(problem.act_dtype)).itemsize + 8
        return codes + problem.slots * row

    def run_into(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,
        out: Tensor,
    ) -> Tensor:
        """See `Backend.run_into`."""
        assert isinstance(config, TritonPersistentConfig)  # noqa: S101 - the dispatcher made it from config_type
        fp8, pdl = experts.dtype == "fp8", config.pdl and self._features.pdl
        N, K = experts.N, experts.K
        routing = route(topk_ids, experts.E, pdl=pdl)
        rows = routing.slot_of_row.shape[0]
        x, x_scale = quantize_rows(hidden_states, pdl=pdl) if fp8 else (hidden_states, None)
        h = hidden_states.new_empty(rows, N, dtype=FP8 if fp8 else None)
        h_scale = empty_scales(rows, N, h.device, column_major=False) if fp8 else None
        product(
            experts, "gate_up", x, x_scale, routing, topk_ids.shape[1], h, h_scale, config, self._features,
            self._descriptor,
        )  # fmt: skip
        y = hidden_states.new_empty(rows, K, dtype=rows_dtype(hidden_states.dtype))
        product(experts, "down", h, h_scale, routing, 0, y, None, config, self._features, self._descriptor)
        return combine(y, routing.row_of_slot, topk_weights, out, pdl=pdl)
