"""The first product for experts with hardly a token each: weights from memory to registers, no tensor core.

A CTA serves one slot. It reads its rows of gate_up once, 16 bytes at a time with all of a chunk in flight, multiplies
in fp32, and adds across threads only at the end. CTAs of slots that share an expert run side by side, so that the
second one reads the weights from the L2 cache.
"""

import math
from typing import TYPE_CHECKING

from moe_dispatch.backends.triton_common.launch_options import next_power_of_2, pdl_option
from moe_dispatch.backends.triton_common.quantization import quantization

if TYPE_CHECKING:
    from torch import Tensor

    from moe_dispatch.backends.triton_vector.config import TritonVectorConfig
    from moe_dispatch.experts import ExpertWeights


def vector_gate_up(
    x: "Tensor",
    experts: "ExpertWeights",
    topk_ids: "Tensor",
    inner: "Tensor",
    config: "TritonVectorConfig",
) -> None:
    """Launch the first product.

    Args:
        x: ``[M, K]``.
        experts: Checked weights.
        topk_ids: int32 or int64 ``[M, topk]``.
        inner: ``[M·topk, N]``, activated; written where a slot's id is valid.
        config: Tile sizes.
    """
    from moe_dispatch.backends.triton_vector.gate_up_kernel import _moe_vector_gate_up_kernel

    parts = 2 if experts.gated else 1
    weights = quantization(experts.dtype, fp8=False)  # of which no device multiplies the codes
    columns = config.rows // parts
    block_k = min(config.columns, max(128, next_power_of_2(experts.K)))
    # With rows of its own, a warp exchanges the fewest sums, but it multiplies by more scales of blocks.
    groups = 1 if weights.scales == "block" else min(config.warps, columns)
    vectors = block_k * experts.gate_up.element_size() // 16
    chunks = max(1, vectors * groups // (32 * config.warps))
    grid = (topk_ids.numel(), math.ceil(experts.N / columns))
    _moe_vector_gate_up_kernel[grid](
        # inputs
        x, weights.readable(experts.gate_up), experts.gate_up_scale, experts.gate_up_bias, topk_ids,
        # outputs
        inner,
        # shapes
        experts.K, experts.N, experts.E,
        # constants
        TOPK=topk_ids.shape[1], COLUMNS=columns, GROUPS=groups, CHUNKS=chunks, BLOCK_K=block_k,
        BLOCKS=math.ceil(experts.K / block_k), EVEN_N=experts.N % columns == 0, SCALES=weights.scales, PDL=config.pdl,
        GATED=experts.gated, INTERLEAVED=experts.interleaved, ACTIVATION=experts.activation,
        num_warps=config.warps, **pdl_option(config.pdl),
    )  # fmt: skip
