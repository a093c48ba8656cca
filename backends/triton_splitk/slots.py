"""What both products in one launch need beforehand: each expert's slots, and a counter of its finished tiles."""

from typing import TYPE_CHECKING

import torch

from moe_dispatch.backends.triton_common.launch_options import pdl_option
from moe_dispatch.backends.triton_splitk.config import slots_per_scan

if TYPE_CHECKING:
    from torch import Tensor

    from moe_dispatch.backends.triton_splitk.config import SplitKConfig
    from moe_dispatch.experts import ExpertWeights


def splitk_slots(topk_ids: "Tensor", experts: "ExpertWeights", config: "SplitKConfig") -> "Tensor":
    """Launch the search for slots.

    Args:
        topk_ids: int32 or int64 ``[M, topk]``.
        experts: Checked weights.
        config: Tile sizes.

    Returns:
        int32, fresh memory: for each expert, or each slot where `config.grid` says so, a counter that is 0, how many
        slots its tiles serve, and which. ``[E, M·topk + 2]`` or ``[M·topk, block_m + 2]``.
    """
    from moe_dispatch.backends.triton_splitk.slots_kernel import _moe_splitk_slots_kernel

    S, by_slot = topk_ids.numel(), config.grid == "slots"
    owners, most = (S, config.block_m) if by_slot else (experts.E, S)
    served = topk_ids.new_empty(owners, most + 2, dtype=torch.int32)
    _moe_splitk_slots_kernel[(owners,)](
        # inputs
        topk_ids,
        # outputs
        served,
        # shapes
        S, experts.E,
        # constants
        BLOCK_M=config.block_m, SCAN=slots_per_scan(S), BY_SLOT=by_slot, PDL=config.pdl, num_warps=1,
        **pdl_option(config.pdl),
    )  # fmt: skip
    return served
