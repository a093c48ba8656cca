"""Weights that are shapes with next to no memory behind them: enough to compile kernels for, not to be read."""

from typing import Any, Final

import torch
from torch import Tensor

from moe_dispatch.experts import ExpertWeights
from moe_dispatch.problem import DType, MoEProblem
from moe_dispatch.workloads import torch_dtype

# Integers of an element's size, which an array interface knows where it does not know the type.
_CARRIERS: Final[dict[int, str]] = {1: "|u1", 2: "<i2", 4: "<i4"}


def placeholder_weights(problem: MoEProblem, device: torch.device) -> ExpertWeights:
    """Weights that have the shapes of a layer's and the memory of one expert; to be passed by, not to be read."""
    rows, K, N, E = problem.gate_up_rows, problem.K, problem.N, problem.E
    (up_rows, up_columns), (down_rows, down_columns) = problem.quant_blocks
    scales = (
        {
            "gate_up_scale": torch.ones(E, up_rows, up_columns, device=device),
            "down_scale": torch.ones(E, down_rows, down_columns, device=device),
        }
        if problem.dtype == "fp8"
        else {}
    )
    biases = (
        {"gate_up_bias": torch.zeros(E, rows, device=device), "down_bias": torch.zeros(E, K, device=device)}
        if problem.bias
        else {}
    )
    return ExpertWeights(
        _phantom((E, rows, K), problem.dtype, device),
        _phantom((E, K, N), problem.dtype, device),
        activation=problem.activation,
        interleaved=problem.interleaved,
        **scales,
        **biases,
    )


class _Claim:
    """Memory of the first entry that claims to be all of them."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self._memory = torch.zeros(shape[1], shape[2], dtype=dtype, device=device)
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": shape,
            "typestr": _CARRIERS[dtype.itemsize],
            "data": (self._memory.data_ptr(), False),
            "version": 3,
        }


def _phantom(shape: tuple[int, int, int], dtype: DType, device: torch.device) -> Tensor:
    plain = torch_dtype(dtype)
    if device.type != "cuda":
        return torch.zeros(shape, dtype=plain, device=device)
    return torch.as_tensor(_Claim(shape, plain, device), device=device).view(plain)
