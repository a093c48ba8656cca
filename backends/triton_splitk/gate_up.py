"""The first product of a decode layer: gate_up's rows times the tokens of each hit expert, activated."""

import math
from typing import TYPE_CHECKING, Any

from moe_dispatch.backends.triton_splitk.config import slots_per_scan
from moe_dispatch.problem import QUANT_BLOCK

if TYPE_CHECKING:
    from torch import Tensor

    from moe_dispatch.backends.triton_common.quantization import Quantization
    from moe_dispatch.backends.triton_splitk.config import SplitKConfig
    from moe_dispatch.experts import ExpertWeights


def splitk_gate_up(
    x: "Tensor",
    x_scale: "Tensor | None",
    experts: "ExpertWeights",
    quantization: "Quantization",
    topk_ids: "Tensor",
    inner: "Tensor",
    inner_scale: "Tensor | None",
    served: "Tensor | None",
    config: "SplitKConfig",
    descriptor: Any,
    *,
    ids_ready: bool,
) -> None:
    """Launch the first product.

    Args:
        x: ``[M, K]``, or its e4m3 codes.
        x_scale: fp32 multipliers of the codes ``[M, ⌈K/128⌉]`` or ``[M, 1]``; else None.
        experts: Checked weights.
        quantization: How they are multiplied.
        topk_ids: int32 or int64 ``[M, topk]``.
        inner: Written where a slot's id is valid: activated ``[M·topk, N]``, e4m3 where activations are quantised;
            or, where `config.partial_sums`, fp32 ``[splits, 2, M·topk, N]`` (``1`` for ``2`` without a gate) before
            bias and activation, which `activate_partial` applies.
        inner_scale: fp32 multipliers of inner's codes ``[M·topk, ⌈N/128⌉]``, written; else None.
        served: int32 ``[E, M·topk + 1]``, written for `splitk_down`: how many slots name an expert, and which; or None.
        config: Tile sizes.
        descriptor: The weights' tensor descriptor; None where they are read by addresses.
        ids_ready: Whether the kernel before this one has waited for the one that writes `topk_ids`.
    """
    from moe_dispatch.backends.triton_splitk.gate_up_kernel import _moe_splitk_gate_up_kernel

    S, topk = topk_ids.numel(), topk_ids.shape[1]
    parts = 2 if experts.gated else 1
    grid = (
        S if config.grid == "slots" else experts.E,
        math.ceil(experts.N * parts / config.block_n),
        config.splits_gate_up,
    )
    _moe_splitk_gate_up_kernel[grid](
        # inputs
        x, x_scale, quantization.readable(experts.gate_up), descriptor, experts.gate_up_scale, experts.gate_up_bias,
        topk_ids,
        # outputs
        inner, inner_scale, served,
        # shapes
        S, experts.K, experts.N, experts.E, topk,
        # constants
        ROWS=config.block_n, BLOCK_M=config.block_m, BLOCK_K=config.block_k, SCAN=slots_per_scan(S),
        EVEN_K=experts.K % config.block_k == 0, SPLITS=config.splits_gate_up, BY_SLOT=config.grid == "slots",
        TMA=descriptor is not None, PDL=config.pdl, SCALES=quantization.scales, TWO_SCALES=two_scales(experts, config),
        PARTIAL=config.partial_sums(quantization, gated=experts.gated), GATED=experts.gated,
        INTERLEAVED=experts.interleaved, TRANSPOSED=experts.transposed,
        ROW_SCALES=experts.K // 32 if quantization.scales == "mx" else 1,
        HAS_BIAS=experts.gate_up_bias is not None, ACTIVATION=experts.activation,
        IDS_READY=ids_ready, **config.launch(quantization),
    )  # fmt: skip


def two_scales(experts: "ExpertWeights", config: "SplitKConfig") -> bool:
    """Whether a tile's rows lie in one block of scales, or its gate rows in one and its up rows in another."""
    columns = config.block_n // (2 if experts.gated else 1)
    within = columns <= QUANT_BLOCK and (experts.N % columns == 0 or not experts.gated)
    return config.block_n <= QUANT_BLOCK if experts.interleaved else within
