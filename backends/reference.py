"""The loop over experts in torch, for any device and dtype, with autograd.

Every other backend is compared with it, and it runs where no other can.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dispatch.backend import Backend, BackendConfig, Requirements
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.numerics import QuantizedRows, activate_torch, dequantize, round_rows_through_fp8
from moe_dispatch.problem import MX_BLOCK, MoEProblem


class ReferenceConfig(BackendConfig):
    """Options of the reference.

    Attributes:
        compute_fp32: Multiply in fp32 whatever the dtype of the weights, as is always done on a CPU, for FP16 and
            for quantised weights. The result is the one that other backends are compared with.
        quantize_activations: With FP8 weights, quantise activations as the fast backends do: per token and 128 columns
            with block FP8, per token with per-channel FP8. False keeps them as they are, which shows what that
            quantisation costs in accuracy.
    """

    compute_fp32: bool = False
    quantize_activations: bool = True


class ReferenceBackend(Backend):
    """Each expert's tokens gathered, two matrix products, scattered back with their weights; sums in fp32."""

    name = "reference"
    requirements = Requirements(
        dtypes={"bf16": (0, 0), "fp16": (0, 0), "fp32": (0, 0), "fp8": (0, 0), "fp8_channel": (0, 0), "mxfp4": (0, 0)},
        act_dtypes=frozenset({"bf16", "fp16", "fp32"}),
        multiples={"mxfp4": {"K": MX_BLOCK, "N": MX_BLOCK}},
        cpu=True,
        bias=True,
        interleaved=True,
        transposed=True,
        grad=True,
        capturable=False,  # the host reads which experts were chosen
    )
    config_type = ReferenceConfig
    tolerance: ClassVar = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-5, "fp8": 1e-2, "fp8_channel": 1e-2, "mxfp4": 1e-2}
    needs_probe = False

    def run(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,
    ) -> Tensor:
        """See `Backend.run`."""
        assert isinstance(config, ReferenceConfig)  # noqa: S101 - the dispatcher made it from config_type
        out = _summed(hidden_states, experts, topk_weights, topk_ids, config)
        if torch.is_grad_enabled() and not out.requires_grad:
            out = out + _zero(hidden_states, topk_weights, experts)
        return out.to(hidden_states.dtype)

    def workspace_bytes(self, problem: MoEProblem, config: BackendConfig) -> int:
        """See `Backend.workspace_bytes`: the worst routing names one expert in every slot. All counts as fp32."""
        weights = (problem.gate_up_rows + problem.N) * problem.K
        copies = 2 if problem.quantized else 0 if problem.act_dtype == "fp32" else 1
        row = 2 * (problem.K + problem.N) + problem.gate_up_rows  # an expert's tokens, and what it computes of them
        sums = 2 * problem.M * problem.K  # the one so far, and the next
        return 4 * (copies * weights + problem.slots * row + sums)

    def takes_quantized_rows(self, problem: MoEProblem) -> bool:
        """See `Backend.takes_quantized_rows`."""
        return True

    def run_into(
        self,
        hidden_states: Tensor | QuantizedRows,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,
        out: Tensor,
    ) -> Tensor:
        """See `Backend.run_into`."""
        if isinstance(hidden_states, Tensor):
            return super().run_into(hidden_states, experts, topk_weights, topk_ids, config, out)
        assert isinstance(config, ReferenceConfig)  # noqa: S101 - the dispatcher made it from config_type
        return out.copy_(_summed(hidden_states, experts, topk_weights, topk_ids, config))


def _summed(
    rows: Tensor | QuantizedRows, experts: ExpertWeights, topk_weights: Tensor, topk_ids: Tensor,
    config: ReferenceConfig,
) -> Tensor:  # fmt: skip
    """The layer's output in fp32."""
    tokens = rows if isinstance(rows, Tensor) else rows.dequantized()
    out = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
    for e in _hit_experts(topk_ids, experts.E):
        token, choice = torch.where(topk_ids == e)
        result = _expert(tokens[token], experts, e, config, quantized=tokens is not rows)
        out = out.index_add(0, token, result.float() * topk_weights[token, choice, None])
    return out


def _zero(hidden_states: Tensor, topk_weights: Tensor, experts: ExpertWeights) -> Tensor | float:
    """Zero, as a function of all that requires a gradient: without any slot, the result is still in its graph."""
    zero: Tensor | float = 0.0
    biases = (experts.gate_up_bias, experts.down_bias)
    for tensor in (hidden_states, topk_weights, experts.gate_up, experts.down, *biases):
        if tensor is not None and tensor.requires_grad:
            zero = zero + 0.0 * tensor.flatten()[:1].float().nan_to_num(0.0, 0.0, 0.0).sum()
    return zero


def _hit_experts(topk_ids: Tensor, E: int) -> list[int]:
    hit: list[int] = torch.unique(topk_ids).tolist()
    return [e for e in hit if 0 <= e < E]


def _expert(tokens: Tensor, experts: ExpertWeights, e: int, config: ReferenceConfig, *, quantized: bool) -> Tensor:
    gate_up, down = weights_of_expert(experts, e)
    # FP16 always: what an expert puts out may exceed its range where the weighted sum does not. On a CPU always: this
    # backend must not end the process, as products in BF16 do on virtual machines that announce AMX and lack it.
    if config.compute_fp32 or experts.quantized or experts.dtype == "fp16" or tokens.device.type == "cpu":
        tokens, gate_up, down = tokens.float(), gate_up.float(), down.float()
    quantize, per_token = experts.fp8 and config.quantize_activations, experts.dtype == "fp8_channel"
    if quantize and not quantized:
        tokens = round_rows_through_fp8(tokens, per_token=per_token)
    up_bias = None if experts.gate_up_bias is None else experts.gate_up_bias[e].to(tokens.dtype)
    down_bias = None if experts.down_bias is None else experts.down_bias[e].to(tokens.dtype)
    inner = activate_torch(F.linear(tokens, gate_up, up_bias), experts.activation, interleaved=experts.interleaved)
    if quantize:
        inner = round_rows_through_fp8(inner, per_token=per_token)
    return F.linear(inner, down, down_bias)


def weights_of_expert(experts: ExpertWeights, e: int) -> tuple[Tensor, Tensor]:
    """gate_up ``[2N, K]`` and down ``[K, N]`` of one expert; quantised ones are dequantised to fp32."""
    if experts.gate_up_scale is None or experts.down_scale is None:
        return experts.gate_up[e], experts.down[e]
    return (
        dequantize(experts.gate_up[e], experts.gate_up_scale[e]),
        dequantize(experts.down[e], experts.down_scale[e]),
    )
