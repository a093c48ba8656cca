"""The two ways in which DeepGEMM takes the rows of the experts.

Sizes are functions of shapes alone; contents are decided on the device. DeepGEMM stores whole tiles, so each expert's
rows start on a tile. The rows between an expert's last one and the next tile are never read outside DeepGEMM.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from moe_dispatch.backends.deep_gemm.library import Library
from moe_dispatch.backends.stages.activate import activate, activate_quantize
from moe_dispatch.backends.stages.quantize import gather, gather_quantize, spreads_scales
from moe_dispatch.backends.stages.route import buffer_rows, route
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.numerics import QuantizedRows

# The tallest tile that DeepGEMM picks for the masked layout on sm_90.
MASKED_TILE: Final = 128

# Values alone, or e4m3 values and their multipliers.
Operand = Tensor | tuple[Tensor, Tensor]


def masked_capacity(M: int) -> int:
    """Rows per expert in the masked layout: whole tiles for the worst case, in which every token names one expert."""
    return math.ceil(max(M, 1) / MASKED_TILE) * MASKED_TILE


def expected_rows(slots: int, E: int) -> int:
    """Rows that each of E routed experts gets under even routing, at least 1; DeepGEMM picks its tiles by it."""
    return max(1, math.ceil(slots / E))


def layout_rows(layout: str, M: int, topk: int, E: int) -> int:
    """Most rows of the token buffer in a layout: the library may ask for a lower alignment than the tallest tile."""
    if layout == "masked":
        return buffer_rows(M * topk, E, capacity=masked_capacity(M))
    return buffer_rows(M * topk, E, alignment=MASKED_TILE)


class Rows(ABC):
    """The rows of one call, laid out for DeepGEMM."""

    def __init__(self, library: Library, experts: ExpertWeights, topk_ids: Tensor) -> None:
        self._library, self._experts, self._topk_ids = library, experts, topk_ids
        self._fp8 = experts.dtype == "fp8"
        self._expected = expected_rows(topk_ids.numel(), experts.routed_experts or experts.E)
        # DeepGEMM needs Hopper, where each stage may start while the kernel before it ends.
        self.pdl = topk_ids.is_cuda
        self._capacity = self._rows_per_expert()
        alignment = 1 if self._capacity else library.alignment()
        # `route` makes an expert without rows end where it starts, on a tile; else DeepGEMM's difference wraps around.
        by_row = self._fp8 and not self._capacity and spreads_scales(topk_ids.numel(), experts.K)
        self.routing = route(
            topk_ids, experts.E, alignment=alignment, capacity=self._capacity, by_row=by_row, pdl=self.pdl
        )

    @abstractmethod
    def _rows_per_expert(self) -> int | None:
        """Rows that every expert has; None where it depends on the routing."""

    @abstractmethod
    def multiply(self, operand: Operand, weight: Tensor, weight_scale: Tensor | None) -> Tensor:
        """``[rows, C]`` times each expert's ``[E, R, C]`` transposed: BF16 ``[rows, R]``."""

    def fill(self, hidden_states: Tensor | QuantizedRows) -> Operand:
        """Copy the tokens ``[M, K]`` to their rows, quantised if the weights are FP8."""
        topk = self._topk_ids.shape[1]
        if self._fp8 or isinstance(hidden_states, QuantizedRows):
            return gather_quantize(hidden_states, self.routing, topk, **self._scales(), pdl=self.pdl)
        return gather(hidden_states, self.routing, topk, pdl=self.pdl)

    def activate(self, gate_up: Tensor) -> Operand:
        """Bias and activation of ``[rows, 2N]``, quantised if the weights are FP8."""
        experts = self._experts
        options: dict[str, Any] = {
            "interleaved": experts.interleaved, "bias": experts.gate_up_bias, "topk_ids": self._topk_ids,
            "pdl": self.pdl,
        }  # fmt: skip
        if self._fp8:
            return activate_quantize(gate_up, self.routing, experts.activation, **self._scales(), **options)
        return activate(gate_up, self.routing, experts.activation, **options)

    def _scales(self) -> dict[str, Any]:
        return {"column_major_scales": True, "capacity": self._capacity}

    def _call(
        self,
        functions: tuple[Callable[..., None], Callable[..., None]],
        a: Operand,
        weight: Tensor,
        weight_scale: Tensor | None,
        d: Tensor,
        **layout: Any,
    ) -> None:
        bf16, fp8 = functions
        if weight.requires_grad:
            weight = weight.detach()  # sgl-deep-gemm up to 0.2.1 takes tensors by way of DLPack, which refuses these
        if self._fp8:
            # Multipliers stay fp32: rounding them to powers of two is for sm_100.
            fp8(a=a, b=(weight, weight_scale), d=d, disable_ue8m0_cast=True, **layout)
        else:
            bf16(a=a, b=weight, d=d, **layout)


class PsumRows(Rows):
    """Experts one after another. DeepGEMM is told where each expert ends, and never visits the tail of the buffer."""

    def _rows_per_expert(self) -> None:
        return None

    def multiply(self, operand: Operand, weight: Tensor, weight_scale: Tensor | None) -> Tensor:
        """See `Rows.multiply`."""
        d = weight.new_empty(self.routing.slot_of_row.shape[0], weight.shape[1], dtype=torch.bfloat16)
        functions = self._library.bf16_contiguous, self._library.fp8_contiguous
        layout = {"use_psum_layout": True, "expected_m_for_psum_layout": self._expected}
        self._call(functions, operand, weight, weight_scale, d, grouped_layout=self.routing.ends, **layout)
        return d


class MaskedRows(Rows):
    """As many rows for each expert as it could ever get. DeepGEMM is told how many of them are used.

    Nearly all of the buffer is padding, so the stages run over slots and never visit a row without one.
    """

    def _rows_per_expert(self) -> int:
        return masked_capacity(self._topk_ids.shape[0])

    @cached_property
    def _counts(self) -> Tensor:
        return self.routing.ends - self.routing.starts

    def multiply(self, operand: Operand, weight: Tensor, weight_scale: Tensor | None) -> Tensor:
        """See `Rows.multiply`."""
        E, rows, columns = weight.shape
        capacity = self._rows_per_expert()
        d = weight.new_empty(E, capacity, rows, dtype=torch.bfloat16)
        a: Operand
        if isinstance(operand, tuple):
            a = operand[0].view(E, capacity, columns), operand[1]
        else:
            a = operand.view(E, capacity, columns)
        functions = self._library.bf16_masked, self._library.fp8_masked
        self._call(functions, a, weight, weight_scale, d, masked_m=self._counts, expected_m=self._expected)
        return d.view(E * capacity, rows)
