"""Decode: few tokens, so that what counts is to read the weights of the hit experts once and at full bandwidth."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_dispatch.backend import BackendConfig
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.problem import ELEMENT_BYTES, QUANT_BLOCK, MoEProblem

from ..triton_backend import TritonBackend
from .config import SplitKConfig, candidate_configs, default_config

# Every CTA reads all ids to find its own.
MOST_SLOTS = 4096


class TritonSplitKBackend(TritonBackend):
    """Two products split along K and a weighted sum: three launches, without sorting or a routing pass.

    The first product finds the tokens of each hit expert by itself, quantises them where the weights are block FP8,
    and activates; the second reads its result; the third sums over experts and splits, in fixed order unless the
    configuration says ``mode="atomic"``.
    """

    name = "triton_splitk"
    config_type = SplitKConfig

    def further_reasons(self, problem: MoEProblem) -> tuple[str, ...]:
        """See `Backend.further_reasons`."""
        reasons = super().further_reasons(problem)
        if problem.slots > MOST_SLOTS:
            reasons += (f"made for decode: needs M·topk ≤ {MOST_SLOTS}, got {problem.slots}",)
        return reasons

    def configs(self, problem: MoEProblem) -> tuple[SplitKConfig, ...]:
        """See `Backend.configs`."""
        return candidate_configs(problem, self._features)

    def default_config(self, problem: MoEProblem) -> SplitKConfig:
        """See `Backend.default_config`."""
        return default_config(problem, self._features)

    def workspace_bytes(self, problem: MoEProblem, config: BackendConfig) -> int:
        """See `Backend.workspace_bytes`."""
        config = _checked(config, problem.dtype)
        if config.splits_gate_up > 1:
            inner = 4 * config.splits_gate_up * problem.slots * problem.gate_up_rows
        else:
            inner = problem.slots * problem.N * (4 if problem.dtype == "fp8" else ELEMENT_BYTES[problem.act_dtype])
        summed = problem.M if config.mode == "atomic" else config.splits_down * problem.slots
        return inner + 4 * summed * problem.K

    def deterministic(self, config: BackendConfig) -> bool:
        """True in deterministic mode; atomic additions arrive in any order."""
        return isinstance(config, SplitKConfig) and config.mode == "deterministic"

    def run(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,
    ) -> Tensor:
        """See `Backend.run`."""
        config = _checked(config, experts.dtype)
        kernels = _kernels()
        S, device = topk_ids.numel(), hidden_states.device
        descriptors = self._weight_descriptors(experts, config) if config.tma else (None, None)

        if config.splits_gate_up > 1:
            parts = 2 if experts.gated else 1
            shape: tuple[int, ...] = (config.splits_gate_up, parts, S, experts.N)
            dtype = torch.float32
        else:
            # In fp32 for block FP8, so that it is quantised from what the reference quantises.
            shape = (S, experts.N)
            dtype = torch.float32 if experts.dtype == "fp8" else hidden_states.dtype
        inner = torch.empty(shape, dtype=dtype, device=device)

        if config.mode == "atomic":
            total = torch.empty(hidden_states.shape, dtype=torch.float32, device=device)
            kernels.gate_up(hidden_states, experts, topk_ids, inner, total, config, descriptors[0])
            kernels.down(inner, experts, topk_weights, topk_ids, total, config, descriptors[1])
            return total.to(hidden_states.dtype)
        partial = torch.empty((config.splits_down, S, experts.K), dtype=torch.float32, device=device)
        out = torch.empty_like(hidden_states)
        kernels.gate_up(hidden_states, experts, topk_ids, inner, None, config, descriptors[0])
        kernels.down(inner, experts, topk_weights, topk_ids, partial, config, descriptors[1])
        kernels.reduce(partial, experts, topk_weights, topk_ids, out, config)
        return out

    def _weight_descriptors(self, experts: ExpertWeights, config: SplitKConfig) -> tuple[Any, Any]:
        """Tensor descriptors of gate_up and down, in the tiles of `config`.

        A tile of gate_up holds as many gate rows as up rows, in the order of memory: ``[E·2, N, K]`` in boxes of two
        blocks of rows, or ``[E·N, 2, K]`` in boxes of alternating rows.
        """
        E, N, K = experts.E, experts.N, experts.K
        parts = 2 if experts.gated else 1
        columns = config.block_n // parts
        if experts.interleaved:
            shape, block = (E * N, parts, K), (columns, parts, config.block_k)
        else:
            shape, block = (E * parts, N, K), (parts, columns, config.block_k)
        return (
            self._descriptor(experts, "gate_up", shape, block),
            self._descriptor(experts, "down", (E, K, N), (1, config.block_n, config.block_k)),
        )


class _Kernels(NamedTuple):
    gate_up: Callable[..., None]
    down: Callable[..., None]
    reduce: Callable[..., None]


@functools.cache
def _kernels() -> _Kernels:
    from .down import splitk_down
    from .gate_up import splitk_gate_up
    from .reduce import splitk_reduce

    return _Kernels(splitk_gate_up, splitk_down, splitk_reduce)


def _checked(config: BackendConfig, dtype: str) -> SplitKConfig:
    if not isinstance(config, SplitKConfig):
        raise InvalidInputError(f"triton_splitk takes a SplitKConfig, got {type(config).__name__}")
    if dtype == "fp8" and config.block_k != QUANT_BLOCK:
        raise InvalidInputError(
            f"block FP8 changes scale every {QUANT_BLOCK} columns: needs block_k={QUANT_BLOCK}, got {config.block_k}"
        )
    return config
