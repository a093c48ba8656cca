"""Models and layers of transformers, tiny and with random weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.17")

from moe_dispatch.dispatch.process import stats  # noqa: E402
from moe_dispatch.experts import ExpertWeights  # noqa: E402

# ‖out − own‖ / ‖own‖: fp32 differs by the order of sums, BF16 by what each rounds (eager sums in BF16).
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def qwen3(**changes: Any) -> Any:
    own = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    return transformers.Qwen3MoeConfig(**{**SMALL, **own, "intermediate_size": 64, **changes})


def mixtral() -> Any:
    return transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, intermediate_size=64)


def deepseek_v3() -> Any:
    return transformers.DeepseekV3Config(
        **SMALL, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, intermediate_size=64, n_group=2,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=16,
    )  # fmt: skip


def gpt_oss() -> Any:
    return transformers.GptOssConfig(
        **SMALL, head_dim=16, num_local_experts=4, num_experts_per_tok=2, intermediate_size=32
    )


def build(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 3:
                weight.normal_(std=0.2)
    return model


def logits(model: Any, implementation: str) -> Tensor:
    model.set_experts_implementation(implementation)
    ids = torch.arange(1, 12)[None]
    out: Tensor = model(ids).logits.detach().float()
    return out


def eager(module: Any, call: tuple[Tensor, ...]) -> Tensor:
    """What a layer of experts, or a module of such layers, computes by its own forward."""
    configs = [each.config for each in module.modules() if hasattr(each, "config")]
    for config in configs:
        config._experts_implementation = "eager"
    out: Tensor = module(*call)
    for config in configs:
        config._experts_implementation = "moe_dispatch"
    return out


def experts_of(model: Any) -> Any:
    return next(module for module in model.modules() if type(module).__name__.endswith("Experts"))


def layer(config: Any, implementation: str = "moe_dispatch") -> Any:
    """One layer of experts of Qwen3-MoE or gpt-oss, by its configuration, without the model around it."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config._experts_implementation = implementation
    module = (GptOssExperts if isinstance(config, transformers.GptOssConfig) else Qwen3MoeExperts)(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=0.2)
    return module.eval()


def call_of(module: Any, M: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments of a call of a layer of experts: hidden_states, top_k_index, top_k_weights."""
    dtype, device = module.down_proj.dtype, module.down_proj.device
    if dtype.itemsize == 1:
        dtype = torch.bfloat16
    E, K = module.num_experts, module.down_proj.shape[2 if getattr(module, "is_transposed", False) else 1]
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(M, K, generator=generator).to(device, dtype)
    ids = torch.rand(M, E, generator=generator).topk(2, dim=1).indices.to(device)
    return rows, ids, torch.rand(M, 2, generator=generator).to(device, dtype)


def calls() -> int:
    """How many calls backends ran so far."""
    return sum(counts["ran"] for counts in stats().values())


def fp8_layer(**changes: Any) -> Any:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
    from transformers.integrations.moe import use_experts_implementation

    config = qwen3(hidden_size=256, moe_intermediate_size=128, num_experts=4)
    config._experts_implementation = "moe_dispatch"
    own = {"block_size": (128, 128), "activation_scheme": "dynamic"}
    made = use_experts_implementation(FP8Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    module = made(config, **{**own, **changes})
    torch.manual_seed(0)
    quantized = ExpertWeights.quantize(torch.randn(4, 256, 256) / 16, torch.randn(4, 256, 128) / 11)
    with torch.no_grad():
        module.gate_up_proj.copy_(quantized.gate_up)
        module.down_proj.copy_(quantized.down)
        if module.block_size is None:
            module.gate_up_proj_scale_inv.copy_(torch.tensor([1.0, 0.5])[:, None] / 2048)  # of gate and of up
            module.down_proj_scale_inv.fill_(1 / 2048)
        else:
            module.gate_up_proj_scale_inv.copy_(quantized.gate_up_scale)
            module.down_proj_scale_inv.copy_(quantized.down_scale)
    return module
