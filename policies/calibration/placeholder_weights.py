"""Weights with a layer's shapes and next to no memory behind them: kernels can be compiled for them, not read them."""

from typing import Any, Final

import torch
from torch import Tensor

from moe_dispatch.experts import ExpertWeights
from moe_dispatch.problem import DType, MoEProblem
from moe_dispatch.workloads import torch_dtype

# Integer types by element size: the CUDA array interface has no BF16 and no e4m3.
_CARRIERS: Final[dict[int, str]] = {1: "|u1", 2: "<i2", 4: "<i4"}


def placeholder_weights(problem: MoEProblem, device: torch.device) -> ExpertWeights:
    """Weights that have the shapes of a layer's and the memory of one expert; only the first expert may be read.

    A CPU has no such trick and gets zeros of the full size. The problem names the layer; its M does not matter.
    """
    rows, K, N, E = problem.gate_up_rows, problem.K, problem.N, problem.E
    of_gate_up, of_down = problem.scale_shapes
    packed, of_scales = (2, torch.uint8) if problem.dtype == "mxfp4" else (1, torch.float32)
    scales: dict[str, Any] = (
        {
            "gate_up_scale": torch.ones(E, *of_gate_up, dtype=of_scales, device=device),
            "down_scale": torch.ones(E, *of_down, dtype=of_scales, device=device),
        }
        if problem.quantized
        else {}
    )
    biases: dict[str, Any] = (
        {
            "gate_up_bias": torch.zeros(E, rows, dtype=torch_dtype(problem.act_dtype), device=device),
            "down_bias": torch.zeros(E, K, dtype=torch_dtype(problem.act_dtype), device=device),
        }
        if problem.bias
        else {}
    )
    return ExpertWeights(
        _placeholder((E, rows, K // packed), problem.dtype, device),
        _placeholder((E, K, N // packed), problem.dtype, device),
        activation=problem.activation,
        interleaved=problem.interleaved,
        routed_experts=problem.routed_experts,
        **scales,
        **biases,
    )


class _OneExpertForAll:
    """Memory of one expert under an array interface that claims to hold all of them."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self._memory = torch.zeros(shape[1], shape[2], dtype=dtype, device=device)
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": shape,
            "typestr": _CARRIERS[dtype.itemsize],
            "data": (self._memory.data_ptr(), False),
            "version": 3,
        }


def _placeholder(shape: tuple[int, int, int], dtype: DType, device: torch.device) -> Tensor:
    element = torch_dtype(dtype)
    if device.type != "cuda":
        return torch.zeros(shape, dtype=element, device=device)
    return torch.as_tensor(_OneExpertForAll(shape, element, device), device=device).view(element)
