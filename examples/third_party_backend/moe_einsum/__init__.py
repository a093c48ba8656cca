"""A backend of another package: every expert for every token, which is fast where experts are few and small."""

import torch
from torch import Tensor

from moe_dispatch.backend import Backend, BackendConfig, Requirements
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.numerics import activate_torch
from moe_dispatch.problem import MoEProblem

MOST_EXPERTS = 16


class EinsumBackend(Backend):
    """Three einsums over all experts, weighted by what the router chose."""

    name = "einsum"
    requirements = Requirements(
        dtypes={"fp32": (0, 0)}, act_dtypes=frozenset({"fp32"}), cpu=True, bias=True, interleaved=True
    )

    def further_reasons(self, problem: MoEProblem) -> tuple[str, ...]:
        """Each reason names the limit and the value, for `moe-dispatch explain`."""
        if problem.E <= MOST_EXPERTS:
            return ()
        return (f"computes every expert for every token: at most E={MOST_EXPERTS}, got E={problem.E}",)

    def run(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,  # noqa: ARG002 - there are no options
    ) -> Tensor:
        """See `Backend.run`."""
        M, E = hidden_states.shape[0], experts.E
        gate_up = torch.einsum("mk,erk->mer", hidden_states, experts.gate_up)
        if experts.gate_up_bias is not None:
            gate_up = gate_up + experts.gate_up_bias
        inner = activate_torch(gate_up, experts.activation, interleaved=experts.interleaved)
        outer = torch.einsum("men,ekn->mek", inner, experts.down)
        if experts.down_bias is not None:
            outer = outer + experts.down_bias
        # An id outside 0…E-1 adds nothing: its weight goes to a column that is left out.
        valid = (topk_ids >= 0) & (topk_ids < E)
        columns = torch.where(valid, topk_ids, E).long()
        shares = torch.zeros(M, E + 1, device=hidden_states.device).scatter_add(1, columns, topk_weights)[:, :E]
        # Of experts that a token did not choose not even a NaN may count.
        outer = torch.where(shares[:, :, None] == 0, 0.0, outer * shares[:, :, None])
        return outer.sum(1)
