"""Our Triton backend for middle and large token counts, on every device that Triton compiles for."""

from typing import ClassVar, Final

from torch import Tensor

from moe_dispatch.backend import BackendConfig
from moe_dispatch.backends.stages.combine import Out, combine, rows_dtype
from moe_dispatch.backends.stages.order_columns import order_columns, ordered_width
from moe_dispatch.backends.stages.quantize import activations, empty_scales, quantize_rows
from moe_dispatch.backends.stages.route import route
from moe_dispatch.backends.triton_common.backend import TritonBackend
from moe_dispatch.backends.triton_common.features import triton_requirements
from moe_dispatch.backends.triton_common.quantization import quantization_of
from moe_dispatch.backends.triton_persistent.config import (
    TritonPersistentConfig,
    least_shared_memory,
    persistent_configs,
)
from moe_dispatch.backends.triton_persistent.product import product
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.numerics import QuantizedRows
from moe_dispatch.problem import MoEProblem
from moe_dispatch.workloads import torch_dtype

_MOST_BLOCK: Final = 256  # columns of a block of ordered rows


class TritonPersistentBackend(TritonBackend):
    """Padding-free grouped products: route, [quantise], gate-up with the activation inside, down, combine.

    Every launch of a product is one wave of programs, which find on the device which tiles there are. Deterministic:
    rows are placed in the order of their slots, and nothing is added atomically.

    Where the device has no products of e4m3, FP8 weights are dequantised in the kernels and nothing is quantised.
    """

    name = "triton_persistent"
    requirements = triton_requirements(fp8_forms=True, mxfp4=True, transposed=True)
    config_type = TritonPersistentConfig
    stores_to_peers = True
    # Per-channel FP8: the intermediate is rounded to BF16 before it is quantised, so some codes fall on the other side,
    # and tensor cores of sm_90 sum e4m3 products with fewer bits than fp32 has.
    tolerance: ClassVar = {**TritonBackend.tolerance, "fp8_channel": 3e-2}

    def least_shared_memory(self, problem: MoEProblem) -> int:
        """See `TritonBackend.least_shared_memory`."""
        return least_shared_memory(problem, self._features)

    def configs(self, problem: MoEProblem) -> tuple[BackendConfig, ...]:
        """See `Backend.configs`."""
        return persistent_configs(problem, self._features)

    def workspace_bytes(self, problem: MoEProblem, config: BackendConfig) -> int:
        """See `Backend.workspace_bytes`."""
        quantization = quantization_of(problem)
        codes = problem.M * problem.K if quantization.activations else 0
        element = rows_dtype(torch_dtype(problem.act_dtype)).itemsize
        row = problem.N * quantization.activation_bytes(problem.act_dtype) + problem.K * element + 8
        if quantization.per_token:
            row += problem.N * element
        if problem.dtype == "mxfp4":  # rows in whole blocks, of the tokens too
            codes += (problem.M * (problem.K + _MOST_BLOCK) + problem.slots * _MOST_BLOCK) * element
        return codes + problem.slots * row

    def takes_quantized_rows(self, problem: MoEProblem) -> bool:
        """See `Backend.takes_quantized_rows`: not where the kernels dequantise the weights."""
        return self.quantizes_activations(problem)

    def launch(
        self,
        hidden_states: Tensor | QuantizedRows,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,
        out: Out,
    ) -> Out:
        """See `TritonBackend.launch`."""
        assert isinstance(config, TritonPersistentConfig)  # noqa: S101 - the dispatcher made it from config_type
        quantization, pdl = self._quantization(experts), config.pdl and self._features.pdl
        per_token = quantization.per_token
        in_product = quantization.activations and not per_token  # a tile holds whole groups of 128 columns, and no row
        N, K = experts.N, experts.K
        routing = route(topk_ids, experts.E, pdl=pdl)
        rows = routing.slot_of_row.shape[0]
        x, x_scale = activations(hidden_states, quantization, pdl=pdl)
        inner = N
        if quantization.scales == "mx":
            x, inner = order_columns(x, config.block_k, pdl=pdl), ordered_width(N, config.block_k)
        # Where the product does not quantise, its rows are stored as those of the second product are.
        stored = rows_dtype(out.dtype) if per_token else quantization.stored(out.dtype)
        h = x.new_empty(rows, inner, dtype=stored)
        h_scale = empty_scales(rows, N, h, column_major=False) if in_product else None
        product(
            experts, "gate_up", quantization, x, x_scale, routing, topk_ids.shape[1], h, h_scale, config,
            self._features, self._descriptor,
        )  # fmt: skip
        if per_token:
            h, h_scale = quantize_rows(h, per_token=True, pdl=pdl)
        y = x.new_empty(rows, K, dtype=rows_dtype(out.dtype))
        product(
            experts, "down", quantization, h, h_scale, routing, 0, y, None, config, self._features, self._descriptor
        )
        return combine(y, routing.row_of_slot, topk_weights, out, pdl=pdl)
