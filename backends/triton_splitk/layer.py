"""Both products of a decode layer in one launch, where none can start before the one before it has ended."""

import math
from typing import TYPE_CHECKING, Any

from moe_dispatch.backends.triton_splitk.gate_up import two_scales

if TYPE_CHECKING:
    from torch import Tensor

    from moe_dispatch.backends.triton_common.quantization import Quantization
    from moe_dispatch.backends.triton_splitk.config import SplitKConfig
    from moe_dispatch.experts import ExpertWeights


def splitk_layer(
    x: "Tensor",
    experts: "ExpertWeights",
    quantization: "Quantization",
    topk_ids: "Tensor",
    inner: "Tensor",
    partial: "Tensor",
    served: "Tensor",
    config: "SplitKConfig",
    gate_up_descriptor: Any,
    down_descriptor: Any,
) -> None:
    """Launch both products. A tile of down waits for its expert's tiles of gate_up, which count themselves.

    Args:
        x: ``[M, K]``, not quantised.
        experts: Checked weights.
        quantization: How they are multiplied.
        topk_ids: int32 or int64 ``[M, topk]``.
        inner: Activated, ``[M·topk, N]``, written where a slot's id is valid.
        partial: fp32 ``[splits, M·topk, K]`` without bias and weight, written where the slot's id is valid.
        served: What `splitk_slots` made, whose counters are used up.
        config: Tile sizes.
        gate_up_descriptor: That weight's tensor descriptor; None where it is read by addresses.
        down_descriptor: Likewise.
    """
    from moe_dispatch.backends.triton_splitk.layer_kernel import _moe_splitk_layer_kernel

    S, topk = topk_ids.numel(), topk_ids.shape[1]
    K, N, mx = experts.K, experts.N, quantization.scales == "mx"
    tiles = math.ceil(N * (2 if experts.gated else 1) / config.block_n)
    tiles += math.ceil(K / config.block_n) * config.splits_down
    by_slot = config.grid == "slots"
    _moe_splitk_layer_kernel[((S if by_slot else experts.E) * tiles,)](
        # inputs
        x, quantization.readable(experts.gate_up), gate_up_descriptor, experts.gate_up_scale, experts.gate_up_bias,
        quantization.readable(experts.down), down_descriptor, experts.down_scale, topk_ids,
        # outputs
        inner, partial, served,
        # shapes
        S, K, N, experts.E, topk,
        # constants
        ROWS=config.block_n, BLOCK_M=config.block_m, BLOCK_K=config.block_k, EVEN_K=K % config.block_k == 0,
        EVEN_N=N % config.block_k == 0, SPLITS=config.splits_down, BY_SLOT=by_slot,
        TMA_GATE_UP=gate_up_descriptor is not None, TMA_DOWN=down_descriptor is not None, PDL=config.pdl,
        SCALES=quantization.scales, TWO_SCALES=two_scales(experts, config), GATED=experts.gated,
        INTERLEAVED=experts.interleaved, TRANSPOSED=experts.transposed, ROW_SCALES_K=K // 32 if mx else 1,
        ROW_SCALES_N=N // 32 if mx else 1, HAS_BIAS=experts.gate_up_bias is not None, ACTIVATION=experts.activation,
        **config.launch(quantization),
    )  # fmt: skip
