"""Cuts experts' rows into the row blocks of the Hopper kernels' tiles."""

import math

from torch import Tensor

from moe_dispatch.backends.gluon_hopper.tiles import BLOCK_M, FP8_TAIL_M, FP8_TALL_BLOCKS, TAIL_M, TALL_BLOCKS
from moe_dispatch.backends.stages.route import Routing
from moe_dispatch.backends.triton_common.launch_options import next_power_of_2


def row_blocks(routing: Routing, group_m: int, *, fp8: bool, block_m: int = BLOCK_M) -> tuple[Tensor, Tensor]:
    """Cut every expert's rows into blocks of `block_m`. A block of 128 gets some more rows where that spares a block.

    Args:
        routing: From `route`, without padding between experts.
        group_m: Blocks of one expert that make a group, at most: their tiles are computed at about the same time.
        fp8: Whether blocks are for the FP8 kernel, whose tails are shorter.
        block_m: Rows of a block; fewer than 128 are for the MXFP4 kernel.

    Returns:
        int32 ``[blocks, 5]``: expert, first row and end of each block, first block of its group and how many that has;
        and int32 ``[3]``: how many there are, and two zeros from which the schedulers of the two products count.
    """
    from moe_dispatch.backends.gluon_hopper.row_blocks_kernel import _moe_row_blocks_kernel

    E, slots = routing.starts.shape[0], routing.slot_of_row.shape[0]
    blocks = routing.starts.new_empty(math.ceil(slots / block_m) + min(E, slots), 5)
    counts = routing.starts.new_empty(3)
    _moe_row_blocks_kernel[(E,)](
        # inputs
        routing.starts, routing.ends,
        # outputs
        blocks, counts,
        # shapes
        E,
        # constants
        BLOCK_M=block_m, TAIL_M=FP8_TAIL_M if fp8 else TAIL_M,
        TALL_BLOCKS=0 if block_m < BLOCK_M else FP8_TALL_BLOCKS if fp8 else TALL_BLOCKS,
        GROUP_M=group_m, E_POW2=next_power_of_2(E), num_warps=1, launch_pdl=True,
    )  # fmt: skip
    return blocks, counts
