"""Activations in the order of columns in which the product with MXFP4 weights reads them."""

import math

from torch import Tensor

from moe_dispatch.backends.triton_common.launch_options import pdl_option

_WORDS = 512  # of four values, for each program


def ordered_width(columns: int, block: int) -> int:
    """Columns of an ordered row: whole blocks."""
    return math.ceil(columns / block) * block


def order_columns(x: Tensor, block: int, *, pdl: bool = False) -> Tensor:
    """Copy rows so that within each block of columns those come first that are 0 modulo 4, then those that are 1, ….

    Args:
        x: 16-bit ``[M, K]``, K a multiple of 4.
        block: Columns of a block.
        pdl: Whether the launch may begin while the kernel before it drains.

    Returns:
        ``[M, ordered_width(K, block)]``; what is past K in the last block is not written.
    """
    from moe_dispatch.backends.triton_persistent.order_columns_kernel import _moe_order_columns_kernel

    M, K = x.shape
    ordered = x.new_empty(M, ordered_width(K, block))
    _moe_order_columns_kernel[(M, math.ceil(K / (4 * _WORDS)))](
        # inputs
        x,
        # outputs
        ordered,
        # shapes
        K, ordered.shape[1],
        # constants
        BLOCK=block, WORDS=_WORDS, PDL=pdl, num_warps=4, **pdl_option(pdl),
    )  # fmt: skip
    return ordered


def order_columns_torch(x: Tensor, block: int) -> Tensor:
    """The same in torch; zeros past K."""
    padded = x.new_zeros(x.shape[0], ordered_width(x.shape[1], block))
    padded[:, : x.shape[1]] = x
    return padded.view(x.shape[0], -1, block // 4, 4).transpose(2, 3).reshape(padded.shape)
