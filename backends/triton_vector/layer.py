"""Both products in one launch, for experts with hardly a token each.

The CTAs of the second product start while the first one ends, with the same tiles as in launches of their own. They
fetch their weights and then wait for the token's intermediate alone, not for the whole grid (see `arrivals_kernel`).
"""

import math
from typing import TYPE_CHECKING, Final

import torch

from moe_dispatch.backends.triton_common.launch_options import as_bytes, next_power_of_2, pdl_option

if TYPE_CHECKING:
    from torch import Tensor

    from moe_dispatch.backends.triton_vector.config import TritonVectorConfig
    from moe_dispatch.experts import ExpertWeights

ARRIVAL_BYTES: Final = 128  # of a token's counter, see `arrivals_kernel`


def cleared_arrivals(M: int, device: torch.device, *, pdl: bool) -> "Tensor":
    """A counter of zero for each token, cleared by a launch of one CTA.

    Args:
        M: Tokens.
        device: Where.
        pdl: Launch as a programmatic dependent of the kernel before.
    """
    from moe_dispatch.backends.triton_vector.arrivals_kernel import _moe_clear_arrivals_kernel

    arrivals = torch.empty(M, ARRIVAL_BYTES // 4, dtype=torch.int32, device=device)
    _moe_clear_arrivals_kernel[(1,)](
        arrivals, TOKENS=M, BLOCK=next_power_of_2(M), PDL=pdl, num_warps=1, **pdl_option(pdl)
    )
    return arrivals


def vector_layer(
    x: "Tensor",
    experts: "ExpertWeights",
    topk_weights: "Tensor",
    topk_ids: "Tensor",
    inner: "Tensor",
    arrivals: "Tensor",
    out: "Tensor",
    config: "TritonVectorConfig",
    *,
    cleared_before: bool = True,
) -> None:
    """Launch both products.

    Args:
        x: ``[M, K]``.
        experts: Checked weights.
        topk_weights: fp32 ``[M, topk]``.
        topk_ids: int32 or int64 ``[M, topk]``.
        inner: ``[M·topk, N]``; written where a slot's id is valid.
        arrivals: int32 zeros ``[M, 32]``, which no other launch may use meanwhile; zeros again afterwards.
        out: ``[M, K]``, written.
        config: Tile sizes; `warps` holds for both products.
        cleared_before: Whether `arrivals` comes from `cleared_arrivals`, launched just before. Then ids and weights are
            read before that launch has ended, since it has waited for all launches before it.
    """
    from moe_dispatch.backends.triton_vector.layer_kernel import _moe_vector_layer_kernel

    M, topk = topk_ids.shape
    columns = config.rows // (2 if experts.gated else 1)
    block_k = min(config.columns, max(128, next_power_of_2(experts.K)))
    block_n = min(config.down_columns, max(128, next_power_of_2(experts.N)))
    together = min(config.down_experts, next_power_of_2(topk))
    grid = (M * (topk * math.ceil(experts.N / columns) + math.ceil(experts.K / config.down_rows)),)
    _moe_vector_layer_kernel[grid](
        # inputs
        x, as_bytes(experts.gate_up), experts.gate_up_scale, experts.gate_up_bias, as_bytes(experts.down),
        experts.down_scale, experts.down_bias, topk_weights, topk_ids,
        # outputs
        inner, arrivals, out,
        # shapes
        M, experts.K, experts.N, experts.E,
        # constants
        TOPK=topk, GATED=experts.gated, INTERLEAVED=experts.interleaved, ACTIVATION=experts.activation,
        COLUMNS=columns, BLOCK_K=block_k, BLOCKS_K=math.ceil(experts.K / block_k), EVEN_N=experts.N % columns == 0,
        ROWS=config.down_rows, EXPERTS=together, BLOCK_N=block_n, BLOCKS_N=math.ceil(experts.N / block_n),
        CLEARED_BEFORE=cleared_before, PDL=config.pdl,
        num_warps=config.warps, **pdl_option(config.pdl),
    )  # fmt: skip
