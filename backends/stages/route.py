"""Routing: which row of the token buffer holds which slot, decided on the device."""

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from moe_dispatch.errors import InvalidInputError

from ..triton_support import on_triton

# Up to here one program per expert reads every id; beyond, that reading costs more than a second launch.
FEW_SLOTS: Final = 4096
_BLOCK: Final = 512


@dataclass(frozen=True, slots=True)
class Routing:
    """Where each slot's row is, and each row's slot. Slots are numbered m·topk + j.

    Attributes:
        slot_of_row: int32 ``[rows]``: the slot in each row; -1 in padding and in the unused tail.
        row_of_slot: int32 ``[M·topk]``: the row of each slot; -1 where the id is outside 0…E-1.
        starts: int32 ``[E]``: first row of each expert.
        ends: int32 ``[E]``: one past the last real row of each expert.
    """

    slot_of_row: Tensor
    row_of_slot: Tensor
    starts: Tensor
    ends: Tensor


def route(topk_ids: Tensor, E: int, *, alignment: int = 1, capacity: int | None = None, pdl: bool = False) -> Routing:
    """Give every slot a row, rows of one expert side by side and in the order of their slots.

    Nothing depends on routing values on the host, so it can be captured in a CUDA graph. The order of rows is a
    function of the ids alone: the same call gives the same rows.

    Args:
        topk_ids: int32 or int64 ``[M, topk]``; ids outside 0…E-1 get no row.
        E: Experts.
        alignment: Each expert starts at the end of the previous one rounded up to this (DeepGEMM's psum layout). The
            buffer has rows for the worst case, M·topk + min(M·topk, E)·(alignment - 1), rounded up.
        capacity: Instead, expert e owns rows e·capacity … (e + 1)·capacity (DeepGEMM's masked layout). A slot that
            does not fit gets no row and is lost: M is enough where no token names an expert twice, M·topk always.
        pdl: Launch as a programmatic dependent of the kernel before (sm_90).

    Raises:
        InvalidInputError: Both an alignment and a capacity were asked for, or one of them is below 1.
    """
    if not on_triton(topk_ids):
        return route_torch(topk_ids, E, alignment=alignment, capacity=capacity)
    from .route_kernel import _moe_route_count_kernel, _moe_route_kernel, _moe_route_place_kernel

    slots = topk_ids.numel()
    rows = buffer_rows(slots, E, alignment=alignment, capacity=capacity)
    routing = Routing(*(topk_ids.new_empty(length, dtype=torch.int32) for length in (rows, slots, E, E)))
    e_pow2 = 1 << (E - 1).bit_length()
    launch = {"launch_pdl": True} if pdl else {}
    if slots <= FEW_SLOTS:
        _moe_route_kernel[(E,)](
            # inputs
            topk_ids,
            # outputs
            routing.slot_of_row, routing.row_of_slot, routing.starts, routing.ends,
            # shapes
            slots, rows, E,
            # constants
            ALIGNMENT=alignment, CAPACITY=capacity or 0, E_POW2=e_pow2, BLOCK=_block(slots), PDL=pdl,
            num_warps=4, **launch,
        )  # fmt: skip
        return routing
    blocks = math.ceil(slots / _BLOCK)
    counts = topk_ids.new_empty(blocks, E, dtype=torch.int32)
    _moe_route_count_kernel[(blocks,)](
        # inputs
        topk_ids,
        # outputs
        counts, routing.slot_of_row,
        # shapes
        slots, rows, E,
        # constants
        E_POW2=e_pow2, BLOCK=_BLOCK, PDL=pdl, num_warps=4, **launch,
    )  # fmt: skip
    _moe_route_place_kernel[(blocks,)](
        # inputs
        topk_ids, counts,
        # outputs
        routing.slot_of_row, routing.row_of_slot, routing.starts, routing.ends,
        # shapes
        slots, E,
        # constants
        ALIGNMENT=alignment, CAPACITY=capacity or 0, E_POW2=e_pow2, BLOCK=_BLOCK, CHUNK=16, PDL=pdl,
        num_warps=8, **launch,
    )  # fmt: skip
    return routing


def _block(slots: int) -> int:
    return min(1024, max(32, 1 << (slots - 1).bit_length()))


def buffer_rows(slots: int, E: int, *, alignment: int = 1, capacity: int | None = None) -> int:
    """Rows of the token buffer that `route` lays out: a function of shapes alone."""
    if alignment < 1 or (capacity is not None and capacity < 1):
        raise InvalidInputError(f"alignment and capacity must be at least 1, got {alignment=}, {capacity=}")
    if capacity is not None:
        if alignment != 1:
            raise InvalidInputError(f"give an alignment or a capacity, not both; got {alignment=}, {capacity=}")
        return E * capacity
    return math.ceil((slots + min(slots, E) * (alignment - 1)) / alignment) * alignment


def route_torch(topk_ids: Tensor, E: int, *, alignment: int = 1, capacity: int | None = None) -> Routing:
    """The same in torch; the reference of `route`."""
    rows = buffer_rows(topk_ids.numel(), E, alignment=alignment, capacity=capacity)
    ids = topk_ids.reshape(-1).long()
    ids = torch.where((ids >= 0) & (ids < E), ids, E)
    counts = torch.bincount(ids, minlength=E + 1)[:E]
    if capacity is None:
        spans = (counts + alignment - 1) // alignment * alignment
        starts = spans.cumsum(0) - spans
    else:
        starts = torch.arange(E, device=ids.device) * capacity
    order = ids.argsort(stable=True)[: int(counts.sum())]
    expert = ids[order]
    first = counts.cumsum(0) - counts
    rank = torch.arange(order.numel(), device=ids.device) - first[expert]
    if capacity is not None:
        counts = counts.clamp(max=capacity)
        order, expert, rank = (values[rank < capacity] for values in (order, expert, rank))
    row = starts[expert] + rank
    slot_of_row = torch.full((rows,), -1, dtype=torch.int32, device=ids.device)
    row_of_slot = torch.full((ids.numel(),), -1, dtype=torch.int32, device=ids.device)
    slot_of_row[row] = order.int()
    row_of_slot[order] = row.int()
    return Routing(slot_of_row, row_of_slot, starts.int(), (starts + counts).int())
