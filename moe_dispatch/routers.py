"""Routers: from a layer's router logits to each token's experts and their weights, as pure functions in torch.

A *router* scores all experts for a token and chooses topk of them. Two kinds cover the model families in use:

- softmax: a probability for each expert, and the topk most probable ones (Shazeer et al. 2017, arXiv:1701.06538; Switch
  and GShard after it). Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE. Renormalised, the weights are the softmax over the chosen
  logits alone, which is how gpt-oss writes it: e^x / Σ_all e^x over its sum for the chosen is e^x / Σ_chosen e^x.
- sigmoid: a score for each expert by itself, a correction bias that takes part in the choice but not in the weights
  (Wang et al. 2024, arXiv:2408.15664), and a choice limited to a few groups of experts, those with the largest sums of
  their two best (DeepSeek-AI 2024, arXiv:2412.19437, section 2.1.2). DeepSeek-V3, Kimi-K2 and GLM-4.5.

Equal scores go to the lowest index. `torch.topk` leaves their order open, and on a CPU it is none in particular. NaN
counts as the largest score, as in `torch.topk`; so ids are always distinct and inside 0…E-1.
"""

from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from moe_dispatch.activations import FP32_LIMIT
from moe_dispatch.errors import InvalidInputError

Scoring = Literal["softmax", "sigmoid"]
# Added to the sum of sigmoid scores before the division by it, as DeepSeek-V3 does.
SUM_EPSILON: Final = 1e-20


@dataclass(frozen=True)
class Router:
    """How experts are chosen from logits.

    Attributes:
        topk: Experts per token.
        scoring: ``"softmax"`` over all experts, or ``"sigmoid"`` of each.
        renormalize: Whether the weights of the chosen experts are divided by their sum.
        scale: Factor of the weights (DeepSeek's ``routed_scaling_factor``).
        groups: Number of equal groups of consecutive experts; with sigmoid scores only.
        topk_groups: Groups from which a token may choose.
        correction_bias: Whether a bias per expert is added to the scores for the choice; with sigmoid scores only.
        bias: Whether the logits have a bias (gpt-oss).

    Raises:
        InvalidInputError: A number is out of its range, or an option does not belong to the scoring.
    """

    topk: int
    scoring: Scoring = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    topk_groups: int = 1
    correction_bias: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        if self.scoring not in get_args(Scoring):
            raise InvalidInputError(f"scoring must be softmax or sigmoid, got {self.scoring!r}")
        for name in ("topk", "groups", "topk_groups"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InvalidInputError(f"{name} must be an integer of at least 1, got {value!r}")
        number = isinstance(self.scale, int | float) and not isinstance(self.scale, bool)
        if not number or not abs(self.scale) < FP32_LIMIT:
            raise InvalidInputError(f"scale must be a finite number, got {self.scale!r}")
        if self.topk_groups > self.groups:
            raise InvalidInputError(f"topk_groups must be at most groups={self.groups}, got {self.topk_groups}")
        if self.scoring == "softmax" and (self.groups > 1 or self.correction_bias):
            raise InvalidInputError("groups and a correction bias need sigmoid scores, and the scoring is softmax")

    def check(self, E: int) -> None:
        """Refuse a number of experts that this router cannot choose from.

        Raises:
            InvalidInputError: E is no multiple of groups, or too small.
        """
        if E % self.groups or (self.groups > 1 and E // self.groups < 2):
            raise InvalidInputError(f"E={E} experts must divide into groups={self.groups} of two or more")
        eligible = E // self.groups * self.topk_groups
        if self.topk > eligible:
            raise InvalidInputError(f"topk={self.topk} experts cannot be chosen of {eligible} eligible ones")


def select_experts_torch(
    logits: Tensor, router: Router, correction_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts. Differentiable with respect to the logits, through the weights.

    Args:
        logits: ``[M, E]`` of any float dtype.
        router: How to choose.
        correction_bias: fp32 ``[E]``, where the router has one.

    Returns:
        The weights, fp32 ``[M, topk]``, and the ids, int32 ``[M, topk]``, best first.
    """
    if router.scoring == "softmax":
        return softmax_topk(logits, router.topk, renormalize=router.renormalize, scale=router.scale)
    return sigmoid_topk(
        logits,
        router.topk,
        correction_bias=correction_bias,
        groups=router.groups,
        topk_groups=router.topk_groups,
        renormalize=router.renormalize,
        scale=router.scale,
    )


def softmax_topk(logits: Tensor, topk: int, *, renormalize: bool = True, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Softmax over the experts, and the topk most probable (Mixtral, Qwen-MoE; gpt-oss where renormalised).

    The choice is by the logits, whose order is that of the probabilities as long as those do not underflow.

    Args:
        logits: ``[M, E]`` of any float dtype.
        topk: Experts per token.
        renormalize: Whether the weights are divided by their sum.
        scale: Factor of the weights.

    Returns:
        The weights, fp32 ``[M, topk]``, and the ids, int32 ``[M, topk]``, best first.
    """
    logits = logits.float()
    ids = _best(logits, topk)
    # Over the chosen logits alone no sum can underflow, unlike the quotient of two probabilities.
    weights = logits.gather(1, ids).softmax(1) if renormalize else logits.softmax(1).gather(1, ids)
    return weights * scale, ids.int()


def sigmoid_topk(
    logits: Tensor,
    topk: int,
    *,
    correction_bias: Tensor | None = None,
    groups: int = 1,
    topk_groups: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Sigmoid scores, with the choice by corrected scores and limited to groups (DeepSeek-V3).

    Args:
        logits: ``[M, E]`` of any float dtype.
        topk: Experts per token.
        correction_bias: ``[E]``, added to the scores for the choice alone.
        groups: Number of equal groups of consecutive experts.
        topk_groups: Groups to choose from: those whose two best corrected scores have the largest sums.
        renormalize: Whether the weights are divided by their sum.
        scale: Factor of the weights.

    Returns:
        The weights, fp32 ``[M, topk]``, and the ids, int32 ``[M, topk]``, best first.
    """
    scores = logits.float().sigmoid()
    choice = scores.detach() if correction_bias is None else scores.detach() + correction_bias.float()
    if topk_groups < groups:
        grouped = choice.view(choice.shape[0], groups, -1)
        chosen = _best(grouped.topk(2, dim=2).values.sum(2), topk_groups)
        closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, chosen, value=False)
        choice = grouped.masked_fill(closed[..., None], -torch.inf).flatten(1)
    ids = _best(choice, topk)
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(1, keepdim=True) + SUM_EPSILON)
    return weights * scale, ids.int()


def _best(scores: Tensor, count: int) -> Tensor:
    """The indices of the largest along dimension 1; of equals the lowest, for which a stable sort is needed."""
    return scores.detach().sort(dim=1, descending=True, stable=True).indices[:, :count]
