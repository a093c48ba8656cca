"""The three ways in which DeepGEMM takes the rows of the experts.

Sizes are functions of shapes alone, contents are decided on the device. DeepGEMM stores whole tiles, so each expert's
rows start on a tile; what lies between an expert's last row and its next tile is never read by anything of ours.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from moe_dispatch.experts import ExpertWeights

from ..stages.activate import activate, activate_quantize
from ..stages.quantize import gather, gather_quantize
from ..stages.route import Routing, buffer_rows, route
from ..stages.spread import activate_spread, activate_spread_quantize, spread, spread_quantize
from .library import Library

# The tallest tile that DeepGEMM picks for the masked layout on sm_90.
MASKED_TILE: Final = 128

# Values alone, or e4m3 values and their multipliers.
Operand = Tensor | tuple[Tensor, Tensor]


def masked_capacity(slots: int) -> int:
    """Rows per expert in the masked layout: whole tiles for the worst case, every slot naming one expert."""
    return math.ceil(slots / MASKED_TILE) * MASKED_TILE


def expected_rows(slots: int, E: int) -> int:
    """Rows that an expert gets under even routing; DeepGEMM picks its tiles by it and takes nothing below 1."""
    return max(1, math.ceil(slots / E))


def layout_rows(layout: str, slots: int, E: int, alignment: int = MASKED_TILE) -> int:
    """Rows of the token buffer in a layout."""
    if layout == "masked":
        return buffer_rows(slots, E, capacity=masked_capacity(slots))
    return buffer_rows(slots, E, alignment=alignment)


class Rows(ABC):
    """The rows of one call, laid out for DeepGEMM.

    Args:
        library: DeepGEMM.
        experts: Weights.
        topk_ids: ``[M, topk]``.
    """

    def __init__(self, library: Library, experts: ExpertWeights, topk_ids: Tensor) -> None:
        self._library, self._experts, self._topk_ids = library, experts, topk_ids
        self._fp8 = experts.dtype == "fp8"
        self._expected = expected_rows(topk_ids.numel(), experts.E)
        self.routing = self._route()

    @abstractmethod
    def _route(self) -> Routing:
        """Lay the rows out."""

    @abstractmethod
    def fill(self, hidden_states: Tensor) -> Operand:
        """Bring ``[M, K]`` to its rows, quantised if the weights are FP8."""

    @abstractmethod
    def activate(self, gate_up: Tensor) -> Operand:
        """Bias and activation of ``[rows, 2N]``, quantised if the weights are FP8."""

    @abstractmethod
    def multiply(self, operand: Operand, weight: Tensor, weight_scale: Tensor | None) -> Tensor:
        """``[rows, C]`` times each expert's ``[E, R, C]`` transposed: BF16 ``[rows, R]``."""

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
        if self._fp8:
            # Multipliers stay as they are: rounding them to powers of two is for sm_100.
            fp8(a=a, b=(weight, weight_scale), d=d, disable_ue8m0_cast=True, **layout)
        else:
            bf16(a=a, b=weight, d=d, **layout)


class PsumRows(Rows):
    """Experts one after another; DeepGEMM gets where each one ends and never looks at the tail."""

    def _route(self) -> Routing:
        # An expert without rows must end where it starts, on a tile, or the difference wraps around; `route` does so.
        return route(self._topk_ids, self._experts.E, alignment=self._library.alignment())

    def fill(self, hidden_states: Tensor) -> Operand:
        """See `Rows.fill`."""
        topk = self._topk_ids.shape[1]
        if self._fp8:
            return gather_quantize(hidden_states, self.routing, topk, column_major_scales=True)
        return gather(hidden_states, self.routing, topk)

    def activate(self, gate_up: Tensor) -> Operand:
        """See `Rows.activate`."""
        experts = self._experts
        options: dict[str, Any] = {
            "interleaved": experts.interleaved, "bias": experts.gate_up_bias, "topk_ids": self._topk_ids,
        }  # fmt: skip
        if self._fp8:
            return activate_quantize(gate_up, self.routing, experts.activation, column_major_scales=True, **options)
        return activate(gate_up, self.routing, experts.activation, **options)

    def multiply(self, operand: Operand, weight: Tensor, weight_scale: Tensor | None) -> Tensor:
        """See `Rows.multiply`."""
        d = weight.new_empty(self.routing.slot_of_row.shape[0], weight.shape[1], dtype=torch.bfloat16)
        functions = self._library.bf16_contiguous, self._library.fp8_contiguous
        self._call(functions, operand, weight, weight_scale, d, **self._grouped_layout())
        return d

    def _grouped_layout(self) -> dict[str, Any]:
        return {
            "grouped_layout": self.routing.ends,
            "use_psum_layout": True,
            "expected_m_for_psum_layout": self._expected,
        }


class ContiguousRows(PsumRows):
    """The same rows; DeepGEMM gets each one's expert and runs over the tail as well, to no effect."""

    def _route(self) -> Routing:
        routing = super()._route()
        # The tail is -1: FP8 skips such tiles, BF16 computes them for expert 0; neither result is ever combined.
        ids = self._topk_ids.flatten()[routing.slot_of_row.clamp(min=0).long()]
        self._expert_of_row = torch.where(routing.slot_of_row >= 0, ids, -1).int()
        return routing

    def _grouped_layout(self) -> dict[str, Any]:
        return {"grouped_layout": self._expert_of_row}


class MaskedRows(Rows):
    """As many rows for each expert as it could ever get; DeepGEMM gets how many are real.

    Nearly all of the buffer is padding, so the stages go by slots and never look at a row without one.
    """

    def _route(self) -> Routing:
        self._capacity = masked_capacity(self._topk_ids.numel())
        routing = route(self._topk_ids, self._experts.E, capacity=self._capacity)
        self._counts = routing.ends - routing.starts
        return routing

    def fill(self, hidden_states: Tensor) -> Operand:
        """See `Rows.fill`."""
        topk = self._topk_ids.shape[1]
        if self._fp8:
            return spread_quantize(hidden_states, self.routing, topk, self._capacity)
        return spread(hidden_states, self.routing, topk)

    def activate(self, gate_up: Tensor) -> Operand:
        """See `Rows.activate`."""
        experts = self._experts
        stage = activate_spread_quantize if self._fp8 else activate_spread
        return stage(
            gate_up,
            self.routing,
            experts.activation,
            self._capacity,
            interleaved=experts.interleaved,
            bias=experts.gate_up_bias,
        )

    def multiply(self, operand: Operand, weight: Tensor, weight_scale: Tensor | None) -> Tensor:
        """See `Rows.multiply`."""
        E, rows, columns = weight.shape
        d = weight.new_empty(E, self._capacity, rows, dtype=torch.bfloat16)
        a: Operand
        if isinstance(operand, tuple):
            a = operand[0].view(E, self._capacity, columns), operand[1]
        else:
            a = operand.view(E, self._capacity, columns)
        functions = self._library.bf16_masked, self._library.fp8_masked
        self._call(functions, a, weight, weight_scale, d, masked_m=self._counts, expected_m=self._expected)
        return d.view(E * self._capacity, rows)
