"""Our Triton backend for middle and large token counts."""

import math
from typing import Literal

from torch import Tensor

from moe_dispatch.backend import BackendConfig
from moe_dispatch.backends.gluon_hopper.products import (
    WINDOW,
    hopper_configs,
    hopper_kernels_load,
    hopper_permutes,
    hopper_products,
    hopper_suits,
)
from moe_dispatch.backends.stages.combine import combine
from moe_dispatch.backends.stages.quantize import empty_scales, quantize_rows
from moe_dispatch.backends.stages.route import Routing, route
from moe_dispatch.backends.triton_common.backend import TritonBackend
from moe_dispatch.backends.triton_persistent.config import TritonPersistentConfig, persistent_configs, tma_fits
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.numerics import FP8
from moe_dispatch.problem import QUANT_BLOCK, MoEProblem


class TritonPersistentBackend(TritonBackend):
    """Padding-free grouped products: route, [quantise], gate-up with the activation inside, down, combine.

    Every launch of a product is one wave of programs; which tiles there are is found on the device. Deterministic:
    rows are placed in the order of their slots, and nothing is added atomically.
    """

    name = "triton_persistent"
    config_type = TritonPersistentConfig

    def configs(self, problem: MoEProblem) -> tuple[BackendConfig, ...]:
        """See `Backend.configs`."""
        hopper = hopper_configs(problem, self.machine)
        plain = persistent_configs(problem, self._features)
        return (*hopper, *plain) if hopper_suits(problem) else (*plain, *hopper)

    def workspace_bytes(self, problem: MoEProblem, config: BackendConfig) -> int:
        """See `Backend.workspace_bytes`."""
        assert isinstance(config, TritonPersistentConfig)  # noqa: S101 - as in `run`
        each = 1 if problem.dtype == "fp8" else 2
        gluon = config.engine == "gluon"
        before = WINDOW if gluon else 0
        if gluon and hopper_permutes(problem.N, fp8=each == 1):
            inputs = (problem.slots + before) * problem.K * each
        else:
            inputs = problem.M * problem.K if problem.dtype == "fp8" else 0
        return inputs + (problem.slots + before) * problem.N * each + problem.slots * (problem.K * 2 + 8)

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
        fp8, pdl = experts.dtype == "fp8", config.pdl and self._features.pdl
        N, K = experts.N, experts.K
        routing = route(topk_ids, experts.E, pdl=pdl)
        # The loader's copies are of 16 bytes.
        if config.engine == "gluon" and hopper_kernels_load() and hidden_states.data_ptr() % 16 == 0:
            y = hopper_products(hidden_states, experts, routing, topk_ids.shape[1], config, self._features.sms)
            return combine(y, routing.row_of_slot, topk_weights, hidden_states.dtype, pdl=pdl)
        rows = routing.slot_of_row.shape[0]
        x, x_scale = quantize_rows(hidden_states, pdl=pdl) if fp8 else (hidden_states, None)
        h = hidden_states.new_empty(rows, N, dtype=FP8 if fp8 else None)
        h_scale = empty_scales(rows, N, h.device, column_major=False) if fp8 else None
        self._product(experts, "gate_up", x, x_scale, routing, topk_ids.shape[1], h, h_scale, config)
        y = hidden_states.new_empty(rows, K)
        self._product(experts, "down", h, h_scale, routing, 0, y, None, config)
        return combine(y, routing.row_of_slot, topk_weights, hidden_states.dtype, pdl=pdl)

    def _product(
        self,
        experts: ExpertWeights,
        name: Literal["gate_up", "down"],
        x: Tensor,
        x_scale: Tensor | None,
        routing: Routing,
        topk: int,
        y: Tensor,
        y_scale: Tensor | None,
        config: TritonPersistentConfig,
    ) -> None:
        """Launch one product: `y` ``[rows, N]`` from `x` ``[rows, K]``, or ``[M, K]`` with `topk` slots a row."""
        from moe_dispatch.backends.triton_persistent.product_kernel import _moe_product_kernel

        first = name == "gate_up"
        N, K = y.shape[1], x.shape[1]
        block_n = config.block_n if first else config.down_block_n
        block_k = QUANT_BLOCK if x_scale is not None else config.block_k
        halves = 2 if first and experts.gated else 1
        interleaved = first and experts.interleaved
        # Runs of half a tile: two warp groups side by side have gate and up of the same columns each.
        run = block_n // 2 if halves == 2 and not interleaved else 1
        tma = config.tma and self._features.tma and tma_fits(K, x.element_size()) and N % run == 0
        pdl = config.pdl and self._features.pdl
        # Triton does not flatten a loop that carries what it holds of one tile to the next.
        held = y_scale is not None and block_n < QUANT_BLOCK
        # A half of the operand lies in one block of weights.
        scalar = block_n <= QUANT_BLOCK and not interleaved and (halves == 1 or N % QUANT_BLOCK == 0)
        weight: Tensor = getattr(experts, name)
        # Seen as [E, N / run, halves, run, K], whose boxes are tiles' operands.
        shape = (experts.E, halves, N // run, run, K) if run > 1 else (experts.E, N, halves, 1, K)
        swapped = (1, 2) if run > 1 else None
        box = (1, block_n // run, halves, run, block_k)
        _moe_product_kernel[(self._features.sms * config.ctas_per_sm,)](
            # inputs
            x, x_scale,
            self._descriptor(experts, name, shape, box, swapped) if tma else weight,
            getattr(experts, f"{name}_scale"), getattr(experts, f"{name}_bias"),
            routing.slot_of_row if topk else None, routing.starts, routing.ends,
            # outputs
            y, y_scale,
            # shapes
            N, K, experts.E,
            # constants
            TOPK=topk, ACTIVATION=experts.activation if first else None, HALVES=halves, RUN=run,
            INTERLEAVED=interleaved, SCALAR_SCALE=scalar, EVEN_K=K % block_k == 0, TMA=tma,
            BLOCK_M=config.block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            ORDER=config.order, GROUP_M=config.group_m, E_POW2=1 << (experts.E - 1).bit_length(),
            FLATTEN=not held and math.ceil(K / block_k) <= config.flatten_steps, PDL=pdl,
            num_warps=config.num_warps, num_stages=config.num_stages, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
