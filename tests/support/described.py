"""Machines that are not here, and small layers for the backends that are asked about them."""

import torch

from moe_dispatch.activations import Activation
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine
from moe_dispatch.problem import DType
from moe_dispatch.workloads import Workload, make_experts

CPU = Machine(device="cpu", name="a cpu", sms=4, memory_bytes=1 << 34, torch="2.13.0+cpu")
H200 = Machine(
    device="cuda", name="NVIDIA H200", capability=(9, 0), sms=132, memory_bytes=141 << 30, torch="2.11.0+cu130",
    cuda="13.0", triton="3.6.0", libraries={"deep_gemm": "2.5.0", "vllm": "0.20.2"},
)  # fmt: skip


def gpu(capability: tuple[int, int], **changes: object) -> Machine:
    """An H200 but for its capability, and for other changes."""
    return H200.model_copy(update={"capability": capability, "name": "described", **changes})


def small_layer(
    dtype: DType, activation: Activation = "silu", *, bias: bool = False, E: int = 8, topk: int = 2, K: int = 128,
    N: int = 128,
) -> ExpertWeights:  # fmt: skip
    """The same weights each time, on the CPU; with gpt-oss's activation, rows alternate."""
    interleaved = activation == "swiglu_oai"
    shape = Workload("small", E, topk, K, N, activation=activation, bias=bias, interleaved=interleaved)
    return make_experts(shape, dtype, "cpu", torch.Generator().manual_seed(1))
