"""Masking the ids that are none of this process's experts, for libraries that know one masked id, or none."""

import math
from typing import Final

import torch
from torch import Tensor

from moe_dispatch.backends.triton_common.features import on_triton
from moe_dispatch.backends.triton_common.launch_options import next_power_of_2

_BLOCK: Final = 512


def mask_slots(topk_ids: Tensor, E: int, masked: int) -> Tensor:
    """Replace every id outside 0…E-1 by one value, and narrow to int32.

    Args:
        topk_ids: int32 or int64 ``[M, topk]``.
        E: Experts held by this process.
        masked: The value that replaces the other ids.

    Returns:
        int32 ``[M, topk]``, fresh memory.
    """
    if not on_triton(topk_ids):
        return mask_slots_torch(topk_ids, E, masked)
    from moe_dispatch.backends.stages.mask_slots_kernel import _moe_mask_slots_kernel

    out = torch.empty(topk_ids.shape, dtype=torch.int32, device=topk_ids.device)
    slots = topk_ids.numel()
    block = min(_BLOCK, max(32, next_power_of_2(slots)))
    _moe_mask_slots_kernel[(math.ceil(slots / block),)](
        # inputs
        topk_ids,
        # outputs
        out,
        # shapes
        slots, E, masked,
        # constants
        BLOCK=block, num_warps=1,
    )  # fmt: skip
    return out


def mask_slots_torch(topk_ids: Tensor, E: int, masked: int) -> Tensor:
    """As `mask_slots`, in torch."""
    return torch.where((topk_ids >= 0) & (topk_ids < E), topk_ids, masked).int()
