"""The kernels that exchanges launch. They stand beside the backends, and are found by name like those."""
# ruff: noqa: D102 - they are documented there

import functools
import importlib
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from moe_dispatch.arrived_rows import PeerRows, TravellingRows
from moe_dispatch.numerics import QuantizedRows


class Pack(Protocol):
    """The module ``exchange.pack``; see there."""

    @staticmethod
    def spare_rows(capacity: int, topk: int, row_bytes: int) -> int: ...

    @staticmethod
    def pack_tokens(
        hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, segment: Tensor, *, capacity: int, E: int
    ) -> None: ...

    @staticmethod
    def unpack_slots(
        wire: Tensor, *, ranks: int, capacity: int, topk: int, first_expert: int
    ) -> tuple[Tensor, Tensor]: ...


class PeerMemory(Protocol):
    """The class ``exchange.push.PeerMemory``; see there."""

    @property
    def lost_rank(self) -> int | None: ...

    def push_tokens(
        self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, capacity: int, first_experts: Tensor,
        E: int, seconds: float, quantize: bool,
    ) -> tuple[Tensor | QuantizedRows | TravellingRows, Tensor, Tensor]: ...  # fmt: skip

    def peer_rows(self, capacity: int, K: int, dtype: torch.dtype) -> PeerRows: ...

    def push_results(self, partial: Tensor | PeerRows, M: int, K: int, *, capacity: int, seconds: float) -> Tensor: ...


class Push(Protocol):
    """The module ``exchange.push``; see there."""

    @staticmethod
    def header_bytes(ranks: int) -> int: ...

    @staticmethod
    def tokens_bytes(ranks: int, capacity: int, topk: int, row_bytes: int, groups: int) -> int: ...

    @staticmethod
    def results_bytes(ranks: int, capacity: int, row_bytes: int) -> int: ...

    @staticmethod
    def PeerMemory(  # noqa: N802
        own: Tensor, addresses: Sequence[int], rank: int, tokens_bytes: int, programs: int, on_host: Tensor, *,
        pdl: bool, aside: torch.cuda.Stream | None,
    ) -> PeerMemory: ...  # fmt: skip


@functools.cache
def pack() -> Pack:
    """The kernels that put a rank's tokens into one block of memory."""
    return cast("Pack", importlib.import_module("moe_dispatch.backends.exchange.pack"))


@functools.cache
def push() -> Push:
    """The kernels that store in the memory of other ranks."""
    return cast("Push", importlib.import_module("moe_dispatch.backends.exchange.push"))
