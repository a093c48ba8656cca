"""Our Triton backend for middle and large token counts."""

import torch
from torch import Tensor

from moe_dispatch.backend import BackendConfig
from moe_dispatch.experts import FP8, ExpertWeights
from moe_dispatch.problem import QUANT_BLOCK, MoEProblem

from ..stages.combine import combine
from ..stages.quantize import empty_scales, quantize_rows
from ..stages.route import Routing, route
from ..triton_backend import TritonBackend
from .config import TritonPersistentConfig, persistent_configs, tma_fits


class TritonPersistentBackend(TritonBackend):
    """Padding-free grouped products: route, [quantise], gate-up with the activation inside, down, combine.

    Every launch of a product is one wave of programs; which tiles there are is found on the device. Deterministic:
    rows are placed in the order of their slots, and nothing is added atomically.
    """

    name = "triton_persistent"
    config_type = TritonPersistentConfig

    def configs(self, problem: MoEProblem) -> tuple[BackendConfig, ...]:
        """See `Backend.configs`."""
        return persistent_configs(problem, self._features)

    def workspace_bytes(self, problem: MoEProblem, config: BackendConfig) -> int:  # noqa: ARG002
        """See `Backend.workspace_bytes`."""
        each = 1 if problem.dtype == "fp8" else 2
        quantised = problem.M * problem.K if problem.dtype == "fp8" else 0
        return problem.slots * (problem.N * each + problem.K * 2 + 8) + quantised

    def run(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,
    ) -> Tensor:
        """See `Backend.run`."""
        assert isinstance(config, TritonPersistentConfig)  # noqa: S101 - the dispatcher made it from config_type
        pdl = config.pdl and self._features.pdl
        routing = route(topk_ids, experts.E, pdl=pdl)
        x, x_scale = (
            quantize_rows(hidden_states, pdl=pdl) if experts.dtype == "fp8" else (hidden_states, None)
        )  # fmt: skip
        h, h_scale = self._gate_up(x, x_scale, experts, routing, topk_ids.shape[1], config)
        y = self._down(h, h_scale, experts, routing, hidden_states.dtype, config)
        return combine(y, routing.row_of_slot, topk_weights, hidden_states.dtype, pdl=pdl)

    def _gate_up(
        self,
        x: Tensor,
        x_scale: Tensor | None,
        experts: ExpertWeights,
        routing: Routing,
        topk: int,
        config: TritonPersistentConfig,
    ) -> tuple[Tensor, Tensor | None]:
        """The first product and the activation: ``[rows, N]``, e4m3 with its multipliers if `x` is."""
        from .kernel import _moe_gate_up_kernel

        fp8 = x_scale is not None
        rows, N, K = routing.slot_of_row.shape[0], experts.N, experts.K
        h = torch.empty(rows, N, dtype=FP8 if fp8 else x.dtype, device=x.device)
        h_scale = empty_scales(rows, N, x.device, column_major=False) if fp8 else None
        block_k = QUANT_BLOCK if fp8 else config.block_k
        block_n = QUANT_BLOCK if fp8 else config.block_n
        # Alternating rows are read with a stride, which a two-dimensional descriptor does not have.
        tma = self._tma(config, K, x.element_size()) and not experts.interleaved
        weight = experts.gate_up
        _moe_gate_up_kernel[(self._programs(config),)](
            # inputs
            x, x_scale,
            self._descriptor(experts, "gate_up", (weight.shape[0] * weight.shape[1], K), (block_n, block_k))
            if tma else weight,
            experts.gate_up_scale, experts.gate_up_bias, routing.slot_of_row, routing.starts, routing.ends,
            # outputs
            h, h_scale,
            # shapes
            N, K, experts.E,
            # constants
            TOPK=topk, ACTIVATION=experts.activation, GATED=experts.gated, INTERLEAVED=experts.interleaved, FP8=fp8,
            SCALAR_SCALE=not experts.gated or (N % QUANT_BLOCK == 0 and not experts.interleaved),
            EVEN_K=K % block_k == 0, TMA=tma, SWAP=config.swap, BLOCK_M=config.block_m, TAIL_M=config.tail_m,
            BLOCK_N=block_n, BLOCK_K=block_k, ORDER=config.order, GROUP_M=config.group_m,
            E_POW2=_pow2(experts.E), **self._launch(config),
        )  # fmt: skip
        return h, h_scale

    def _down(
        self,
        h: Tensor,
        h_scale: Tensor | None,
        experts: ExpertWeights,
        routing: Routing,
        out_dtype: torch.dtype,
        config: TritonPersistentConfig,
    ) -> Tensor:
        """The second product: ``[rows, K]``."""
        from .kernel import _moe_down_kernel

        fp8 = h_scale is not None
        rows, N, K = h.shape[0], experts.N, experts.K
        y = torch.empty(rows, K, dtype=out_dtype, device=h.device)
        block_k = QUANT_BLOCK if fp8 else config.down_block_k
        tma = self._tma(config, N, h.element_size())
        _moe_down_kernel[(self._programs(config),)](
            # inputs
            h, h_scale,
            self._descriptor(experts, "down", (experts.E * K, N), (config.down_block_n, block_k))
            if tma else experts.down,
            experts.down_scale, experts.down_bias, routing.starts, routing.ends,
            # outputs
            y,
            # shapes
            N, K, experts.E,
            # constants
            FP8=fp8, SCALAR_SCALE=config.down_block_n <= QUANT_BLOCK, EVEN_N=N % block_k == 0, TMA=tma,
            SWAP=config.swap, BLOCK_M=config.block_m, TAIL_M=config.tail_m, BLOCK_N=config.down_block_n,
            BLOCK_K=block_k, ORDER=config.order, GROUP_M=config.group_m, E_POW2=_pow2(experts.E),
            **self._launch(config),
        )  # fmt: skip
        return y

    def _programs(self, config: TritonPersistentConfig) -> int:
        return self._features.sms * config.ctas_per_sm

    def _tma(self, config: TritonPersistentConfig, columns: int, element_bytes: int) -> bool:
        return config.tma and self._features.tma and tma_fits(columns, element_bytes)

    def _launch(self, config: TritonPersistentConfig) -> dict[str, object]:
        pdl = config.pdl and self._features.pdl
        launch: dict[str, object] = {"PDL": pdl, "num_warps": config.num_warps, "num_stages": config.num_stages}
        return launch | {"launch_pdl": True} if pdl else launch


def _pow2(value: int) -> int:
    return 1 << (value - 1).bit_length()
