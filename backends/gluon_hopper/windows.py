"""How the Hopper kernels see weights, and activations whose last row may be any, through tensor descriptors.

Imports no Triton until one is made.
"""

import functools
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from moe_dispatch.backends.gluon_hopper.tiles import MXFP4_BLOCK_K, STAGE_BYTES, WINDOW_ROWS
from moe_dispatch.backends.triton_common.descriptors import with_base
from moe_dispatch.numerics import FP8

# A size that bounds no load; it is passed to kernels in 32 bits.
_MOST_WINDOWS: Final = (1 << 31) - 1


def with_window(like: Tensor, rows: int, columns: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Fresh memory ``[rows, columns]``, and the window before its rows, from which `Windows` describes it."""
    memory = like.new_empty(WINDOW_ROWS + rows, columns, dtype=dtype or like.dtype)
    return memory[:WINDOW_ROWS], memory[WINDOW_ROWS:]


class Windows(NamedTuple):
    """A matrix seen as all its runs of 64 successive rows, of which a block has fewer, or all.

    Element ``[b, r, c]`` of the tensor that its descriptor describes is column c of row ``b - 64 + r``, where r is less
    than 64. So a load can be made to end at any row, b, and TMA itself fills in zeros for what lies beyond.

    Attributes:
        rows: Rows of a block, at most 64.
    """

    rows: int

    def describe(self, window: Tensor) -> Any:
        """The tensor descriptor of memory from `with_window`, however many rows it has: no load starts past them."""
        return with_base(_of_windows(window.dtype, window.shape[1], self.rows), window)


class ExpertRows(NamedTuple):
    """Weights ``[E, rows, columns]`` seen as the experts' rows one after the other, in blocks of 128.

    If gate and up rows are interleaved, element ``[h, p, c]`` of the tensor that the descriptor describes is column c
    of the gate row (h = 0) or the up row (h = 1) of pair p, and a block is the gate rows of 64 pairs followed by their
    up rows. If they are stored by columns, it describes ``[E, columns, rows]``, in blocks of 64 by 64.

    Attributes:
        layout: ``"rows"``, or ``"pairs"`` of interleaved gate and up rows, or ``"columns"``.
    """

    layout: Literal["rows", "pairs", "columns"]

    def describe(self, weights: Tensor) -> Any:
        """The tensor descriptor of the weights."""
        if self.layout == "columns":
            return _descriptor(weights.mT, [1, 64])
        if self.layout == "pairs":
            return _descriptor(weights.view(-1, 2, weights.shape[2]).transpose(0, 1), [2, 64])
        return _descriptor(weights.view(-1, weights.shape[2]), [128])


class ExpertCodes(NamedTuple):
    """MXFP4 weights, as `mxfp4_product_kernel` loads them: 64 bytes of each of 128 rows, or of 64 with ``"rows"``.

    Of down a block is successive rows. Of gate and up rows it has those whose columns are stored side by side, every
    other 16: of 128 columns 64, their gate rows followed by their up rows if those alternate, else either.

    Attributes:
        layout: ``"plain"`` of down, or ``"rows"`` of gate_up, or ``"pairs"`` where gate and up rows alternate.
    """

    layout: Literal["plain", "rows", "pairs"]

    def describe(self, weights: Tensor) -> Any:
        """The tensor descriptor of the codes ``[E, rows, columns/2]``."""
        width = weights.shape[2]
        if self.layout == "plain":
            return _descriptor(weights.view(-1, 2, 2, 2, width).transpose(1, 3), [16, 2, 2, 2], MXFP4_BLOCK_K // 2)
        if self.layout == "rows":
            return _descriptor(weights.view(-1, 2, 16, width).transpose(0, 1), [1, 4, 16], MXFP4_BLOCK_K // 2)
        pairs = weights.view(-1, 2, 16, 2, width)
        return _descriptor(pairs.permute(3, 1, 0, 2, 4), [2, 1, 4, 16], MXFP4_BLOCK_K // 2)


def _descriptor(tensor: Tensor, rows: list[int], width: int = STAGE_BYTES) -> Any:
    """Blocks of `rows` and so many bytes of columns."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [*rows, width // tensor.element_size()]
    return TensorDescriptor.from_tensor(tensor, block, _layout(tensor.dtype, tuple(block)))


@functools.cache
def _of_windows(dtype: torch.dtype, columns: int, rows: int) -> Any:
    """The descriptor of the windows in a matrix of this dtype and so many columns, without memory."""
    window = torch.empty(WINDOW_ROWS, columns, dtype=dtype, device="meta")
    descriptor = _descriptor(window.as_strided((1, WINDOW_ROWS, columns), (columns, columns, 1)), [1, rows])
    descriptor.shape = (_MOST_WINDOWS, WINDOW_ROWS, columns)
    return descriptor


@functools.cache
def _layout(dtype: torch.dtype, block: tuple[int, ...]) -> Any:
    from triton.experimental.gluon import language as gl

    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, FP8: gl.float8e4nv, torch.uint8: gl.uint8}[dtype]
    return gl.NVMMASharedLayout.get_default_for(list(block), element)
