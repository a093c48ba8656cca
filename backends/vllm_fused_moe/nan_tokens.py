"""NaN in a token, carried past a library that drops it."""

from typing import Final

import torch
from torch import Tensor

from moe_dispatch.backends.stages.mask_slots import mask_slots_torch
from moe_dispatch.backends.triton_common.features import on_triton

# Elements that a program reads at a time: 32 for each of its 128 threads.
_MAX_BLOCK: Final = 4096


def mark_nan_tokens(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, E: int, masked: int, *, infinite: bool
) -> tuple[Tensor, Tensor]:
    """Give the slots of a token with a NaN the router weight NaN, and mask foreign ids as `mask_slots` does.

    The weight multiplies the whole row of a slot, so the token's output is NaN, whatever the library made of its input.

    Args:
        hidden_states: ``[M, K]``, contiguous.
        topk_weights: fp32 ``[M, topk]``.
        topk_ids: int32 or int64 ``[M, topk]``.
        E: Experts.
        masked: What takes the place of ids outside 0…E-1.
        infinite: Whether a token with an infinite element counts too.

    Returns:
        Weights, fp32 ``[M, topk]``, and ids, int32 ``[M, topk]``, both fresh memory.
    """
    if not on_triton(hidden_states):
        return mark_nan_tokens_torch(hidden_states, topk_weights, topk_ids, E, masked, infinite=infinite)
    from moe_dispatch.backends.vllm_fused_moe.nan_tokens_kernel import _moe_mark_nan_tokens_kernel

    (M, topk), K = topk_ids.shape, hidden_states.shape[1]
    weights = torch.empty(topk_weights.shape, dtype=torch.float32, device=topk_weights.device)
    ids = torch.empty(topk_ids.shape, dtype=torch.int32, device=topk_ids.device)
    _moe_mark_nan_tokens_kernel[(M,)](
        # inputs
        hidden_states, topk_weights, topk_ids,
        # outputs
        weights, ids,
        # shapes
        K, E, masked,
        # constants
        INFINITE=infinite, TOPK=topk, TOPK_POW2=1 << (topk - 1).bit_length(),
        BLOCK=min(_MAX_BLOCK, max(128, 1 << (K - 1).bit_length())), num_warps=4,
    )  # fmt: skip
    return weights, ids


def mark_nan_tokens_torch(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, E: int, masked: int, *, infinite: bool
) -> tuple[Tensor, Tensor]:
    """The same in torch; the reference of `mark_nan_tokens`."""
    spoilt = ~hidden_states.isfinite() if infinite else hidden_states.isnan()
    weights = topk_weights.masked_fill(spoilt.any(dim=1, keepdim=True), torch.nan)
    return weights, mask_slots_torch(topk_ids, E, masked)
