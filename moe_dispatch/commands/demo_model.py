"""The demo's model: a Qwen3-MoE of transformers with random weights."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from moe_dispatch.experts import ExpertWeights
from moe_dispatch.problem import DType
from moe_dispatch.workloads import Workload, torch_dtype

SEED: Final = 0


def build_model(layer: Workload, layers: int, dtype: DType, place: torch.device) -> Any:
    """A Qwen3-MoE with `layers` decoder layers whose experts have the shape of `layer`."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from moe_dispatch.integrations.transformers import register

    register()
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=layer.K,
        num_hidden_layers=layers,
        num_attention_heads=max(layer.K // 64, 1),
        num_key_value_heads=max(layer.K // 256, 1),
        head_dim=64,
        num_experts=layer.E,
        num_experts_per_tok=layer.topk,
        moe_intermediate_size=layer.N,
        intermediate_size=layer.N,
        max_position_embeddings=1024,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(SEED)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch_dtype(dtype))
    try:
        with place:
            built = Qwen3MoeForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for weight in built.parameters():
            if weight.dim() == 3:  # transformers draws experts so small that their output would drown
                weight.normal_(std=weight.shape[-1] ** -0.5)
    return built


def generate(built: Any, prompt: Tensor, tokens: int, implementation: str, tick: Callable[[], None]) -> Tensor:
    """Generate greedily with one implementation of the experts; `tick` is called once a token.

    Returns:
        int64 ``[1, prompt + tokens]``.
    """
    built.set_experts_implementation(implementation)
    out: Tensor = built.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=False,
        streamer=_Ticker(tick),
    )
    return out


class _Ticker:
    """A transformers streamer that counts tokens and keeps none."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self._tick = tick
        self._prompt_seen = False

    def put(self, _: Tensor) -> None:
        if self._prompt_seen:
            self._tick()
        self._prompt_seen = True

    def end(self) -> None:
        """Required by transformers; nothing is buffered."""


def compare_logits(built: Any, ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Compare the dispatched model's logits with the model's own, over the model's own sequence.

    Returns:
        Relative error of the logits; and, where the tokens first differ, how much the model's own logits prefer its own
        token, as a share of their root mean square (0 where none differ).
    """
    with torch.no_grad():
        built.set_experts_implementation("eager")
        own = built(theirs).logits.float()
        built.set_experts_implementation("moe_dispatch")
        dispatched = built(theirs).logits.float()
    gap = 0.0
    differing = (ours != theirs)[0].nonzero()
    if len(differing):
        at = int(differing[0])
        row = own[0, at - 1]
        gap = float((row[theirs[0, at]] - row[ours[0, at]]) / row.square().mean().sqrt())
    return float((dispatched - own).norm() / own.norm()), gap


def first_experts(built: Any) -> ExpertWeights:
    """The weights of the first MoE layer, not copied."""
    first = built.model.layers[0].mlp.experts
    return ExpertWeights(first.gate_up_proj.detach(), first.down_proj.detach())
