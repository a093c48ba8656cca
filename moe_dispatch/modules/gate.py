"""The gate of an MoE layer: router logits, and the choice of experts."""

import functools
import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from moe_dispatch.backends.stages.router_logits import router_logits, router_logits_torch
from moe_dispatch.backends.stages.select_experts import select_experts
from moe_dispatch.backends.triton_common.features import features
from moe_dispatch.dispatch.gradients import is_any_recorded
from moe_dispatch.dispatch.internals import is_tracing
from moe_dispatch.machine import Machine
from moe_dispatch.modules.kept_dtype import keeping_dtype
from moe_dispatch.routers import Router, select_experts_torch


class Gate(nn.Module):
    """Chooses experts for each token; the names of its tensors are those of transformers.

    Logits are in fp32 whatever the weights' dtype: BF16 logits would make near experts equal. Where a gradient is
    needed, and under torch.compile, torch makes the choice; elsewhere one kernel does.

    Args:
        K: Hidden size.
        E: Experts.
        router: How to choose.
        dtype: Dtype of weight and bias.
        device: Device of all tensors.

    Attributes:
        weight: ``[E, K]``.
        bias: ``[E]``, or None.
        e_score_correction_bias: fp32 ``[E]``, or None. A buffer: it is trained by counting tokens, not by gradients
            (arXiv:2408.15664), and stays in fp32 whatever `Module.to` asks for.
    """

    def __init__(
        self,
        K: int,
        E: int,
        router: Router,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        router.check(E)
        self.router = router
        self.weight = nn.Parameter(torch.empty(E, K, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(E, dtype=dtype, device=device)) if router.bias else None
        correction = torch.empty(E, dtype=torch.float32, device=device) if router.correction_bias else None
        self.e_score_correction_bias: Tensor | None
        self.register_buffer("e_score_correction_bias", correction)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weight as `nn.Linear` does, and the biases to zero."""
        nn.init.uniform_(self.weight, -1 / math.sqrt(self.weight.shape[1]), 1 / math.sqrt(self.weight.shape[1]))
        for bias in (self.bias, self.e_score_correction_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose experts.

        Args:
            hidden_states: ``[M, K]``.

        Returns:
            The weights, fp32 ``[M, topk]``; the ids, int32 ``[M, topk]``; the logits, fp32 ``[M, E]``.
        """
        correction = self.e_score_correction_bias
        parameters = (self.weight, self.bias)
        if torch.compiler.is_compiling() or is_tracing() or is_any_recorded((hidden_states, *self.parameters())):
            logits = router_logits_torch(hidden_states, *parameters)
            weights, ids = select_experts_torch(logits, self.router, correction)
        else:
            pdl = hidden_states.is_cuda and _launches_dependents(hidden_states.device)
            logits = router_logits(hidden_states, *parameters, pdl=pdl)
            weights, ids = select_experts(logits, self.router, correction, pdl=pdl)
        return weights, ids, logits

    def extra_repr(self) -> str:
        """The router's options."""
        return f"K={self.weight.shape[1]}, E={self.weight.shape[0]}, {self.router}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(keeping_dtype(fn, (self.e_score_correction_bias,)), recurse)  # type: ignore[no-untyped-call]
        return self


@functools.cache
def _launches_dependents(device: torch.device) -> bool:
    return features(Machine.inspect(device)).pdl
