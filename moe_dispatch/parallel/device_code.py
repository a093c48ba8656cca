"""The kernels that exchanges launch. They stand beside the backends, and are found by name like those."""

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
    def spare_rows(capacity: int, topk: int, row_bytes: int) -> int: ...  # noqa: D102

    @staticmethod
    def pack_tokens(  # noqa: D102
        hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, segment: Tensor, *, capacity: int, E: int
    ) -> None: ...

    @staticmethod
    def unpack_slots(  # noqa: D102
        wire: Tensor, *, ranks: int, capacity: int, topk: int, first_expert: int
    ) -> tuple[Tensor, Tensor]: ...


class PeerMemory(Protocol):
    """The class ``exchange.push.PeerMemory``; see there."""

    @property
    def lost_rank(self) -> int | None: ...  # noqa: D102

    def push_tokens(  # noqa: D102
        self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, capacity: int, first_experts: Tensor,
        E: int, seconds: float, quantize: bool,
    ) -> tuple[Tensor | QuantizedRows | TravellingRows, Tensor, Tensor]: ...  # fmt: skip

    def peer_rows(self, capacity: int, K: int, dtype: torch.dtype) -> PeerRows: ...  # noqa: D102

    def push_results(  # noqa: D102
        self, partial: Tensor | PeerRows, M: int, K: int, *, capacity: int, seconds: float
    ) -> Tensor: ...


class Push(Protocol):
    """The module ``exchange.push``; see there."""

    @staticmethod
    def header_bytes(ranks: int) -> int: ...  # noqa: D102

    @staticmethod
    def tokens_bytes(ranks: int, capacity: int, topk: int, row_bytes: int, groups: int) -> int: ...  # noqa: D102

    @staticmethod
    def results_bytes(ranks: int, capacity: int, row_bytes: int) -> int: ...  # noqa: D102

    @staticmethod
    def PeerMemory(  # noqa: D102, N802
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
