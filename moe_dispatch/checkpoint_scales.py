"""FP8 scales of checkpoints that are not per block: one for each row of a weight, or one for all of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_dispatch.errors import InvalidInputError


def in_fp32(scale: Tensor, what: str) -> Tensor:
    """Multipliers as fp32, the values unchanged.

    Args:
        scale: Of a floating-point dtype, float8_e8m0fnu included.
        what: Names the scale in a message.

    Raises:
        InvalidInputError: They are integers, such as the exponents of E8M0 stored as uint8, which are no multipliers.
    """
    if not scale.is_floating_point():
        raise InvalidInputError(
            f"{what} must hold multipliers of a floating-point dtype, got {scale.dtype}; exponents of E8M0 must be "
            "stored as float8_e8m0fnu"
        )
    return scale.to(torch.float32)


def row_scales(scale: Tensor, rows: int, what: str) -> Tensor:
    """The scales of a single weight's rows, which may be one for all of them: fp32 ``[rows]``.

    Args:
        scale: ``[rows, 1]`` or ``[rows]``; or ``[1, 1]``, ``[1]`` or ``[]``.
        rows: Rows of the weight.
        what: Names the scale in a message.

    Raises:
        InvalidInputError: The scale has another shape, or an integer dtype.
    """
    shape = tuple(scale.shape)
    if shape not in {(rows, 1), (rows,), (1, 1), (1,), ()}:
        raise InvalidInputError(
            f"{what} must be {[rows, 1]}, one scale for each row, or one for all, to go with the others, "
            f"got {list(shape)}"
        )
    return in_fp32(scale, what).reshape(-1).expand(rows)


def fused_row_scales(scale: Tensor, E: int, rows: int, spans: Sequence[slice], what: str) -> Tensor:
    """The scales of all experts' weights in a form that `ExpertWeights` takes, less the rows of other processes.

    Args:
        scale: ``[E, rows, 1]``, ``[E, 1, rows]`` or ``[E, rows]``; fewer scales of an expert than rows; or one scale.
        E: Experts.
        rows: Rows of an expert's weight in the checkpoint.
        spans: The rows to keep, in their order.
        what: Names the scale in a message.

    Returns:
        fp32 ``[E, rows that are kept]``, or ``[E, scales of an expert]``.
    """
    scale = in_fp32(scale, what)
    each = scale.reshape(1, 1).expand(E, 1) if scale.numel() == 1 else scale.reshape(*scale.shape, 1).flatten(1)
    if each.shape[1] == rows:
        each = torch.cat([each[:, span] for span in spans], dim=1)
    return each.contiguous()
