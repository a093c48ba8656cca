"""Judges every expert layer that vLLM builds, and gives those that fit our experts class. Imports vLLM.

From 0.24 on a layer is a `RoutedExperts`, whose `_get_quant_method` chooses its method before weights are created; up
to 0.23 it is a `FusedMoE`, whose method is changed after its constructor. Both are wrapped where vLLM defines them: its
registry of replaced layers (`register_oot`) goes by the name of a class, so it passes over the subclasses that models
bring (gpt-oss, DBRX, all models of transformers), and holds one class a name, which another plugin may need.
"""

import functools
from collections.abc import Callable
from typing import Any

from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

from moe_dispatch.integrations.vllm.experts import MoeDispatchExperts, check_contract
from moe_dispatch.integrations.vllm.takeover import TAKEOVER, describe, reasons_against


def replace_layers() -> str:
    """Wrap vLLM's layer class, unless that has been done.

    Returns:
        The name of that class.

    Raises:
        ImportError, KeyError: This vLLM does not have it, or not the method that is to be wrapped.
        TypeError: This vLLM would call our experts otherwise than they are written.
    """
    check_contract()
    try:
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    except ImportError:
        from vllm.model_executor.layers.fused_moe.layer import FusedMoE

        return _wrap(FusedMoE, "__init__", _judge_what_was_built)
    return _wrap(RoutedExperts, "_get_quant_method", _judge_what_was_chosen)


def _wrap(cls: type, name: str, wrapper: Callable[[Any], Any]) -> str:
    original = vars(cls)[name]
    if not hasattr(original, "_moe_dispatch"):
        wrapped: Any = functools.wraps(original)(wrapper(original))
        wrapped._moe_dispatch = True
        setattr(cls, name, wrapped)
    return cls.__name__


def _judge_what_was_chosen(original: Any) -> Any:
    def _get_quant_method(self: Any, *args: Any, **options: Any) -> Any:
        method = original(self, *args, **options)
        take(self, method)
        return method

    return _get_quant_method


def _judge_what_was_built(original: Any) -> Any:
    def __init__(self: Any, *args: Any, **options: Any) -> None:  # noqa: N807 - it takes the place of one
        original(self, *args, **options)
        take(self, getattr(self, "quant_method", None))

    return __init__


def take(layer: Any, method: Any) -> None:
    """Let a layer's method build its kernel with our experts, or leave it and keep the reason.

    Never raises, and changes all that it has to change or nothing: an exception would end the engine's start, and a
    method with half of the changes would give one backend's layout of the weights to another's experts.
    """
    try:
        moe_config, vllm_config = layer.moe_config, get_current_vllm_config()
        reasons = [*_layer_reasons(layer, moe_config), *reasons_against(moe_config, vllm_config, method)]
        if not reasons:
            description, changes = describe(moe_config, method), _changes(method)
            captured = vllm_config.compilation_config.cudagraph_capture_sizes or ()
            most_tokens = int(vllm_config.scheduler_config.max_num_batched_tokens)
            lacking = changes.keys() - vars(method).keys()
            reasons += [f"{type(method).__name__} of this vLLM has no {name}" for name in sorted(lacking)]
    except Exception as error:  # noqa: BLE001 - vLLM's classes differ by version, and the engine serves without us
        reasons = [f"{type(error).__name__}: {error}"]
    if reasons:
        TAKEOVER.leave(reasons)
        return
    # So vLLM does not hand these weights, as `vllm preload` does, to a process that expects another layout.
    changes["supports_pre_processed_weights"] = False
    vars(method).update(changes)
    TAKEOVER.remember_engine(captured, most_tokens)
    TAKEOVER.take(description)


def _changes(method: Any) -> dict[str, Any]:
    """The attributes by which a method builds its kernel, and their values with which the kernel's experts are ours.

    Triton's layout of the weights is ours, w13 [E, 2N, K] with gate rows first; others swap halves, shuffle or
    requantise.
    """
    if hasattr(method, "fp8_backend"):
        return {"fp8_backend": Fp8MoeBackend.TRITON, "experts_cls": MoeDispatchExperts}
    return {"unquantized_backend": UnquantizedMoeBackend.TRITON, "experts_cls": MoeDispatchExperts}


def _layer_reasons(layer: Any, moe_config: Any) -> list[str]:
    """What speaks against a layer that is not in its config."""
    cls = type(layer)
    reasons = []
    if cls.__module__.partition(".")[0] != "vllm":
        reasons.append(f"{cls.__name__} is a layer class of {cls.__module__}, not vLLM's own")
    limit = getattr(layer, "swiglu_limit", None)
    if limit is not None and not hasattr(moe_config, "swiglu_limit"):
        reasons.append(f"swiglu_limit={limit}, which vLLM applies to MXFP4 alone up to 0.21")
    return reasons
