"""Which of vLLM's expert layers `moe_forward` takes, and why it leaves the others."""

import dataclasses
from typing import Any, Final

import torch

from moe_dispatch.errors import InvalidInputError
from moe_dispatch.integrations.engine_takeover import Takeover, kernel_reasons
from moe_dispatch.integrations.vllm.gates import gate_of
from moe_dispatch.integrations.vllm.storage import FORMS, stored_dtype
from moe_dispatch.problem import MoEProblem
from moe_dispatch.weight_checks import DTYPE_NAMES

TAKEOVER: Final = Takeover("vLLM")

# What vLLM 0.20.2 to 0.33 says about a layer in `FusedMoEConfig` and `FusedMoEParallelConfig`, and about its memory in
# `OffloadConfig`. Each is judged here, or is the router's or the runner's, which stay vLLM's, or concerns other GPUs,
# other quantisations or vLLM's own experts.
_KNOWN_OPTIONS: Final = frozenset({
    "num_experts", "experts_per_token", "hidden_dim", "hidden_dim_unpadded", "intermediate_size", "intermediate_pad",
    "intermediate_size_per_partition", "intermediate_size_per_partition_unpadded", "num_local_experts",
    "num_logical_experts", "activation", "device", "routing_method", "moe_parallel_config", "in_dtype",
    "router_logits_dtype", "moe_backend", "max_num_tokens", "has_bias", "is_act_and_mul", "is_lora_enabled",
    "disable_inplace", "swiglu_limit", "swiglu_alpha", "swiglu_beta", "activation_situ_beta",
    "activation_situ_linear_beta", "max_capture_size", "rocm_aiter_fmoe_enabled", "aiter_fmoe_shared_expert_enabled",
    "skip_final_all_reduce", "defer_moe_finalize", "_defer_moe_finalize", "defer_moe_finalize_max_num_tokens",
    "elastic_ep_max_dp_size", "has_hash_routing", "tp_shard_with_padding", "shared_expert_prefix",
    "use_mxfp4_w4a4_dsv4", "require_decomposed_backend",
    "tp_size", "tp_rank", "pcp_size", "pcp_rank", "dp_size", "dp_rank", "ep_size", "ep_rank", "sp_size", "use_ep",
    "all2all_backend", "enable_eplb",
    "offload_backend", "uva", "prefetch", "cpu_offload_gb", "cpu_offload_params", "offload_group_size",
    "offload_num_in_group", "offload_prefetch_step", "offload_params",
})  # fmt: skip


def reasons_against(moe_config: Any, vllm_config: Any, method: Any) -> list[str]:
    """Everything that speaks against running a layer through `moe_forward`; empty where nothing does.

    Args:
        moe_config: vLLM's `FusedMoEConfig` of the layer.
        vllm_config: The engine's `VllmConfig`.
        method: The layer's quantisation method, which decides how weights are stored.
    """
    parallel = moe_config.moe_parallel_config
    reasons = [*_engine_reasons(vllm_config), *_parallel_reasons(parallel)]
    reasons += [*_unknown_options(moe_config), *_unknown_options(parallel)]
    if moe_config.is_lora_enabled:
        reasons.append("LoRA adapters need vLLM's own experts")
    if (backend := getattr(moe_config, "moe_backend", "auto")) != "auto":
        reasons.append(f"--moe-backend {backend} names vLLM's own")
    for understand in (gate_of, lambda config: stored_dtype(config, method)):
        try:
            understand(moe_config)
        except InvalidInputError as reason:
            reasons.append(str(reason))
    if not reasons and torch.cuda.is_available():
        reasons += kernel_reasons(_problem(moe_config, method, torch.cuda.get_device_capability()))
    return reasons


def _unknown_options(config: Any) -> list[str]:
    """The options that no vLLM up to 0.33 has, and that are set: what they change would be left out."""
    return [
        f"{field.name}={value!r}, an option that this plugin does not know"
        for field in dataclasses.fields(config)
        if field.name not in _KNOWN_OPTIONS and (value := getattr(config, field.name)) and value != field.default
    ]


def describe(moe_config: Any, method: Any) -> str:
    """A layer as the log line names it."""
    activation, _ = gate_of(moe_config)
    words = (
        f"E={moe_config.num_local_experts} topk={moe_config.experts_per_token} K={moe_config.hidden_dim} "
        f"N={moe_config.intermediate_size_per_partition} {FORMS[stored_dtype(moe_config, method)]}"
    )
    return words if activation == "silu" else f"{words} {activation}"


def _problem(moe_config: Any, method: Any, capability: tuple[int, int]) -> MoEProblem:
    """The call with one token of a layer that is understood."""
    activation, interleaved = gate_of(moe_config)
    return MoEProblem(
        M=1, K=moe_config.hidden_dim, N=moe_config.intermediate_size_per_partition, E=moe_config.num_local_experts,
        topk=moe_config.experts_per_token, dtype=stored_dtype(moe_config, method),
        act_dtype=DTYPE_NAMES[moe_config.in_dtype], activation=activation, bias=getattr(moe_config, "has_bias", False),
        interleaved=interleaved, capability=capability,
    )  # fmt: skip


def _engine_reasons(vllm_config: Any) -> list[str]:
    from vllm import envs

    reasons = []
    if envs.VLLM_BATCH_INVARIANT:
        reasons.append("VLLM_BATCH_INVARIANT needs results that do not depend on the batch")
    parallel = vllm_config.parallel_config
    if getattr(parallel, "use_ubatching", False) or getattr(parallel, "enable_dbo", False):
        reasons.append("dual-batch overlap runs layers on two threads")
    if vllm_config.load_config.load_format == "ipc_cache":
        reasons.append("--load-format ipc_cache brings weights in the layout that another process chose")
    offload = getattr(vllm_config, "offload_config", None)
    uva, prefetch = getattr(offload, "uva", None), getattr(offload, "prefetch", None)
    for config in filter(dataclasses.is_dataclass, (offload, uva, prefetch)):
        reasons += _unknown_options(config)
    moved = getattr(uva, "cpu_offload_gb", 0) or getattr(prefetch, "offload_group_size", 0)
    if moved or getattr(vllm_config.cache_config, "cpu_offload_gb", 0):
        reasons.append("weights offloaded to host memory")
    return reasons


def _parallel_reasons(parallel: Any) -> list[str]:
    reasons = []
    if parallel.use_ep:
        reasons.append(f"expert parallelism (ep_size={parallel.ep_size})")
    if parallel.dp_size > 1:
        reasons.append(f"data parallelism (dp_size={parallel.dp_size})")
    if parallel.pcp_size > 1:
        reasons.append(f"prefill context parallelism (pcp_size={parallel.pcp_size})")
    if parallel.enable_eplb:
        reasons.append("expert-parallel load balancing moves experts while serving")
    return reasons
