"""The second product for experts with hardly a token each, summed over a token's experts in the same launch.

A CTA owns a few columns of one token's output and reads their rows of down in every expert of the token: the weighted
sum needs neither another launch nor atomics. Its first chunk of weights is on its way to the registers before it waits
for gate_up.
"""

import math
from typing import TYPE_CHECKING

from moe_dispatch.backends.stages.combine import destination
from moe_dispatch.backends.triton_common.launch_options import next_power_of_2, pdl_option
from moe_dispatch.backends.triton_common.quantization import quantization

if TYPE_CHECKING:
    from torch import Tensor

    from moe_dispatch.arrived_rows import PeerRows
    from moe_dispatch.backends.triton_vector.config import TritonVectorConfig
    from moe_dispatch.experts import ExpertWeights


def vector_down(
    inner: "Tensor",
    experts: "ExpertWeights",
    topk_weights: "Tensor",
    topk_ids: "Tensor",
    out: "Tensor | PeerRows",
    config: "TritonVectorConfig",
) -> None:
    """Launch the second product.

    Args:
        inner: Activated, ``[M·topk, N]``.
        experts: Checked weights.
        topk_weights: fp32 ``[M, topk]``.
        topk_ids: int32 or int64 ``[M, topk]``.
        out: ``[M, K]``, or memory of several ranks; written.
        config: Tile sizes.
    """
    from moe_dispatch.backends.triton_vector.down_kernel import _moe_vector_down_kernel

    M, topk = topk_ids.shape
    weights = quantization(experts.dtype, fp8=False)  # of which no device multiplies the codes
    together = min(config.down_experts, next_power_of_2(topk))
    chunk, chunks = min(config.down_columns, max(128, next_power_of_2(experts.N))), 1
    # Where all experts are read at once, columns past N are left out.
    experts_first = together >= topk and chunk > experts.N
    if experts_first:
        chunk = min(chunk, max(128, 512 // experts.down.element_size() * config.down_warps // together))
        chunks = math.ceil(experts.N / chunk)
    grid = (M, math.ceil(experts.K / config.down_rows))
    _moe_vector_down_kernel[grid](
        # inputs
        inner, weights.readable(experts.down), experts.down_scale, experts.down_bias, topk_weights, topk_ids,
        # outputs
        *destination(out),
        # shapes
        experts.K, experts.N, experts.E,
        # constants
        TOPK=topk, ROWS=config.down_rows, EXPERTS=together, CHUNK=chunk, CHUNKS=chunks,
        STEPS_N=math.ceil(experts.N / (chunk * chunks)), EXPERTS_FIRST=experts_first, SCALES=weights.scales,
        PDL=config.pdl, num_warps=config.down_warps, **pdl_option(config.pdl),
    )  # fmt: skip
