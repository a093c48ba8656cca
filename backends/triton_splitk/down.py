"""The second product of a decode layer: down's rows times the intermediate of each hit expert's tokens."""

import math
from typing import TYPE_CHECKING, Any

from moe_dispatch.backends.triton_splitk.config import slots_per_scan

if TYPE_CHECKING:
    from torch import Tensor

    from moe_dispatch.backends.triton_splitk.config import SplitKConfig
    from moe_dispatch.experts import ExpertWeights


def splitk_down(
    inner: "Tensor",
    inner_scale: "Tensor | None",
    experts: "ExpertWeights",
    topk_weights: "Tensor",
    topk_ids: "Tensor",
    out: "Tensor",
    config: "SplitKConfig",
    descriptor: Any,
) -> None:
    """Launch the second product.

    Args:
        inner: Activated, ``[M·topk, N]``, e4m3 in block FP8.
        inner_scale: fp32 multipliers of inner's codes ``[M·topk, ⌈N/128⌉]``.
        experts: Checked weights.
        topk_weights: fp32 ``[M, topk]``.
        topk_ids: int32 or int64 ``[M, topk]``.
        out: fp32. Deterministic mode: partial sums ``[splits, M·topk, K]`` without bias and weight, written where the
            slot's id is valid. Atomic mode: ``[M, K]``, cleared before; the weighted sum is added to it.
        config: Tile sizes.
        descriptor: The weights' tensor descriptor where `config.tma`, else None.
    """
    from moe_dispatch.backends.triton_splitk.down_kernel import _moe_splitk_down_kernel

    S, topk = topk_ids.numel(), topk_ids.shape[1]
    grid = (
        S if config.grid == "slots" else experts.E,
        math.ceil(experts.K / config.block_n),
        config.splits_down,
    )
    _moe_splitk_down_kernel[grid](
        # inputs
        inner, inner_scale, experts.down, descriptor, experts.down_scale, experts.down_bias, topk_weights, topk_ids,
        # outputs
        out,
        # shapes
        S, experts.K, experts.N, experts.E, topk,
        # constants
        ROWS=config.block_n, BLOCK_M=config.block_m, BLOCK_K=config.block_k, SCAN=slots_per_scan(S),
        EVEN_N=experts.N % config.block_k == 0, SPLITS=config.splits_down, BY_SLOT=config.grid == "slots",
        ATOMIC=config.atomic, TMA=config.tma, PDL=config.pdl, FP8=experts.dtype == "fp8",
        HAS_BIAS=experts.down_bias is not None, **config.launch,
    )  # fmt: skip
