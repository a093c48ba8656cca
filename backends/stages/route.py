"""Routing: which row of the token buffer holds which slot, decided on the device."""

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from moe_dispatch.backends.triton_common.features import on_triton
from moe_dispatch.backends.triton_common.launch_options import next_power_of_2, pdl_option
from moe_dispatch.errors import InvalidInputError

# Up to this many slots (half as many with a capacity, where reading costs twice as much) one launch routes, in which
# the program of each expert reads every id; beyond, a counting sort in three launches is faster. (H200, 128 experts,
# within a layer, one launch and three: 5.5 and 10.7 µs at 2048 slots, 13.8 and 10.1 µs at 8192.)
FEW_SLOTS: Final = 2048
_BLOCK: Final = 128  # slots per program of the counting sort
_SCAN_EXPERTS: Final = 8  # experts per program of its scan: their int32 counts are a sector of memory


@dataclass(frozen=True, slots=True)
class Routing:
    """Which row each slot has, and which slot each row. Slots are numbered m·topk + k.

    Attributes:
        slot_of_row: int32 ``[rows]``: the slot of each row, the first where several share it; -1 in padding and in the
            unused tail.
        row_of_slot: int32 ``[M·topk]``: the row of each slot; -1 for slots without one.
        starts: int32 ``[E]``: the first row of each expert.
        ends: int32 ``[E]``: the end of each expert's rows that hold a slot, exclusive.
    """

    slot_of_row: Tensor
    row_of_slot: Tensor
    starts: Tensor
    ends: Tensor


def route(
    topk_ids: Tensor,
    E: int,
    *,
    alignment: int = 1,
    capacity: int | None = None,
    by_row: bool = True,
    one_launch_up_to: int | None = None,
    pdl: bool = False,
) -> Routing:
    """Give every slot a row, rows of one expert side by side and in the order of their slots.

    Nothing depends on routing values on the host, so it can be captured in a CUDA graph. The order of rows is a
    function of the ids alone: the same call gives the same rows.

    Args:
        topk_ids: int32 or int64 ``[M, topk]``; ids outside 0…E-1 get no row.
        E: Experts.
        alignment: Each expert starts at the end of the previous one rounded up to this (DeepGEMM's psum layout). The
            buffer has rows for the worst case, M·topk + min(M·topk, E)·(alignment - 1), rounded up.
        capacity: Instead, expert e owns rows e·capacity … (e + 1)·capacity (DeepGEMM's masked layout). Slots of a token
            that name one expert share a row, so that M rows are always enough; a slot that does not fit gets none.
        by_row: Whether `slot_of_row` will be read; if not, it is left unwritten on a GPU.
        one_launch_up_to: Slots up to which one launch routes without a capacity, where the host counts more than the
            device; `FEW_SLOTS` if None.
        pdl: Launch as programmatic dependents of the kernel before (sm_90 and newer).

    Raises:
        InvalidInputError: There are both an alignment and a capacity, or one of them is below 1.
    """
    if not on_triton(topk_ids):
        return route_torch(topk_ids, E, alignment=alignment, capacity=capacity)
    from moe_dispatch.backends.stages.route_kernel import (
        _moe_route_count_kernel,
        _moe_route_kernel,
        _moe_route_place_kernel,
        _moe_route_scan_kernel,
    )

    slots = topk_ids.numel()
    rows = buffer_rows(slots, E, alignment=alignment, capacity=capacity)
    routing = Routing(*(topk_ids.new_empty(length, dtype=torch.int32) for length in (rows, slots, E, E)))
    slot_of_row = routing.slot_of_row if by_row else None
    layout = {"TOPK": topk_ids.shape[1], "CAPACITY": capacity or 0, "E_POW2": next_power_of_2(E)}
    launch = {"PDL": pdl, **pdl_option(pdl)}
    few_slots = one_launch_up_to or FEW_SLOTS
    if slots <= (few_slots if capacity is None else FEW_SLOTS // 2):
        block = max(32, next_power_of_2(slots))
        _moe_route_kernel[(E,)](
            # inputs
            topk_ids,
            # outputs
            slot_of_row, routing.row_of_slot, routing.starts, routing.ends,
            # shapes
            slots, rows, E,
            # constants
            ALIGNMENT=alignment, BLOCK=block, num_warps=4 if block <= 1024 else 8, **layout, **launch,
        )  # fmt: skip
        return routing
    blocks = math.ceil(slots / _BLOCK)
    counts = topk_ids.new_empty(blocks + 1, E, dtype=torch.int32)
    _moe_route_count_kernel[(blocks,)](
        # inputs
        topk_ids,
        # outputs
        counts, slot_of_row,
        # shapes
        slots, rows, E,
        # constants
        BLOCK=_BLOCK, num_warps=4, **layout, **launch,
    )  # fmt: skip
    _moe_route_scan_kernel[(math.ceil(E / _SCAN_EXPERTS),)](
        # inputs and outputs
        counts,
        # shapes
        blocks, E,
        # constants
        BLOCK_E=_SCAN_EXPERTS, CHUNK=min(1024, next_power_of_2(blocks)), num_warps=8, **launch,
    )  # fmt: skip
    _moe_route_place_kernel[(blocks,)](
        # inputs
        topk_ids, counts,
        # outputs
        slot_of_row, routing.row_of_slot, routing.starts, routing.ends,
        # shapes
        slots, E,
        # constants
        ALIGNMENT=alignment, BLOCK=_BLOCK, CHUNK=32, num_warps=4, **layout, **launch,
    )  # fmt: skip
    return routing


def buffer_rows(slots: int, E: int, *, alignment: int = 1, capacity: int | None = None) -> int:
    """How many rows `route` lays out, which depends on shapes alone.

    Raises:
        InvalidInputError: As `route`.
    """
    if alignment < 1 or (capacity is not None and capacity < 1):
        raise InvalidInputError(f"alignment and capacity must be at least 1, got {alignment=}, {capacity=}")
    if capacity is not None:
        if alignment != 1:
            raise InvalidInputError(f"give an alignment or a capacity, not both; got {alignment=}, {capacity=}")
        return E * capacity
    return math.ceil((slots + min(slots, E) * (alignment - 1)) / alignment) * alignment


def route_torch(topk_ids: Tensor, E: int, *, alignment: int = 1, capacity: int | None = None) -> Routing:
    """As `route`, in torch."""
    rows = buffer_rows(topk_ids.numel(), E, alignment=alignment, capacity=capacity)
    ids = topk_ids.long()
    ids = torch.where((ids >= 0) & (ids < E), ids, E)
    shares = torch.zeros_like(ids, dtype=torch.bool)
    if capacity is not None:
        earlier = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril(-1)
        shares = ((ids[:, :, None] == ids[:, None, :]) & earlier).any(2)
    ids, shares = ids.flatten(), shares.flatten()
    counts = torch.bincount(ids[~shares], minlength=E + 1)[:E]
    if capacity is None:
        spans = (counts + alignment - 1) // alignment * alignment
        starts = spans.cumsum(0) - spans
    else:
        starts = torch.arange(E, device=ids.device) * capacity
    order = ids.argsort(stable=True)
    order = order[ids[order] < E]
    expert, new = ids[order], ~shares[order]
    first = counts.cumsum(0) - counts
    # A slot that shares a row follows the slot that it shares it with.
    rank = new.cumsum(0) - 1 - first[expert]
    if capacity is not None:
        counts = counts.clamp(max=capacity)
        order, expert, new, rank = (values[rank < capacity] for values in (order, expert, new, rank))
    row = starts[expert] + rank
    slot_of_row = torch.full((rows,), -1, dtype=torch.int32, device=ids.device)
    row_of_slot = torch.full((ids.numel(),), -1, dtype=torch.int32, device=ids.device)
    slot_of_row[row[new]] = order[new].int()
    row_of_slot[order] = row.int()
    return Routing(slot_of_row, row_of_slot, starts.int(), (starts + counts).int())
