"""Decode: few tokens, so that what counts is to read the weights of the hit experts once and at full bandwidth."""

import math
from typing import Any

import torch
from torch import Tensor

from moe_dispatch.backend import BackendConfig
from moe_dispatch.backends.stages.activate_partial import activate_partial
from moe_dispatch.backends.stages.combine import Out
from moe_dispatch.backends.stages.quantize import activations
from moe_dispatch.backends.triton_common.backend import TritonBackend
from moe_dispatch.backends.triton_common.descriptors import boxes_mix_gate_and_up
from moe_dispatch.backends.triton_common.features import triton_requirements
from moe_dispatch.backends.triton_common.quantization import Quantization, quantization_of
from moe_dispatch.backends.triton_splitk.config import (
    SplitKConfig,
    candidate_configs,
    default_config,
    least_shared_memory,
)
from moe_dispatch.backends.triton_splitk.down import splitk_down
from moe_dispatch.backends.triton_splitk.gate_up import splitk_gate_up
from moe_dispatch.backends.triton_splitk.layer import splitk_layer
from moe_dispatch.backends.triton_splitk.reduce import splitk_reduce
from moe_dispatch.backends.triton_splitk.slots import splitk_slots
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.numerics import QuantizedRows
from moe_dispatch.problem import QUANT_BLOCK, MoEProblem


class TritonSplitKBackend(TritonBackend):
    """Two products and a weighted sum in as few launches as there can be, without sorting or a routing pass.

    The first product finds the tokens of each hit expert by itself and activates; the second reads its result. Tensor
    cores serve all tokens of an expert at once, several CTAs sharing a tile along K where few experts are hit; a last
    launch sums over experts and splits. Deterministic: all sums are in fixed order.

    A device without programmatic dependent launch is idle while a kernel ends and the next one starts. There both
    products are one launch from two tokens on, unless their activations are quantised between them.

    FP8 quantises hidden_states before and the intermediate between the products, each once; where the device has
    no products of e4m3, neither is quantised, and the kernels dequantise the weights.
    """

    name = "triton_splitk"
    requirements = triton_requirements(fp8_forms=True, mxfp4=True, transposed=True)
    config_type = SplitKConfig
    stores_to_peers = True
    most_slots = 4096  # Every CTA reads all ids to find those of its expert.

    def least_shared_memory(self, problem: MoEProblem) -> int:
        """See `TritonBackend.least_shared_memory`."""
        return least_shared_memory(problem, self._features)

    def configs(self, problem: MoEProblem) -> tuple[SplitKConfig, ...]:
        """See `Backend.configs`."""
        return candidate_configs(problem, self._features)

    def default_config(self, problem: MoEProblem) -> SplitKConfig:
        """See `Backend.default_config`."""
        return default_config(problem, self._features)

    def workspace_bytes(self, problem: MoEProblem, config: BackendConfig) -> int:
        """See `Backend.workspace_bytes`."""
        quantization = quantization_of(problem)
        config = _checked(config, quantization)
        needed = problem.slots * problem.N * quantization.activation_bytes(problem.act_dtype)
        if quantization.activations:
            needed += problem.M * problem.K
        if config.partial_sums(quantization, gated=problem.gated):
            needed += 4 * config.splits_gate_up * problem.slots * problem.gate_up_rows
        if config.lists_slots:
            needed += 4 * problem.E * (problem.slots + 1)
        if config.one_launch:
            owners, most = (problem.slots, config.block_m) if config.grid == "slots" else (problem.E, problem.slots)
            needed += 4 * owners * (most + 2)
        return needed + 4 * config.splits_down * problem.slots * problem.K

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
        quantization = self._quantization(experts)
        config = _checked(config, quantization)
        if config.one_launch:
            self._launch_together(hidden_states, experts, quantization, topk_weights, topk_ids, config, out)
            return out
        served = None
        if config.lists_slots:
            served = topk_ids.new_empty(experts.E, topk_ids.numel() + 1, dtype=torch.int32)
        inner, inner_scale = self._intermediate(
            hidden_states, experts, quantization, topk_ids, served, config, out.dtype
        )
        partial = topk_weights.new_empty(config.splits_down, topk_ids.numel(), experts.K, dtype=torch.float32)
        descriptor = self._down_descriptor(experts, config)
        splitk_down(inner, inner_scale, experts, quantization, topk_ids, served, partial, config, descriptor)
        splitk_reduce(partial, experts, topk_weights, topk_ids, out, config)
        return out

    def _launch_together(
        self,
        hidden_states: Tensor | QuantizedRows,
        experts: ExpertWeights,
        quantization: Quantization,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: SplitKConfig,
        out: Out,
    ) -> None:
        """Both products in one launch, after the search for slots that its counters need anyhow."""
        x, _ = activations(hidden_states, quantization, pdl=config.pdl)
        S = topk_ids.numel()
        served = splitk_slots(topk_ids, experts, config)
        inner = x.new_empty(S, experts.N)
        partial = topk_weights.new_empty(config.splits_down, S, experts.K, dtype=torch.float32)
        descriptors = self._gate_up_descriptor(experts, config), self._down_descriptor(experts, config)
        splitk_layer(x, experts, quantization, topk_ids, inner, partial, served, config, *descriptors)
        splitk_reduce(partial, experts, topk_weights, topk_ids, out, config)

    def _intermediate(
        self,
        hidden_states: Tensor | QuantizedRows,
        experts: ExpertWeights,
        quantization: Quantization,
        topk_ids: Tensor,
        served: Tensor | None,
        config: SplitKConfig,
        act_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        """The input of down: ``[M·topk, N]`` activated; where activations are quantised its codes and multipliers."""
        S, N = topk_ids.numel(), experts.N
        x, x_scale = activations(hidden_states, quantization, pdl=config.pdl)
        # Rows that come as they are, are quantised by a launch of its own.
        ids_ready = quantization.activations and not isinstance(hidden_states, QuantizedRows)
        stored = quantization.stored(act_dtype)
        descriptor = self._gate_up_descriptor(experts, config)
        partial_sums = config.partial_sums(quantization, gated=experts.gated)
        inner_scale = None
        if partial_sums:
            parts = 2 if experts.gated else 1
            inner = x.new_empty(config.splits_gate_up, parts, S, N, dtype=torch.float32)
        else:
            inner = x.new_empty(S, N, dtype=stored)
            if quantization.activations:
                inner_scale = x.new_empty(S, math.ceil(N / QUANT_BLOCK), dtype=torch.float32)
        splitk_gate_up(
            x, x_scale, experts, quantization, topk_ids, inner, inner_scale, served, config, descriptor,
            ids_ready=ids_ready,
        )  # fmt: skip
        if partial_sums:
            return activate_partial(inner, experts, topk_ids, stored, pdl=config.pdl)
        return inner, inner_scale

    def _gate_up_descriptor(self, experts: ExpertWeights, config: SplitKConfig) -> Any:
        """The tensor descriptor of gate_up, whose boxes hold as many gate rows as up rows, in the order of memory.

        It is ``[E·2, N, K]`` in boxes of two blocks of rows, or ``[E·N, 2, K]`` in boxes of alternating rows. Of
        weights stored by columns it is ``[E, K, 2N]``, and None where gate and up do not alternate.
        """
        if not config.tma or not boxes_mix_gate_and_up(experts):
            return None
        E, N, K = experts.E, experts.N, experts.K
        parts = 2 if experts.gated else 1
        columns = config.block_n // parts
        if experts.transposed:
            return self._descriptor(experts, "gate_up", (E, K, parts * N), (1, config.block_k, config.block_n))
        if experts.interleaved:
            return self._descriptor(experts, "gate_up", (E * N, parts, K), (columns, parts, config.block_k))
        return self._descriptor(experts, "gate_up", (E * parts, N, K), (parts, columns, config.block_k))

    def _down_descriptor(self, experts: ExpertWeights, config: SplitKConfig) -> Any:
        """The tensor descriptor of down, whose boxes are rows of one expert, or parts of its columns."""
        if not config.tma:
            return None
        E, K, N = experts.E, experts.K, experts.N
        if experts.transposed:
            return self._descriptor(experts, "down", (E, N, K), (1, config.block_k, config.block_n))
        return self._descriptor(experts, "down", (E, K, N), (1, config.block_n, config.block_k))


def _checked(config: BackendConfig, quantization: Quantization) -> SplitKConfig:
    if not isinstance(config, SplitKConfig):
        raise InvalidInputError(f"triton_splitk takes a SplitKConfig, got {type(config).__name__}")
    if quantization.scales == "block" and config.block_k != QUANT_BLOCK:
        raise InvalidInputError(
            f"block FP8 changes scale every {QUANT_BLOCK} columns: needs block_k={QUANT_BLOCK}, got {config.block_k}"
        )
    if config.one_launch and (quantization.activations or config.splits_gate_up > 1):
        given = "quantised activations" if quantization.activations else f"splits_gate_up={config.splits_gate_up}"
        raise InvalidInputError(
            "one launch multiplies activations that are not quantised, and by whole rows of gate_up: needs "
            f"one_launch=False here, or splits_gate_up=1 without quantised activations, got {given}"
        )
    return config
