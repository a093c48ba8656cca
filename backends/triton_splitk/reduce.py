"""The end of a decode layer: each token's experts summed with their weights, in fixed order."""

import math
from typing import TYPE_CHECKING, Final

from moe_dispatch.backends.stages.combine import destination
from moe_dispatch.backends.triton_common.launch_options import pdl_option

if TYPE_CHECKING:
    from torch import Tensor

    from moe_dispatch.arrived_rows import PeerRows
    from moe_dispatch.backends.triton_splitk.config import SplitKConfig
    from moe_dispatch.experts import ExpertWeights

_BLOCK: Final = 256


def splitk_reduce(
    partial: "Tensor",
    experts: "ExpertWeights",
    topk_weights: "Tensor",
    topk_ids: "Tensor",
    out: "Tensor | PeerRows",
    config: "SplitKConfig",
) -> None:
    """Launch the weighted sum.

    Args:
        partial: fp32 ``[splits, M·topk, K]`` from `splitk_down`.
        experts: Checked weights; their down_bias is added here.
        topk_weights: fp32 ``[M, topk]``.
        topk_ids: int32 or int64 ``[M, topk]``.
        out: ``[M, K]``, or memory of several ranks; written.
        config: The configuration that `splitk_down` ran with.
    """
    from moe_dispatch.backends.triton_splitk.reduce_kernel import _moe_splitk_reduce_kernel

    M, topk = topk_ids.shape
    _moe_splitk_reduce_kernel[(M, math.ceil(experts.K / _BLOCK))](
        # inputs
        partial, topk_weights, topk_ids, experts.down_bias,
        # outputs
        *destination(out),
        # shapes
        M * topk, experts.K, experts.E,
        # constants
        TOPK=topk, SPLITS=config.splits_down, HAS_BIAS=experts.down_bias is not None, PDL=config.pdl, BLOCK=_BLOCK,
        num_warps=2, **pdl_option(config.pdl),
    )  # fmt: skip
