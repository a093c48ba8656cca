"""A router's choice in one launch, where torch takes about ten: scores, groups, topk, weights."""

from typing import Final

import torch
from torch import Tensor

from moe_dispatch.backends.triton_common.features import on_triton
from moe_dispatch.backends.triton_common.launch_options import next_power_of_2, pdl_option
from moe_dispatch.routers import Router, select_experts_torch

# A warp holds the scores of a token in registers and unrolls the choice; beyond, torch chooses.
MAX_EXPERTS: Final = 512
MAX_TOPK: Final = 16


def select_experts(
    logits: Tensor, router: Router, correction_bias: Tensor | None = None, *, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts: `select_experts_torch` as one kernel, without gradients.

    Nothing synchronises, so it can be captured in a CUDA graph. Larger layers than MAX_EXPERTS and MAX_TOPK, and
    tensors that are not on a GPU, are left to torch. Of equal scores the expert with the lowest id is taken. `pdl`
    launches it as a programmatic dependent of the kernel before (sm_90 and newer).
    """
    M, E = logits.shape
    if not on_triton(logits) or E > MAX_EXPERTS or router.topk > MAX_TOPK:
        return select_experts_torch(logits, router, correction_bias)
    from moe_dispatch.backends.stages.select_experts_kernel import _moe_select_experts_kernel

    logits = logits.contiguous()
    weights = torch.empty(M, router.topk, dtype=torch.float32, device=logits.device)
    ids = torch.empty(M, router.topk, dtype=torch.int32, device=logits.device)
    if not M:
        return weights, ids
    _moe_select_experts_kernel[(M,)](
        # inputs
        logits, correction_bias,
        # outputs
        weights, ids,
        # constants
        SIGMOID=router.scoring == "sigmoid", RENORMALIZE=router.renormalize, SCALE=float(router.scale), E=E,
        TOPK=router.topk, TOPK_POW2=next_power_of_2(router.topk), GROUPS=router.groups,
        GROUPS_POW2=next_power_of_2(router.groups), MEMBERS_POW2=next_power_of_2(E // router.groups),
        TOPK_GROUPS=router.topk_groups, PDL=pdl, num_warps=1, **pdl_option(pdl),
    )  # fmt: skip
    return weights, ids
