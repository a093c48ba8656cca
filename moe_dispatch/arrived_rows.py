"""Rows of a layer that came from several ranks, or that go to them, as a backend gets them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moe_dispatch.experts import ExpertWeights
from moe_dispatch.numerics import QuantizedRows

if TYPE_CHECKING:
    from moe_dispatch.backend import Inputs


@dataclass(frozen=True)
class PeerRows:
    """Memory for the output of a layer whose tokens are those of several ranks: each rank's rows lie in its own memory.

    Attributes:
        addresses: int64 ``[ranks]``: where each rank's memory begins, as this process reaches it.
        offset: Bytes from there to the rank's rows; a multiple of 16, as are the addresses.
        rows: Rows of each rank: row i of the output is row ``i % rows`` of rank ``i // rows``.
        like: An empty tensor of the output's dtype.
    """

    addresses: Tensor
    offset: int
    rows: int
    like: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The output's dtype."""
        return self.like.dtype


@dataclass(frozen=True)
class TravellingRows:
    """Rows of several ranks, those of other ranks perhaps still on their way: another stream's kernels bring them.

    Attributes:
        rows: ``[M, K]`` of all ranks, quantised or not; to be read after `wait`.
        own: ``[m, K]``, this rank's, not quantised, which are here.
        first: Where its rows begin in those of all ranks.
        arrived: Recorded behind the kernels that bring the rows; None where they have run.
        captured: Whether it was recorded while a CUDA graph was captured.
    """

    rows: Tensor | QuantizedRows
    own: Tensor
    first: int
    arrived: torch.cuda.Event | None
    captured: bool

    def wait(self) -> Tensor | QuantizedRows:
        """All rows, for which what comes next on the current stream waits."""
        if self.arrived is not None and torch.cuda.is_current_stream_capturing() == self.captured:
            # A capture may not wait for what came before it, and begins when the device is idle.
            torch.cuda.current_stream().wait_event(self.arrived)
        return self.rows


class ArrivedInputs(NamedTuple):
    """The arguments of a call over rows that came from several ranks.

    Attributes:
        rows: ``[M, K]``.
        experts: This rank's weights.
        topk_weights: fp32 ``[M, topk]``, contiguous.
        topk_ids: int32 or int64 ``[M, topk]``, contiguous.
        out: Where backends that store in peers' memory may put the output; None if nowhere.
    """

    rows: Tensor | QuantizedRows | TravellingRows
    experts: ExpertWeights
    topk_weights: Tensor
    topk_ids: Tensor
    out: PeerRows | None = None

    @property
    def act_dtype(self) -> torch.dtype:
        """The dtype of the output, and of the rows before they were quantised."""
        if isinstance(self.rows, TravellingRows):
            return self.rows.own.dtype
        return self.rows.act_dtype if isinstance(self.rows, QuantizedRows) else self.rows.dtype

    @property
    def quantized(self) -> bool:
        """Whether the rows are quantised."""
        rows = self.rows.rows if isinstance(self.rows, TravellingRows) else self.rows
        return isinstance(rows, QuantizedRows)

    def ordinary(self) -> "Inputs":
        """The same for `Backend.run`: all rows here, and dequantised."""
        rows = self.rows.wait() if isinstance(self.rows, TravellingRows) else self.rows
        if isinstance(rows, QuantizedRows):
            rows = rows.dequantized().to(rows.act_dtype)
        return rows, self.experts, self.topk_weights, self.topk_ids
