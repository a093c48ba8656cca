"""Activations in the orders of columns in which products with MXFP4 weights read them."""

import math
from typing import Final

import torch
from torch import Tensor

from moe_dispatch.backends.stages.route import Routing
from moe_dispatch.backends.triton_common.launch_options import pdl_option

_COLUMNS: Final = 1024  # for each program
# Bits of a column of 128, from the lowest bit of its place upwards. See `gluon_hopper.mxfp4_product_kernel`.
_THREAD_BITS: Final = (2, 5, 6, 3, 0, 1, 4)


def ordered_width(columns: int, block: int) -> int:
    """Columns of an ordered row: whole blocks."""
    return math.ceil(columns / block) * block


def order_columns(
    x: Tensor, block: int, *, by_threads: bool = False, routing: Routing | None = None, topk: int = 1,
    out: Tensor | None = None, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """Copy rows, the columns within each block in another order.

    First come those that are 0 modulo 4, then those that are 1, …. With `by_threads` a place has the column that a
    thread of gluon_hopper's product loads for it.

    Args:
        x: 16-bit ``[M, K]``, contiguous.
        block: Columns of a block; 128 with `by_threads`.
        by_threads: Which order.
        routing: Copy each row to all rows of its token, which are in the order of experts. Rows without a slot are left
            unwritten.
        topk: Experts per token.
        out: Contiguous ``[rows, ordered_width(K, block)]`` to write to; fresh memory if None.
        pdl: Whether the launch may begin while the kernel before it drains.

    Returns:
        ``[M or rows, ordered_width(K, block)]``, with zeros for columns past K.
    """
    from moe_dispatch.backends.stages.order_columns_kernel import _moe_order_columns_kernel

    M, K = x.shape
    width = ordered_width(K, block)
    if out is None:
        out = x.new_empty(M if routing is None else routing.slot_of_row.shape[0], width)
    _moe_order_columns_kernel[(M, math.ceil(width / _COLUMNS))](
        # inputs
        x, None if routing is None else routing.row_of_slot,
        # outputs
        out,
        # shapes
        K, width,
        # constants
        BLOCK=block, BY_THREADS=by_threads, TOPK=topk, COLUMNS=_COLUMNS, PDL=pdl, num_warps=4, **pdl_option(pdl),
    )  # fmt: skip
    return out


def order_columns_torch(x: Tensor, block: int, *, by_threads: bool = False) -> Tensor:
    """The same in torch, without a routing."""
    padded = x.new_zeros(x.shape[0], ordered_width(x.shape[1], block))
    padded[:, : x.shape[1]] = x
    if not by_threads:
        return padded.view(x.shape[0], -1, block // 4, 4).transpose(2, 3).reshape(padded.shape)
    order = [sum((place >> at & 1) << bit for at, bit in enumerate(_THREAD_BITS)) for place in range(block)]
    places = torch.tensor(order, dtype=torch.int64, device=x.device)
    return padded.view(x.shape[0], -1, block)[:, :, places].reshape(padded.shape)
