"""Baselines: MoE layers of other libraries, each called as its own users would call it.

A baseline is an adapter of a few lines: which problems it supports, and how its library is called on `ExpertWeights`,
whose layout all of them accept. None of this package's code runs inside its time: no ids are masked, no tensors copied.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from torch import Tensor

from moe_dispatch.backend import Requirements
from moe_dispatch.backends.vllm_fused_moe import library as vllm
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine
from moe_dispatch.measure import Call, LayerInputs, backend_call
from moe_dispatch.problem import DType, MoEProblem
from moe_dispatch.registry import BACKENDS, make_backend
from moe_dispatch.system.libraries import library_version


class Baseline(ABC):
    """The MoE layer of another library.

    Attributes:
        tolerance: Greatest relative error that is accepted, by weight dtype.
    """

    name: ClassVar[str]
    requirements: ClassVar[Requirements]
    # Wider than the backends' tolerances: most baselines round the first product to BF16, and some the sum too.
    tolerance: ClassVar[Mapping[DType, float]] = {
        "bf16": 2e-2,
        "fp16": 4e-3,
        "fp32": 1e-3,
        "fp8": 4e-2,
        "fp8_channel": 4e-2,
        "mxfp4": 2e-2,
    }

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def unsupported_reasons(self, problem: MoEProblem) -> tuple[str, ...]:
        """All reasons why it cannot run a problem; empty if it can."""
        missing = [
            f"{library} is not installed"
            for library in self.requirements.libraries
            if not (self.machine.libraries.get(library) or library_version(library))
        ]
        return (*missing, *self.requirements.reasons_against(problem))

    @abstractmethod
    def prepare(self, experts: ExpertWeights, problem: MoEProblem) -> Call:
        """Prepare the weights as the library's users do once a model; return the call that runs the layer at any M."""


class NaiveLoop(Baseline):
    """A loop in torch over the hit experts: gather tokens, two products, scatter."""

    name = "naive_loop"
    requirements = BACKENDS.load("reference").requirements

    def prepare(self, experts: ExpertWeights, problem: MoEProblem) -> Call:  # noqa: ARG002
        """See `Baseline.prepare`."""
        loop = make_backend("reference", self.machine).require()
        return backend_call(loop, experts, loop.config_type())


class Vllm(Baseline):
    """vLLM's `fused_experts` with its own defaults: the tuned configuration that it ships, or its heuristic.

    Activation scales are in fp32, as in all other candidates (``VLLM_USE_DEEP_GEMM_E8M0=0``).
    """

    name = "vllm"
    requirements = Requirements(
        dtypes={"bf16": (8, 0), "fp16": (8, 0), "fp8": (8, 9), "fp8_channel": (8, 9)},
        activations=frozenset({"silu"}),
        libraries=("vllm",),
        multiples={"fp8": {"K": 128, "N": 128}, "fp8_channel": {"K": 16, "N": 16}},
    )

    def prepare(self, experts: ExpertWeights, problem: MoEProblem) -> Call:  # noqa: ARG002
        """See `Baseline.prepare`."""
        library = vllm.load()
        quant_config = None
        if experts.dtype == "fp8":
            vllm.require_fp32_scales()
        if experts.fp8:
            quant_config = vllm.fp8_config(library, experts)

        def call(inputs: LayerInputs) -> Tensor:
            out: Tensor = library.fused_experts(
                inputs.hidden_states,
                experts.gate_up,
                experts.down,
                inputs.topk_weights,
                inputs.topk_ids,
                quant_config=quant_config,
            )
            return out

        return call


class VllmDeepGemm(Baseline):
    """vLLM's own DeepGEMM layer: `DeepGemmExperts` inside its modular kernel, without parallelism.

    The modular kernel takes its buffers from vLLM's workspace manager, which an engine would have initialised.
    """

    name = "vllm_deep_gemm"
    requirements = Requirements(
        dtypes={"fp8": (9, 0)},
        act_dtypes=frozenset({"bf16"}),
        activations=frozenset({"silu"}),
        libraries=("vllm", "deep_gemm"),
        multiples={"fp8": {"K": 128, "N": 128}},
    )

    def prepare(self, experts: ExpertWeights, problem: MoEProblem) -> Call:
        """See `Baseline.prepare`."""
        vllm.require_fp32_scales()
        deep_gemm_moe = importlib.import_module(f"{vllm.PACKAGE}.experts.deep_gemm_moe")
        layer = deep_gemm_moe.DeepGemmExperts(_moe_config(experts, problem), vllm.fp8_config(vllm.load(), experts))
        return _modular_call(layer, experts, experts.gate_up, experts.down)


class VllmTritonKernels(Baseline):
    """The `triton_kernels` that vLLM bundles, through its `UnfusedOAITritonExperts`, on BF16 weights.

    vLLM itself gives these kernels only MXFP4 weights (gpt-oss, see `VllmMxfp4`), but the same code takes BF16, which
    makes it comparable. The kernels take weights ``[E, K, 2N]``; a transposed view of the weights is enough.
    """

    name = "vllm_triton_kernels"
    requirements = Requirements(
        dtypes={"bf16": (9, 0)},
        act_dtypes=frozenset({"bf16"}),
        activations=frozenset({"silu"}),
        libraries=("vllm",),
        max_capability={"bf16": (11, 0)},
    )

    def prepare(self, experts: ExpertWeights, problem: MoEProblem) -> Call:
        """See `Baseline.prepare`."""
        config = importlib.import_module(f"{vllm.PACKAGE}.config")
        kernels = importlib.import_module(f"{vllm.PACKAGE}.experts.gpt_oss_triton_kernels_moe")
        layer = kernels.UnfusedOAITritonExperts(_moe_config(experts, problem), config.FUSED_MOE_UNQUANTIZED_CONFIG)
        return _modular_call(layer, experts, experts.gate_up.transpose(1, 2), experts.down.transpose(1, 2))


class VllmMxfp4(Baseline):
    """The `triton_kernels` that vLLM bundles, as it runs gpt-oss: MXFP4 weights, copied once into its layout."""

    name = "vllm_mxfp4"
    requirements = Requirements(
        dtypes={"mxfp4": (9, 0)},
        act_dtypes=frozenset({"bf16"}),
        activations=frozenset({"swiglu_oai"}),
        bias=True,
        interleaved=True,
        libraries=("vllm",),
        multiples={"mxfp4": {"K": 64, "N": 64}},
        max_capability={"mxfp4": (11, 0)},
    )

    def prepare(self, experts: ExpertWeights, problem: MoEProblem) -> Call:
        """See `Baseline.prepare`.

        Raises:
            ValueError: The layer has no biases, or gate rows first.
        """
        if not (experts.interleaved and experts.gate_up_bias is not None and experts.down_bias is not None):
            raise ValueError("takes layers as gpt-oss has them, with alternating rows and biases")
        config = importlib.import_module(f"{vllm.PACKAGE}.config")
        kernels = importlib.import_module(f"{vllm.PACKAGE}.experts.gpt_oss_triton_kernels_moe")
        utils = importlib.import_module("vllm.model_executor.layers.quantization.utils.mxfp4_utils")
        gate_up, gate_up_flex, gate_up_scale = utils._swizzle_mxfp4(experts.gate_up, experts.gate_up_scale)
        down, down_flex, down_scale = utils._swizzle_mxfp4(experts.down, experts.down_scale)
        matmul = importlib.import_module("triton_kernels.matmul_ogs")
        precision = [
            matmul.PrecisionConfig(weight_scale=scale, flex_ctx=matmul.FlexCtx(rhs_data=flex))
            for scale, flex in ((gate_up_scale, gate_up_flex), (down_scale, down_flex))
        ]
        quant_config = config.mxfp4_w4a16_moe_quant_config(
            *precision, w1_bias=experts.gate_up_bias.float(), w2_bias=experts.down_bias.float()
        )
        layer = kernels.OAITritonExperts(_moe_config(experts, problem, "swigluoai"), quant_config)
        return _modular_call(layer, experts, gate_up, down, "swigluoai")


BASELINES: Final[dict[str, type[Baseline]]] = {
    baseline.name: baseline for baseline in (Vllm, VllmDeepGemm, VllmTritonKernels, VllmMxfp4, NaiveLoop)
}


def _moe_config(experts: ExpertWeights, problem: MoEProblem, activation: str = "silu") -> Any:
    return vllm.moe_config(experts, problem.topk, vllm.load().activation(activation))


def _modular_call(layer: Any, experts: ExpertWeights, gate_up: Any, down: Any, activation: str = "silu") -> Call:
    workspace = importlib.import_module("vllm.v1.worker.workspace")
    if not workspace.is_workspace_manager_initialized():
        workspace.init_workspace_manager(experts.device)
    local = importlib.import_module(f"{vllm.PACKAGE}.prepare_finalize.no_dp_ep")
    modular = importlib.import_module(f"{vllm.PACKAGE}.modular_kernel")
    member = vllm.load().activation(activation)
    kernel = modular.FusedMoEKernel(local.MoEPrepareAndFinalizeNoDPEPModular(), layer)

    def call(inputs: LayerInputs) -> Tensor:
        out: Tensor = kernel.apply(
            hidden_states=inputs.hidden_states,
            w1=gate_up,
            w2=down,
            topk_weights=inputs.topk_weights,
            topk_ids=inputs.topk_ids,
            activation=member,
            global_num_experts=experts.E,
            expert_map=None,
            apply_router_weight_on_input=False,
        )
        return out

    return call
