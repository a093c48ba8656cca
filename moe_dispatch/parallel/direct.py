"""Tokens and results stored in each other's memory by kernels: for GPUs that address each other, as by NVLink."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from moe_dispatch.arrived_rows import PeerRows, TravellingRows
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.parallel import device_code, symmetric_memory
from moe_dispatch.parallel.collectives import Collectives
from moe_dispatch.parallel.device_code import PeerMemory
from moe_dispatch.parallel.exchange import Arrived, CallKind, Exchange, ExchangeRequirements, LocalTokens
from moe_dispatch.parallel.placement import Placement
from moe_dispatch.parallel.symmetric_memory import SymmetricMemory
from moe_dispatch.problem import QUANT_BLOCK

_PAIR: Final = 16  # Bytes of one access: rows are whole ones.


@dataclass(frozen=True)
class Room:
    """Memory for calls of up to some size.

    Attributes:
        memory: The memory of all ranks.
        tokens: Bytes of its part for tokens.
        results: Bytes of its part for results.
        shared: The allocation behind it, which keeps the other ranks' memory mapped.
    """

    memory: PeerMemory
    tokens: int
    results: int
    shared: SymmetricMemory


class DirectExchange(Exchange):
    """One kernel each way, and no copy on arrival: `backends/exchange/push.py` has the protocol and why it is safe.

    Backends whose last kernel can, store each result in the memory of the rank that the token came from: results travel
    while the weighted sums are computed, and the second kernel of the exchange only waits and adds.

    Memory is made by `prepare`, for the greatest call so far in a group. Where `warm_up` has not done it the first call
    does, which then cannot be captured in a CUDA graph. It stays, as captured graphs use it. All ranks make it alike.

    Calls of one group may not run at the same time on several streams. A rank that does not come makes the results NaN
    and every later call raise `ExpertParallelLostError`; nothing hangs, and no results are wrong silently.
    """

    name = "direct"
    _quantizes: ClassVar = False
    requirements = ExchangeRequirements(
        tokens=frozenset({"sharded"}), transports=frozenset({"nccl"}), libraries=(("triton", ""),), one_domain=True
    )

    def __init__(self, collectives: Collectives) -> None:
        super().__init__(collectives)
        self._rooms: list[Room] = []
        self._first_experts: dict[Placement, Tensor] = {}

    def unavailable_reasons(self) -> tuple[str, ...]:
        """See `Exchange.unavailable_reasons`."""
        return tuple(filter(None, (*super().unavailable_reasons(), symmetric_memory.missing())))

    def unsupported_reasons(self, kind: CallKind) -> tuple[str, ...]:
        """See `Exchange.unsupported_reasons`."""
        reasons = super().unsupported_reasons(kind)
        if kind.row_bytes % _PAIR:
            return (*reasons, f"needs rows of a multiple of {_PAIR} bytes, got {kind.row_bytes}")
        return reasons

    def prepare(self, kind: CallKind) -> None:
        """See `Exchange.prepare`."""
        self._room(kind.M, kind.topk, kind.K, kind.row_bytes)

    def dispatch(self, tokens: LocalTokens) -> Arrived:
        """See `Exchange.dispatch`."""
        watch, place = self.collectives.watch, tokens.placement
        for room in self._rooms:
            if (lost := room.memory.lost_rank) is not None:
                raise watch.missing(lost)
        K, topk = tokens.hidden_states.shape[1], tokens.topk_ids.shape[1]
        memory = self._room(tokens.capacity, topk, K, K * tokens.hidden_states.element_size()).memory
        rows, weights, ids = memory.push_tokens(
            tokens.hidden_states, tokens.topk_weights, tokens.topk_ids, capacity=tokens.capacity,
            first_experts=self._first_of(place), E=place.experts, seconds=watch.timeout, quantize=self._quantizes,
        )  # fmt: skip
        out = memory.peer_rows(tokens.capacity, K, tokens.hidden_states.dtype)
        return Arrived(rows, weights, ids, memory, out)

    def combine(self, partial: Tensor | PeerRows, arrived: Arrived, tokens: LocalTokens) -> Tensor:
        """See `Exchange.combine`."""
        memory: PeerMemory = arrived.route
        if isinstance(arrived.hidden_states, TravellingRows):
            arrived.hidden_states.wait()  # also where nothing read them, as the next call's must not overtake them
        (M, K), seconds = tokens.hidden_states.shape, self.collectives.watch.timeout
        return memory.push_results(partial, M, K, capacity=tokens.capacity, seconds=seconds)

    def _room(self, capacity: int, topk: int, K: int, row_bytes: int) -> Room:
        """The memory for a call; it follows from the calls before, and so is the same on all ranks."""
        push, ranks = device_code.push(), self.collectives.size
        sent, groups = (K, K // QUANT_BLOCK) if self._quantizes else (row_bytes, 0)
        tokens = push.tokens_bytes(ranks, capacity, topk, sent, groups)
        results = push.results_bytes(ranks, capacity, row_bytes)
        for room in self._rooms:
            if tokens <= room.tokens and results <= room.results:
                return room
        self._refuse_capture(f"memory for {capacity} tokens")
        shared = self._allocate(push.header_bytes(ranks) + tokens + results)
        on_host = torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=shared.own.is_cuda)
        memory = push.PeerMemory(
            shared.own, shared.addresses, self.collectives.rank, tokens, self._programs(), on_host, **self._launches()
        )  # fmt: skip
        self._rooms.append(Room(memory, tokens, results, shared))
        return self._rooms[-1]

    def _allocate(self, nbytes: int) -> SymmetricMemory:
        return symmetric_memory.allocate(self.collectives.group, self.collectives.device, nbytes)

    def _programs(self) -> int:
        """How many programs of a kernel run at a time, whatever their registers."""
        return torch.cuda.get_device_properties(self.collectives.device).multi_processor_count

    def _launches(self) -> dict[str, Any]:
        device = self.collectives.device
        stream: Any = torch.cuda.Stream  # which torch does not annotate
        return {"pdl": torch.cuda.get_device_capability(device) >= (9, 0), "aside": stream(device)}

    def _refuse_capture(self, what: str) -> None:
        if self.collectives.capturing:
            raise InvalidInputError(
                f"a CUDA graph needs {what} from before its capture: call warm_up for this layer and token count"
            )

    def _first_of(self, place: Placement) -> Tensor:
        if place not in self._first_experts:
            self._refuse_capture("the layer's placement on the device")
            firsts = [0] * len(place.held) if place.division == "columns" else [0, *place.ends[:-1]]
            self._first_experts[place] = torch.tensor(firsts, dtype=torch.int32, device=self.collectives.device)
        return self._first_experts[place]


class DirectFp8Exchange(DirectExchange):
    """`direct` for block FP8: each rank quantises its own tokens and sends codes and multipliers, half the bytes.

    The experts read what they would have made of the rows themselves, so that the results have the same bits on a
    backend that quantises activations. On one that does not, they have the error of that quantisation.
    """

    name = "direct_fp8"
    requirements = dataclasses.replace(
        DirectExchange.requirements, dtypes=frozenset({"fp8"}), act_dtypes=frozenset({"bf16", "fp16"})
    )
    _quantizes = True

    def unsupported_reasons(self, kind: CallKind) -> tuple[str, ...]:
        """See `Exchange.unsupported_reasons`."""
        reasons = super().unsupported_reasons(kind)
        if kind.K % QUANT_BLOCK:
            return (*reasons, f"needs rows of a multiple of {QUANT_BLOCK} columns, got {kind.K}")
        return reasons
