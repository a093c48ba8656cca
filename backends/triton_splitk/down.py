"""The second product of a decode layer: down's rows times the intermediate of each hit expert's tokens."""

import math
from typing import TYPE_CHECKING, Any

from moe_dispatch.backends.triton_splitk.config import slots_per_scan

if TYPE_CHECKING:
    from torch import Tensor

    from moe_dispatch.backends.triton_common.quantization import Quantization
    from moe_dispatch.backends.triton_splitk.config import SplitKConfig
    from moe_dispatch.experts import ExpertWeights


def splitk_down(
    inner: "Tensor",
    inner_scale: "Tensor | None",
    experts: "ExpertWeights",
    quantization: "Quantization",
    topk_ids: "Tensor",
    served: "Tensor | None",
    partial: "Tensor",
    config: "SplitKConfig",
    descriptor: Any,
) -> None:
    """Launch the second product.

    Args:
        inner: Activated, ``[M·topk, N]``, e4m3 where activations are quantised.
        inner_scale: fp32 multipliers of inner's codes ``[M·topk, ⌈N/128⌉]`` or ``[M·topk, 1]``; else None.
        experts: Checked weights.
        quantization: How they are multiplied.
        topk_ids: int32 or int64 ``[M, topk]``.
        served: What `splitk_gate_up` wrote; None where each CTA looks for its slots by itself.
        partial: fp32 ``[splits, M·topk, K]`` without bias and weight, written where the slot's id is valid.
        config: Tile sizes.
        descriptor: The weights' tensor descriptor; None where they are read by addresses.
    """
    from moe_dispatch.backends.triton_splitk.down_kernel import _moe_splitk_down_kernel

    S = topk_ids.numel()
    grid = (
        S if config.grid == "slots" else experts.E,
        math.ceil(experts.K / config.block_n),
        config.splits_down,
    )
    _moe_splitk_down_kernel[grid](
        # inputs
        inner, inner_scale, quantization.readable(experts.down), descriptor, experts.down_scale, topk_ids,
        served,
        # outputs
        partial,
        # shapes
        S, experts.K, experts.N, experts.E,
        # constants
        ROWS=config.block_n, BLOCK_M=config.block_m, BLOCK_K=config.block_k, SCAN=slots_per_scan(S),
        EVEN_N=experts.N % config.block_k == 0, SPLITS=config.splits_down, BY_SLOT=config.grid == "slots",
        TMA=descriptor is not None, PDL=config.pdl, SCALES=quantization.scales, TRANSPOSED=experts.transposed,
        ROW_SCALES=experts.N // 32 if quantization.scales == "mx" else 1, **config.launch(quantization),
    )  # fmt: skip
