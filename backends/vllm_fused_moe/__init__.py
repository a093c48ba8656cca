"""vLLM's `fused_experts`, called without an engine."""

from moe_dispatch.backends.vllm_fused_moe.backend import VllmFusedMoEBackend

__all__ = ["VllmFusedMoEBackend"]
