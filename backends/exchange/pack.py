"""Rows, ids and weights of one rank's tokens in one block of memory, so that one all-gather carries all three.

A segment is ``[capacity + spare, K]``: the rows, and after them the slots in so many further rows as they need. The
segments of all ranks after one another are then rows that the experts read in place: the spare ones have no expert.
"""

import math
from typing import Final

import torch
from torch import Tensor

from moe_dispatch.backends.triton_common.features import on_triton
from moe_dispatch.backends.triton_common.launch_options import next_power_of_2

WORD: Final = 8  # bytes that a thread copies at a time, in pairs
_MAX_PROGRAMS: Final = 1024
_SLOT_BYTES: Final = 8  # an int32 id and an fp32 weight


def spare_rows(capacity: int, topk: int, row_bytes: int) -> int:
    """How many rows the slots of so many tokens take."""
    return math.ceil(capacity * topk * _SLOT_BYTES / row_bytes)


def pack_tokens(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, segment: Tensor, *, capacity: int, E: int
) -> None:
    """Write this rank's tokens into its segment.

    Args:
        hidden_states: ``[M, K]``, contiguous, of rows that are multiples of 16 bytes.
        topk_weights: ``[M, topk]``, contiguous, any float dtype; they travel in fp32.
        topk_ids: int32 or int64 ``[M, topk]``, contiguous; they travel as int32, and ids outside 0…E-1 as -1.
        segment: ``[capacity + spare_rows, K]`` in hidden_states' dtype, contiguous and aligned to 16 bytes; written,
            except for rows from M to `capacity`, whose ids are -1.
        capacity: Greatest M of any rank.
        E: Experts of the whole layer.
    """
    if not on_triton(segment):
        pack_tokens_torch(hidden_states, topk_weights, topk_ids, segment, capacity=capacity, E=E)
        return
    from moe_dispatch.backends.exchange.pack_kernel import _moe_pack_tokens_kernel

    M, topk = topk_ids.shape
    row_words = hidden_states.shape[1] * hidden_states.element_size() // WORD
    block = 512 if capacity * row_words <= 1 << 16 else 2048
    programs = min(_MAX_PROGRAMS, math.ceil(capacity * max(row_words, topk) / block))
    _moe_pack_tokens_kernel[(programs,)](
        # inputs
        aligned(hidden_states), topk_weights, topk_ids,
        # outputs
        segment,
        # shapes
        M, capacity, row_words, topk, E,
        # constants
        BLOCK=block, num_warps=8 if block == 512 else 16,
    )  # fmt: skip


def unpack_slots(wire: Tensor, *, ranks: int, capacity: int, topk: int, first_expert: int) -> tuple[Tensor, Tensor]:
    """The weights and ids of every row of the gathered segments.

    Args:
        wire: ``[ranks·(capacity + spare_rows), K]``, the segments of all ranks.
        ranks: How many they are.
        capacity: As for `pack_tokens`.
        topk: Experts per token.
        first_expert: The global id of this rank's first expert.

    Returns:
        fp32 weights and int32 ids, ``[rows of wire, topk]``; ids are numbered from `first_expert`, negative or too
        great where the expert is elsewhere. Spare rows, and those beyond a rank's tokens, have ids of -1.
    """
    rows = wire.shape[0]
    if not on_triton(wire):
        return unpack_slots_torch(wire, ranks=ranks, capacity=capacity, topk=topk, first_expert=first_expert)
    from moe_dispatch.backends.exchange.pack_kernel import _moe_unpack_slots_kernel

    weights = torch.empty(rows, topk, dtype=torch.float32, device=wire.device)
    ids = torch.empty(rows, topk, dtype=torch.int32, device=wire.device)
    block = min(512, next_power_of_2(rows * topk))
    _moe_unpack_slots_kernel[(math.ceil(rows * topk / block),)](
        # inputs
        wire,
        # outputs
        weights, ids,
        # shapes
        rows, capacity, rows // ranks, wire.shape[1] * wire.element_size() // WORD, topk, first_expert,
        # constants
        BLOCK=block, num_warps=max(1, block // 128),
    )  # fmt: skip
    return weights, ids


def pack_tokens_torch(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, segment: Tensor, *, capacity: int, E: int
) -> None:
    """As `pack_tokens`, in torch."""
    M, topk = topk_ids.shape
    segment[:M] = hidden_states
    slots = segment[capacity:].view(torch.int32).flatten()[: 2 * capacity * topk].view(2, capacity, topk)
    slots[0] = -1
    slots[0, :M] = torch.where((topk_ids >= 0) & (topk_ids < E), topk_ids, -1).int()
    slots[1, :M] = topk_weights.float().view(torch.int32)


def unpack_slots_torch(
    wire: Tensor, *, ranks: int, capacity: int, topk: int, first_expert: int
) -> tuple[Tensor, Tensor]:
    """As `unpack_slots`, in torch."""
    segments = wire.view(ranks, -1, wire.shape[1])
    slots = segments[:, capacity:].reshape(ranks, -1).view(torch.int32)[:, : 2 * capacity * topk]
    slots = slots.reshape(ranks, 2, capacity, topk)
    ids = torch.full((ranks, segments.shape[1], topk), -1, dtype=torch.int32, device=wire.device)
    weights = torch.zeros(ids.shape, dtype=torch.float32, device=wire.device)
    ids[:, :capacity] = torch.where(slots[:, 0] < 0, -1, slots[:, 0] - first_expert)
    weights[:, :capacity] = slots[:, 1].contiguous().view(torch.float32)
    return weights.flatten(0, 1), ids.flatten(0, 1)


def aligned(rows: Tensor) -> Tensor:
    """The same rows at an address that is a multiple of 16."""
    return rows.clone() if rows.data_ptr() % (2 * WORD) else rows
