"""Replaces vLLM's expert layer classes through its own registry. Imports vLLM.

From 0.24 on the class is `RoutedExperts`, whose `_get_quant_method` is asked before weights are created. Up to 0.22 it
is `FusedMoE`, whose method is changed after its constructor.
"""

import logging
from typing import Any

from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

from moe_dispatch.integrations.vllm.experts import MoeDispatchExperts
from moe_dispatch.integrations.vllm.takeover import TAKEOVER, describe, reasons_against

logger = logging.getLogger("moe_dispatch")


def replace_layers() -> None:
    """Register our layer class, unless that has been done, or another plugin was first."""
    try:
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    except ImportError:
        _register("FusedMoE", _fused_moe)
    else:
        _register("RoutedExperts", lambda: _routed_experts(RoutedExperts))


def _register(name: str, make: Any) -> None:
    holder = op_registry_oot.get(name)
    if holder is None:
        make()
    elif not getattr(holder, "_moe_dispatch", False):
        logger.warning("another plugin replaced vLLM's %s (%s); its layers are left alone", name, holder.__module__)


def _routed_experts(base: Any) -> None:
    @base.register_oot
    class MoeDispatchRoutedExperts(base):  # type: ignore[misc]
        """vLLM's routed experts with our experts class, where the layer fits."""

        _moe_dispatch = True

        def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> Any:
            method = super()._get_quant_method(prefix, quant_config, moe_config)
            take(method, moe_config)
            return method


def _fused_moe() -> None:
    from vllm.model_executor.layers.fused_moe.layer import FusedMoE

    @FusedMoE.register_oot
    class MoeDispatchFusedMoE(FusedMoE):  # type: ignore[misc]
        """vLLM's fused MoE layer with our experts class, where it fits."""

        _moe_dispatch = True

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if (limit := getattr(self, "swiglu_limit", None)) is not None:
                TAKEOVER.leave([f"swiglu_limit={limit}, which vLLM applies to MXFP4 alone up to 0.22"])
            else:
                take(self.quant_method, self.moe_config)


def take(method: Any, moe_config: Any) -> None:
    """Let a layer's method build its kernel with our experts, or leave it and keep the reason. Never raises."""
    try:
        vllm_config = get_current_vllm_config()
        reasons = reasons_against(moe_config, vllm_config, method)
        backend = "fp8_backend" if hasattr(method, "fp8_backend") else "unquantized_backend"
        if not reasons and not hasattr(method, "experts_cls"):
            reasons.append(f"{type(method).__name__} of this vLLM has no experts_cls")
    except Exception as error:  # noqa: BLE001 - vLLM's classes differ by version, and the engine serves without us
        reasons = [f"{type(error).__name__}: {error}"]
    if reasons:
        TAKEOVER.leave(reasons)
        return
    # The Triton layout is ours, w13 [E, 2N, K] with gate rows first; others swap halves, shuffle or requantise.
    setattr(method, backend, Fp8MoeBackend.TRITON if backend == "fp8_backend" else UnquantizedMoeBackend.TRITON)
    method.experts_cls = MoeDispatchExperts
    TAKEOVER.remember_engine(
        vllm_config.compilation_config.cudagraph_capture_sizes or (),
        int(vllm_config.scheduler_config.max_num_batched_tokens),
    )
    TAKEOVER.take(describe(moe_config, method))
