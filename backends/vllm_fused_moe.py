"""vLLM's `fused_experts`, called without an engine."""

import importlib
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from moe_dispatch.backend import Backend, BackendConfig, Requirements
from moe_dispatch.backends.stages.mask_slots import mask_slots
from moe_dispatch.errors import BackendUnavailableError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.problem import QUANT_BLOCK, Activation, MoEProblem

_PACKAGE: Final = "vllm.model_executor.layers.fused_moe"
_E8M0_ENV: Final = "VLLM_USE_DEEP_GEMM_E8M0"
# vLLM's names (MoEActivation). Its exact gelu is ours; it has no tanh one.
_ACTIVATIONS: Final[dict[Activation, str]] = {
    "silu": "silu",
    "gelu": "gelu",
    "swiglu_oai": "swigluoai",
    "relu2": "relu2_no_mul",
}
# Its sorting kernel gives each expert a thread of one block of 1024, rounds them up to whole warps and needs one to
# spare; one expert of ours stands for all that are not ours.
_MOST_EXPERTS: Final = 991


@dataclass(frozen=True)
class _Library:
    """What is called of vLLM, and what is remembered about it.

    Attributes:
        fused_experts: The function.
        activation: vLLM's enumeration, by value.
        fp8_config: Makes the description of block FP8 weights.
        biased_config: Makes the description of plain weights with biases.
        assign: Decides how slots are brought to blocks; asked, never run. None in a version without a choice.
        assigns_by_slot: What `assign` answered, by (M, topk, E).
    """

    fused_experts: Callable[..., Tensor]
    activation: Callable[[str], Any]
    fp8_config: Callable[..., Any]
    biased_config: Callable[..., Any]
    assign: Callable[..., tuple[Any, ...]] | None
    assigns_by_slot: dict[tuple[int, int, int], bool] = field(default_factory=dict)


@dataclass(frozen=True)
class _Layer:
    """What vLLM is told of one layer on every call.

    Attributes:
        activation: vLLM's enumeration member.
        quant_config: Description of the weights; None for plain ones without biases.
        expert_map: int32 ``[E + 1]``: each expert is itself, and E is nobody.
    """

    activation: Any
    quant_config: Any
    expert_map: Tensor


# For as long as the weights live and not as long as a backend: a captured graph goes on reading a layer's expert_map
# when the dispatchers, and the backends with them, have been made anew.
_layers: Final[weakref.WeakKeyDictionary[ExpertWeights, _Layer]] = weakref.WeakKeyDictionary()


class VllmFusedMoEBackend(Backend):
    """The Triton kernels of vLLM with vLLM's own tuned configurations.

    vLLM reads an id without looking whether there is such an expert. So ids outside 0…E-1 are first replaced on the
    device: by -1 where each slot gets a block of its own (its kernel writes zeros for it), else by E, which
    `expert_map` sends to nobody; then vLLM clears its buffer before the sum.

    On Hopper and newer vLLM rounds the multipliers of FP8 activations to powers of two unless
    ``VLLM_USE_DEEP_GEMM_E8M0=0``, which it reads once per process. The first FP8 run sets that variable if nobody has,
    and refuses to run if vLLM rounds all the same: an engine in this process came first, or somebody set it to 1.
    """

    name = "vllm_fused_moe"
    requirements = Requirements(
        dtypes={"bf16": (8, 0), "fp16": (8, 0), "fp8": (8, 9)},
        activations=frozenset(_ACTIVATIONS),
        bias=True,
        interleaved=True,
        libraries=("vllm",),
        # Its quantisation of activations (K, and N for the second product) takes whole groups only.
        multiples={"fp8": {"K": QUANT_BLOCK, "N": QUANT_BLOCK}},
    )
    # FP8: the first product is rounded to BF16 before it is quantised again, so some codes fall on the other side.
    tolerance: ClassVar = {"bf16": 1e-2, "fp16": 2e-3, "fp8": 3e-2}
    install_hint = "pip install 'moe-dispatch[vllm]' (vLLM 0.20.2 needs torch 2.11)"

    def further_reasons(self, problem: MoEProblem) -> tuple[str, ...]:
        """See `Backend.further_reasons`."""
        reasons = []
        if problem.interleaved != (problem.activation == "swiglu_oai"):
            order = "alternating" if problem.interleaved else "gate first"
            reasons.append(
                f"takes alternating gate and up rows with swiglu_oai and gate rows first with the others, "
                f"got {problem.activation} with rows {order}"
            )
        if problem.E > _MOST_EXPERTS:
            reasons.append(f"sorts at most {_MOST_EXPERTS} experts, got E={problem.E}")
        return tuple(reasons)

    def workspace_bytes(self, problem: MoEProblem, config: BackendConfig) -> int:  # noqa: ARG002
        """See `Backend.workspace_bytes`."""
        plain = problem.slots * (max(problem.gate_up_rows, problem.K) + problem.N) * 2
        return plain + (problem.M * problem.K + problem.slots * problem.N if problem.dtype == "fp8" else 0)

    def measured_versions(self) -> dict[str, str]:
        """See `Backend.measured_versions`."""
        return {**super().measured_versions(), "triton": self.machine.triton}

    def run(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,  # noqa: ARG002 - vLLM looks its configuration up itself
    ) -> Tensor:
        """See `Backend.run`.

        Raises:
            BackendUnavailableError: vLLM does not load, or would round FP8 multipliers.
        """
        library = _load()
        layer = _layers.get(experts) or self._describe(library, experts)
        M, topk = topk_ids.shape
        by_slot = _assigns_by_slot(library, M, topk, experts.E)
        return library.fused_experts(
            hidden_states=hidden_states,
            w1=experts.gate_up,
            w2=experts.down,
            topk_weights=topk_weights,
            topk_ids=mask_slots(topk_ids, experts.E, -1 if by_slot else experts.E),
            inplace=False,  # fresh memory is the contract, and vLLM refuses True from torch 2.9 on
            activation=layer.activation,
            global_num_experts=experts.E if by_slot else experts.E + 1,
            expert_map=None if by_slot else layer.expert_map,
            quant_config=layer.quant_config,
        )

    def _describe(self, library: _Library, experts: ExpertWeights) -> _Layer:
        quant_config = None
        if experts.dtype == "fp8":
            _insist_on_plain_scales()
            quant_config = library.fp8_config(
                w1_scale=experts.gate_up_scale,
                w2_scale=experts.down_scale,
                w1_bias=experts.gate_up_bias,
                w2_bias=experts.down_bias,
                block_shape=[QUANT_BLOCK, QUANT_BLOCK],
            )
        elif experts.gate_up_bias is not None:
            quant_config = library.biased_config(experts.gate_up_bias, experts.down_bias)
        expert_map = torch.arange(experts.E + 1, dtype=torch.int32, device=experts.device)
        expert_map[experts.E :].fill_(-1)
        layer = _Layer(library.activation(_ACTIVATIONS[experts.activation]), quant_config, expert_map)
        # Memory taken during a capture belongs to its graph and holds nothing before the replay.
        if not (experts.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            _layers[experts] = layer
        return layer


_lock = threading.RLock()
_library: _Library | None = None
_plain_scales = False


def _load() -> _Library:
    global _library
    if _library is None:
        with _lock:
            _library = _library or _import()
    return _library


def _import() -> _Library:
    try:
        config = importlib.import_module(f"{_PACKAGE}.config")
        kernels = importlib.import_module(f"{_PACKAGE}.fused_moe")
        library = _Library(
            fused_experts=kernels.fused_experts,
            activation=importlib.import_module(f"{_PACKAGE}.activation").MoEActivation,
            fp8_config=config.fp8_w8a8_moe_quant_config,
            biased_config=config.biased_moe_quant_config,
            assign=getattr(kernels, "_prepare_expert_assignment", None),
        )
        platform = importlib.import_module("vllm.platforms").current_platform
    except Exception as error:
        raise _unavailable(
            f"vllm does not load: {type(error).__name__}: {error}; {VllmFusedMoEBackend.install_hint}"
        ) from error
    if not platform.is_cuda():
        raise _unavailable(
            f"vllm runs for the platform {type(platform).__name__} and not for CUDA; "
            "reinstall it with pip, whose metadata it reads to find out"
        )
    return library


def _assigns_by_slot(library: _Library, M: int, topk: int, E: int) -> bool:
    """Whether vLLM skips its sorting for so few slots.

    It is asked itself, with empty ids on the CPU, because the bound is nobody's promise: when it decides to sort, there
    is no CPU kernel to do so. Misjudging it would hand its sorting kernel an id of -1, which it uses as an index.
    """
    if library.assign is None or M * topk > E:
        return False
    key = (M, topk, E)
    answer = library.assigns_by_slot.get(key)
    if answer is None:
        try:
            sorted_slots, *_ = library.assign(
                topk_ids=torch.zeros(M, topk, dtype=torch.int32),
                config={"BLOCK_SIZE_M": 16},
                num_tokens=M,
                top_k_num=topk,
                global_num_experts=E,
                expert_map=None,
            )
            answer = sorted_slots is None
        except Exception:  # noqa: BLE001 - any refusal means that it does not skip the sorting
            answer = False
        library.assigns_by_slot[key] = answer
    return answer


def _insist_on_plain_scales() -> None:
    """Make sure that vLLM does not round the multipliers of FP8 activations to powers of two."""
    global _plain_scales
    if _plain_scales:
        return
    with _lock:
        unset = _E8M0_ENV not in os.environ
        if unset:
            os.environ[_E8M0_ENV] = "0"
        try:
            _ask_for_plain_scales()
        except BaseException:
            if unset:  # it did not help us, so it shall not change an engine that comes later
                del os.environ[_E8M0_ENV]
            raise
        _plain_scales = True


def _ask_for_plain_scales() -> None:
    try:
        rounds = importlib.import_module("vllm.utils.deep_gemm").is_deep_gemm_e8m0_used()
    except Exception as error:
        raise _unavailable(
            f"vllm cannot say how it rounds FP8 multipliers: {type(error).__name__}: {error}; it imports DeepGEMM to "
            "find out: set CUDA_HOME to a CUDA toolkit, or VLLM_USE_DEEP_GEMM=0"
        ) from error
    if rounds:
        given = os.environ[_E8M0_ENV]
        cause = f"{_E8M0_ENV}={given}" if given != "0" else "an engine in this process asked before us"
        raise _unavailable(
            f"vllm rounds FP8 multipliers to powers of two ({cause}); set {_E8M0_ENV}=0 before its first use"
        )


def _unavailable(reason: str) -> BackendUnavailableError:
    return BackendUnavailableError(VllmFusedMoEBackend.name, [reason])
