"""The hook around SGLang's MoE runner. Imports SGLang.

`MoeRunner.run` of SGLang 0.5.17 to 0.5.23 gets hidden states, ids and weights of the router, and a `TritonMoeQuantInfo`
with plain weights and scales. Ids are local to the rank; -1 marks an expert of another one. Releases differ in this:

- `TritonMoeQuantInfo.fuse_swiglu_interleaved` exists from 0.5.18 on;
- from 0.5.19 on another package may register a core of its own for the Triton runner;
- ``gelu_tanh`` is computed from 0.5.21 on, and raises in SGLang before.
"""

import weakref
from dataclasses import dataclass
from typing import Any, Final

import torch
from sglang.srt.layers.moe.moe_runner.triton import TritonRunnerCore
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_exec, get_schedule
from torch import Tensor

from moe_dispatch.activations import SwiGLU
from moe_dispatch.api import moe_forward
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.integrations.engine_takeover import Batches, Takeover, kernel_reasons
from moe_dispatch.integrations.engine_warm_up import prepare
from moe_dispatch.integrations.engine_weights import addresses, wrap
from moe_dispatch.problem import QUANT_BLOCK

TARGET: Final = "sglang.srt.layers.moe.moe_runner.runner.MoeRunner.run"
TAKEOVER: Final = Takeover("SGLang")
_TENSORS: Final = ("w13_weight", "w2_weight", "w13_scale", "w2_scale", "b13", "b2")
_OTHER_FORMATS: Final = ("use_mxfp8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16")


@dataclass(frozen=True)
class _Layer:
    """What a runner's layer is.

    Attributes:
        addresses: Where its tensors lay.
        experts: Its weights as ours; None where it stays SGLang's.
        batches: Of its engine.
    """

    addresses: tuple[int, ...]
    experts: ExpertWeights | None
    batches: Batches


_layers: Final["weakref.WeakKeyDictionary[Any, _Layer]"] = weakref.WeakKeyDictionary()


def hook() -> None:
    """Register the hook, unless that has been done; SGLang applies it once all plugins have run."""
    if all(registered is not run for _, registered, _ in HookRegistry._hooks.get(TARGET, ())):
        HookRegistry.register(TARGET, run, HookType.AROUND)


def run(original: Any, runner: Any, dispatch_output: Any, quant_info: Any, lora_info: Any = None) -> Any:
    """Compute a layer by `moe_forward`, or by SGLang's own `MoeRunner.run`."""
    if torch.compiler.is_compiling():  # a trace would hold one layer's weights as constants of all
        return original(runner, dispatch_output, quant_info, lora_info)
    now = addresses(_tensors(quant_info))
    layer = _layers.get(runner)
    if layer is None or layer.addresses != now:  # first call, or a reload moved the weights
        experts = _decide(runner, dispatch_output, quant_info, first=layer is None)
        layer = _layers[runner] = _Layer(now, experts, layer.batches if layer else TAKEOVER.batches)
    if layer.experts is None:
        return original(runner, dispatch_output, quant_info, lora_info)
    hidden, topk_output = dispatch_output.hidden_states, dispatch_output.topk_output
    weights, ids = topk_output.topk_weights, topk_output.topk_ids
    prepare(TAKEOVER, layer.batches, layer.experts, ids.shape[1], hidden.dtype, into_out=False)
    if runner.config.routed_scaling_factor not in (None, 1.0):
        weights = weights * runner.config.routed_scaling_factor
    # SGLang's `inplace` allows that the output overwrites the input; callers read what is returned.
    return StandardCombineInput(hidden_states=moe_forward(hidden, layer.experts, weights, ids))


def reasons_against(runner: Any, dispatch_output: Any, quant_info: Any) -> list[str]:
    """Everything that speaks against running a layer through `moe_forward`, but for its activation and its tensors.

    Args:
        runner: SGLang's `MoeRunner`.
        dispatch_output: Of the layer's first call.
        quant_info: Likewise.
    """
    config, reasons = runner.config, []
    if runner.lora_enabled:
        reasons.append("LoRA adapters need SGLang's own experts")
    if not runner.runner_backend.is_triton() or type(quant_info).__name__ != "TritonMoeQuantInfo":
        reasons.append(f"the MoE runner {runner.runner_backend.value!r}; --moe-runner-backend triton is taken over")
        return reasons
    core = type(runner.runner_core)
    if core is not TritonRunnerCore:
        reasons.append(f"{core.__name__} of {core.__module__}, which was registered in place of SGLang's Triton core")
    if not dispatch_output.format.is_standard() or not hasattr(dispatch_output.topk_output, "topk_ids"):
        reasons.append(f"tokens dispatched as {dispatch_output.format.value}")
    if dispatch_output.hidden_states_scale is not None:
        reasons.append("hidden states that are quantised already")
    reasons += [
        f"{option} of the runner"
        for option in ("no_combine", "apply_router_weight_on_input")
        if getattr(config, option)
    ]
    reasons += [f"weights stored for {name}" for name in _OTHER_FORMATS if getattr(quant_info, name)]
    if quant_info.a13_scale is not None or quant_info.a2_scale is not None:
        reasons.append("FP8 with static scales of activations, which the backends quantise for each token")
    if quant_info.use_fp8_w8a8 and not quant_info.per_channel_quant and quant_info.block_shape is None:
        reasons.append("FP8 with a scale per tensor, of which kernels read a copy that a reload would not reach")
    if quant_info.block_shape not in (None, [QUANT_BLOCK, QUANT_BLOCK]):
        reasons.append(f"scales of {quant_info.block_shape} blocks, and ours are of {QUANT_BLOCK}×{QUANT_BLOCK}")
    return reasons


def gate_of(config: Any) -> tuple[str, bool]:
    """Our activation for SGLang's `MoeRunnerConfig`, and whether SGLang has gate and up rows alternate for it.

    Raises:
        InvalidInputError: None of ours computes the same.
    """
    name, alpha, limit = config.activation, config.gemm1_alpha, config.gemm1_clamp_limit
    if not config.is_gated:
        if name == "relu2":
            return "relu2", False
    elif name == "silu" and alpha is not None:
        return str(SwiGLU(alpha, limit, 1.0)), bool(config.gate_up_interleaved)
    elif name == "silu" and limit is None:
        return str(SwiGLU(limit=config.swiglu_limit)), False
    elif name == "situ":
        return str(SwiGLU(gate_cap=4.0 if alpha is None else alpha, up_cap=limit)), False
    elif name in ("gelu", "gelu_tanh") and alpha is None and limit is None:
        return str(name), False
    # With `gemm1_clamp_limit` alone SGLang clamps the gate after its SiLU.
    raise InvalidInputError(
        f"activation {name!r} with is_gated={config.is_gated}, gemm1_alpha={alpha}, gemm1_clamp_limit={limit}"
    )


def _tensors(quant_info: Any) -> list[Tensor | None]:
    return [getattr(quant_info, name, None) for name in _TENSORS]


def _decide(runner: Any, dispatch_output: Any, quant_info: Any, *, first: bool) -> ExpertWeights | None:
    """The layer's weights, or None where it stays SGLang's. Never raises."""
    try:
        reasons = reasons_against(runner, dispatch_output, quant_info)
        if not reasons:
            experts = _wrap(runner.config, quant_info)
            hidden, topk = dispatch_output.hidden_states, dispatch_output.topk_output.topk_ids.shape[1]
            if hidden.is_cuda:
                problem = experts.problem(1, topk, hidden.dtype, torch.cuda.get_device_capability(hidden.device))
                reasons = kernel_reasons(problem)
    except Exception as error:  # noqa: BLE001 - whatever stands against it, the engine serves without us
        reasons = [str(error) if isinstance(error, InvalidInputError) else f"{type(error).__name__}: {error}"]
    if reasons:
        if first:
            TAKEOVER.leave(reasons)
        return None
    if first:
        _remember_engine()
        TAKEOVER.take(repr(experts))
    return experts


def _wrap(config: Any, quant_info: Any) -> ExpertWeights:
    activation, interleaved = gate_of(config)
    interleaved |= getattr(quant_info, "fuse_swiglu_interleaved", False)
    routed = config.num_experts
    return wrap(
        _tensors(quant_info), activation, interleaved=interleaved,
        routed_experts=routed if routed is not None and routed > quant_info.w13_weight.shape[0] else None,
    )  # fmt: skip


def _remember_engine() -> None:
    """The token counts that SGLang captures, and its longest prefill; powers of two where it does not say.

    As SGLang has resolved them: its server arguments hold None for what the command line leaves open.
    """
    try:
        graphs = get_exec().graph.cuda_graph_config
        phases = [phase for phase in (graphs.decode, graphs.prefill) if phase.backend != "disabled"]
        captured = {count for phase in phases for count in phase.bs or ()}
        chunk = get_schedule().chunked_prefill_size or 0
        most_tokens = int(chunk if chunk > 0 else get_schedule().max_prefill_tokens)  # -1: prefills are not cut
    except (AttributeError, TypeError, ValueError):
        captured, most_tokens = {1 << power for power in range(9)}, 8192
    TAKEOVER.remember_engine(captured, max((most_tokens, *captured)))
