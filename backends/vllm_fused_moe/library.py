"""vLLM's functions, and the differences between its releases. Everything that depends on a release is decided here.

Read in 0.20.2, 0.22.1, 0.24.0, 0.26.0, 0.29.0 and 0.33.0, below ``vllm/model_executor/layers/fused_moe``:

- `fused_experts` (fused_moe.py) takes ``inplace`` up to 0.22.1; the argument is gone from 0.24.0 on.
- `FusedMoEConfig` (config.py) takes the intermediate size as ``intermediate_size_per_partition`` up to 0.22.1 and as
  ``intermediate_size`` from 0.24.0 on.
- `_prepare_expert_assignment` (fused_moe.py) skips the sorting of slots where M·topk·4 ≤ E, unless an expert map is
  passed.
  Its arguments are the same in all of them; 0.33.0 has one more, with a default.
- `is_deep_gemm_e8m0_used` (vllm/utils/deep_gemm.py) is the same in all of them. It imports DeepGEMM, and in 0.26.0 and
  later it also switches DeepGEMM to programmatic dependent launch, for the whole process. The backend deep_gemm sets
  the same switch itself.
"""

import dataclasses
import importlib
import inspect
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from moe_dispatch.errors import BackendUnavailableError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.system.libraries import install_hint

PACKAGE: Final = "vllm.model_executor.layers.fused_moe"
INSTALL_HINT: Final = install_hint("vllm")
_E8M0_ENV: Final = "VLLM_USE_DEEP_GEMM_E8M0"
# The keyword arguments that the backend passes to `fused_experts`, and those that only some releases have.
_ARGUMENTS: Final = frozenset({
    "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation", "global_num_experts", "expert_map",
    "quant_config",
})  # fmt: skip
_OPTIONS: Final[Mapping[str, Any]] = {"inplace": False}  # a backend returns fresh memory


@dataclass(frozen=True)
class Library:
    """What is called of vLLM, and what is remembered about it.

    Attributes:
        fused_experts: The layer; keyword arguments only.
        options: Keyword arguments of `fused_experts` that this release has and others have not.
        activation: vLLM's enumeration `MoEActivation`, by value.
        fp8_config: Makes the description of FP8 weights.
        biased_config: Makes the description of plain weights with biases.
        assign: Decides whether slots are sorted by expert; called with CPU tensors only. None in a release without it.
        assigns_by_slot: What `assign` answered, by (M, topk, E).
    """

    fused_experts: Callable[..., Tensor]
    options: Mapping[str, Any]
    activation: Callable[[str], Any]
    fp8_config: Callable[..., Any]
    biased_config: Callable[..., Any]
    assign: Callable[..., tuple[Any, ...]] | None
    assigns_by_slot: dict[tuple[int, int, int], bool] = field(default_factory=dict)


_lock = threading.RLock()
_library: Library | None = None
_keeps_fp32_scales = False


def load() -> Library:
    """vLLM, imported once per process.

    Raises:
        BackendUnavailableError: It does not import, does not run on CUDA, or has another interface.
    """
    global _library
    if _library is None:
        with _lock:
            _library = _library or _import()
    return _library


def assigns_by_slot(library: Library, M: int, topk: int, E: int) -> bool:
    """Whether vLLM gives each slot a block of its own, without sorting, because there are so few.

    vLLM's own function is called for the answer, with ids on the CPU, because the bound may move with any release: when
    it decides to sort, it finds no CPU kernel. A wrong answer would hand its sorting kernel an id of -1, which that
    kernel uses as an index.
    """
    if library.assign is None or M * topk > E:
        return False
    key = (M, topk, E)
    answer = library.assigns_by_slot.get(key)
    if answer is None:
        try:
            sorted_slots, *_ = library.assign(
                topk_ids=torch.zeros(M, topk, dtype=torch.int32, device="cpu"),
                config={"BLOCK_SIZE_M": 16},
                num_tokens=M,
                top_k_num=topk,
                global_num_experts=E,
                expert_map=None,
            )
            answer = sorted_slots is None
        except Exception:  # noqa: BLE001 - whatever it raises, it did not skip the sorting
            answer = False
        library.assigns_by_slot[key] = answer
    return answer


def require_fp32_scales() -> None:
    """Make sure that vLLM does not round the multipliers of block FP8 activations to powers of two.

    It does so on Hopper and newer unless ``VLLM_USE_DEEP_GEMM_E8M0=0``, which it reads once per process. The variable
    is set here if it is not set yet.

    Raises:
        BackendUnavailableError: It rounds all the same: the variable is 1, or an engine in this process came first.
    """
    global _keeps_fp32_scales
    if _keeps_fp32_scales:
        return
    with _lock:
        unset = _E8M0_ENV not in os.environ
        if unset:
            os.environ[_E8M0_ENV] = "0"
        try:
            _check_scales()
        except BaseException:
            if unset:  # it changed nothing for us, and must not change an engine that is started later
                del os.environ[_E8M0_ENV]
            raise
        _keeps_fp32_scales = True


def fp8_config(library: Library, experts: ExpertWeights) -> Any:
    """Describe FP8 weights, and their biases, in vLLM's terms: ``[E, rows, 1]`` for scales per row."""
    scales: dict[str, Any] = {"w1_scale": experts.gate_up_scale, "w2_scale": experts.down_scale}
    form: dict[str, Any] = {"block_shape": [128, 128]}
    if experts.dtype == "fp8_channel":
        scales = {name: scale.unsqueeze(-1) for name, scale in scales.items()}
        form = {"per_act_token_quant": True, "per_out_ch_quant": True}
    return library.fp8_config(**scales, w1_bias=experts.gate_up_bias, w2_bias=experts.down_bias, **form)


def moe_config(experts: ExpertWeights, topk: int, activation: Any) -> Any:
    """The `FusedMoEConfig` of a layer on one GPU, as vLLM's modular experts want it."""
    config = importlib.import_module(f"{PACKAGE}.config")
    names = {name.name for name in dataclasses.fields(config.FusedMoEConfig)}
    size = "intermediate_size" if "intermediate_size" in names else "intermediate_size_per_partition"
    return config.FusedMoEConfig(
        num_experts=experts.E,
        experts_per_token=topk,
        hidden_dim=experts.K,
        num_local_experts=experts.E,
        num_logical_experts=experts.E,
        activation=activation,
        device=experts.device,
        routing_method=config.RoutingMethodType.TopK,
        moe_parallel_config=config.FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
        **{size: experts.N},
    )


def _import() -> Library:
    try:
        config = importlib.import_module(f"{PACKAGE}.config")
        kernels = importlib.import_module(f"{PACKAGE}.fused_moe")
        library = Library(
            fused_experts=kernels.fused_experts,
            options=_options(kernels.fused_experts),
            activation=importlib.import_module(f"{PACKAGE}.activation").MoEActivation,
            fp8_config=config.fp8_w8a8_moe_quant_config,
            biased_config=config.biased_moe_quant_config,
            assign=getattr(kernels, "_prepare_expert_assignment", None),
        )
        platform = importlib.import_module("vllm.platforms").current_platform
    except BackendUnavailableError:
        raise
    except (Exception, SystemExit) as error:
        raise _unavailable(f"vllm does not load: {type(error).__name__}: {error}; {INSTALL_HINT}") from error
    if not platform.is_cuda():
        raise _unavailable(
            f"vllm runs for the platform {type(platform).__name__} and not for CUDA; "
            "reinstall it with pip, whose metadata it reads to find out"
        )
    return library


def _options(fused_experts: Callable[..., Any]) -> dict[str, Any]:
    """The arguments that this release's `fused_experts` takes beyond those that every release takes.

    Raises:
        BackendUnavailableError: It lacks an argument that is passed, or needs one that is not known here.
    """
    parameters = inspect.signature(fused_experts).parameters
    lacking = sorted(_ARGUMENTS - parameters.keys())
    unknown = sorted(
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and name not in _ARGUMENTS | _OPTIONS.keys()
    )
    if lacking or unknown:
        faults = (("takes no", lacking), ("needs", unknown))
        fault = " and ".join(f"{verb} {', '.join(names)}" for verb, names in faults if names)
        raise _unavailable(f"vllm's fused_experts {fault}: this release is not known to work; {INSTALL_HINT}")
    return {name: value for name, value in _OPTIONS.items() if name in parameters}


def _check_scales() -> None:
    try:
        rounds = importlib.import_module("vllm.utils.deep_gemm").is_deep_gemm_e8m0_used()
    except (Exception, SystemExit) as error:
        raise _unavailable(
            f"vllm cannot say how it rounds FP8 multipliers: {type(error).__name__}: {error}; it imports DeepGEMM to "
            "find out: set CUDA_HOME to a CUDA toolkit, or VLLM_USE_DEEP_GEMM=0"
        ) from error
    if rounds:
        value = os.environ[_E8M0_ENV]
        cause = f"{_E8M0_ENV}={value}" if value != "0" else "an engine in this process decided it before"
        raise _unavailable(
            f"vllm rounds FP8 multipliers to powers of two ({cause}); set {_E8M0_ENV}=0 before its first use"
        )


def _unavailable(reason: str) -> BackendUnavailableError:
    return BackendUnavailableError("vllm_fused_moe", [reason])
