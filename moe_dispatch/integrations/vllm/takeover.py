"""Which of an engine's expert layers `moe_forward` takes, why it leaves the others, and what is said about it."""

import logging
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from moe_dispatch.activations import SWIGLU_OAI, Activation
from moe_dispatch.problem import QUANT_BLOCK

# vLLM's activation -> ours, and whether gate and up rows alternate.
ACTIVATIONS: Final[dict[str, tuple[Activation, bool]]] = {
    "silu": ("silu", False),
    "gelu": ("gelu", False),
    "gelu_tanh": ("gelu_tanh", False),
    "swigluoai": ("swiglu_oai", True),
    "relu2_no_mul": ("relu2", False),
}


@dataclass
class Takeover:
    """What has been decided for the layers of this process's engine.

    Attributes:
        taken: Description of a layer -> how many are ours.
        left: Reason -> how many layers stay vLLM's.
    """

    taken: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    _told: tuple[int, int] = (0, 0)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, description: str) -> None:
        """Count a layer as ours."""
        with self._lock:
            self.taken[description] += 1

    def leave(self, reasons: list[str]) -> None:
        """Count a layer as vLLM's own. A model of which no layer is ours has no later moment to say so."""
        with self._lock:
            self.left["; ".join(reasons)] += 1
        if not self.taken and self.left.total() == 1:
            self.tell()

    def tell(self) -> None:
        """Log one line on all layers so far, unless nothing has changed since the last one."""
        with self._lock:
            counts = self.taken.total(), self.left.total()
            if counts == self._told:
                return
            self._told = counts
        ours = ", ".join(f"{count} × {what}" for what, count in self.taken.items()) or "no expert layer"
        theirs = ", ".join(f"{count} ({why})" for why, count in self.left.items()) or "none"
        vllm_logger().info("moe_dispatch runs %s; left to vLLM: %s", ours, theirs)


def vllm_logger() -> logging.Logger:
    """A logger below vLLM's, so that its level and format apply: an engine shows nothing of other packages' INFO."""
    return logging.getLogger("vllm.moe_dispatch")


TAKEOVER: Final = Takeover()


def reasons_against(moe_config: Any, vllm_config: Any, method: Any) -> list[str]:
    """Everything that speaks against running a layer through `moe_forward`; empty where nothing does.

    Args:
        moe_config: vLLM's `FusedMoEConfig` of the layer.
        vllm_config: The engine's `VllmConfig`.
        method: The layer's quantisation method, which decides how weights are stored.
    """
    reasons = [*_engine_reasons(vllm_config), *_parallel_reasons(moe_config.moe_parallel_config)]
    reasons += _gate_reasons(moe_config)
    if moe_config.is_lora_enabled:
        reasons.append("LoRA adapters need vLLM's own experts")
    if (asked := getattr(moe_config, "moe_backend", "auto")) != "auto":
        reasons.append(f"--moe-backend {asked} names vLLM's own")
    kind = type(method).__name__
    if kind == "UnquantizedFusedMoEMethod":
        reasons += _dtype_reasons(moe_config)
    elif kind == "Fp8MoEMethod":
        reasons += _fp8_reasons(moe_config, method)
    else:
        reasons.append(f"weights stored by {kind} are not BF16, FP16 or block FP8")
    return reasons


def describe(moe_config: Any, method: Any) -> str:
    """A layer as the log line names it."""
    dtype = "block FP8" if type(method).__name__ == "Fp8MoEMethod" else str(moe_config.in_dtype).removeprefix("torch.")
    return (
        f"E={moe_config.num_local_experts} topk={moe_config.experts_per_token} K={moe_config.hidden_dim} "
        f"N={moe_config.intermediate_size_per_partition} {dtype}"
    )


def _engine_reasons(vllm_config: Any) -> list[str]:
    from vllm import envs

    reasons = []
    if envs.VLLM_BATCH_INVARIANT:
        reasons.append("VLLM_BATCH_INVARIANT needs results that do not depend on the batch")
    parallel = vllm_config.parallel_config
    if getattr(parallel, "use_ubatching", False) or getattr(parallel, "enable_dbo", False):
        reasons.append("dual-batch overlap runs layers on two threads")
    offload = getattr(vllm_config, "offload_config", None)
    uva = getattr(getattr(offload, "uva", None), "cpu_offload_gb", 0)
    prefetch = getattr(getattr(offload, "prefetch", None), "offload_group_size", 0)
    if uva or prefetch or getattr(vllm_config.cache_config, "cpu_offload_gb", 0):
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


def _gate_reasons(moe_config: Any) -> list[str]:
    name = moe_config.activation.value
    if name not in ACTIVATIONS:
        return [f"activation {name!r}; ours are {', '.join(sorted(ACTIVATIONS))}"]
    built_in = (
        {"swiglu_limit": SWIGLU_OAI.limit, "swiglu_alpha": SWIGLU_OAI.alpha, "swiglu_beta": SWIGLU_OAI.shift}
        if name == "swigluoai"
        else {}
    )
    return [
        f"{key}={value} is not built into activation {name!r}"
        for key in ("swiglu_limit", "swiglu_alpha", "swiglu_beta")
        if (value := getattr(moe_config, key, None)) is not None and value != built_in.get(key)
    ]


def _dtype_reasons(moe_config: Any) -> list[str]:
    name = str(moe_config.in_dtype).removeprefix("torch.")
    return [] if name in ("bfloat16", "float16") else [f"weights in {name}; ours are bfloat16, float16 and block FP8"]


def _fp8_reasons(moe_config: Any, method: Any) -> list[str]:
    block = getattr(method, "moe_block_shape", None) or getattr(method, "weight_block_size", None)
    if not getattr(method, "block_quant", False) or list(block or ()) != [QUANT_BLOCK, QUANT_BLOCK]:
        return [f"FP8 weights are scaled by {block or 'tensor'}, and ours by {QUANT_BLOCK}×{QUANT_BLOCK} blocks"]
    N = moe_config.intermediate_size_per_partition
    return [f"N={N} is no multiple of {QUANT_BLOCK}, so scale blocks straddle the shards"] if N % QUANT_BLOCK else []
