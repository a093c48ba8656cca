"""Exchanges for GPUs on a CPU: their kernels in Triton's interpreter, between processes with gloo and shared memory."""

import contextlib
import ctypes
import dataclasses
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch.arrived_rows import PeerRows, TravellingRows
from moe_dispatch.backends.exchange import push
from moe_dispatch.numerics import quantize_rows_torch
from moe_dispatch.parallel import device_code
from moe_dispatch.parallel.direct import DirectExchange, DirectFp8Exchange
from moe_dispatch.parallel.exchange import CallKind, Exchange, LocalTokens
from moe_dispatch.parallel.expert_parallel import ExpertParallel
from moe_dispatch.parallel.gather import GatherExchange
from moe_dispatch.parallel.placement import Placement
from moe_dispatch.parallel.registry import EXCHANGES
from moe_dispatch.parallel.symmetric_memory import SymmetricMemory

KIND: Final = CallKind(
    M=8, K=64, N=32, E=8, topk=2, dtype="bf16", act_dtype="bf16", tokens="sharded", division="experts", ranks=2
)
POISON: Final = 0xA5  # every byte of shared memory but its header


class PackedGather(GatherExchange):
    """`gather` as on NCCL: one all-gather of packed segments."""

    name = "packed_twin"

    def packs(self, row_bytes: int) -> bool:
        return row_bytes % 16 == 0


class SharedMemoryDirect(DirectExchange):
    """`direct` with files that every process maps in place of torch's symmetric memory."""

    name = "direct_twin"
    requirements = dataclasses.replace(DirectExchange.requirements, transports=frozenset({"gloo"}))

    def _allocate(self, nbytes: int) -> SymmetricMemory:
        folder = Path(os.environ["MOE_DISPATCH_CACHE_DIR"]).parent
        files = [folder / f"memory-{nbytes}-{rank}" for rank in range(self.collectives.size)]
        number = 0
        while files[self.collectives.rank].with_suffix(f".{number}").exists():
            number += 1
        files = [file.with_suffix(f".{number}") for file in files]
        header = device_code.push().header_bytes(self.collectives.size)
        files[self.collectives.rank].write_bytes(bytes(header) + bytes([POISON]) * (nbytes - header))
        dist.barrier(self.collectives.group)
        maps = [torch.from_file(str(file), shared=True, size=nbytes, dtype=torch.uint8) for file in files]
        return SymmetricMemory(maps[self.collectives.rank], tuple(each.data_ptr() for each in maps), maps)

    def _programs(self) -> int:
        return 3

    def _launches(self) -> dict[str, Any]:
        return {"pdl": False, "aside": None}


class SharedMemoryDirectFp8(SharedMemoryDirect, DirectFp8Exchange):
    """`direct_fp8` in the same way."""

    name = "direct_fp8_twin"
    requirements = dataclasses.replace(DirectFp8Exchange.requirements, transports=frozenset({"gloo"}))


TWINS: Final[tuple[str, ...]] = (PackedGather.name, SharedMemoryDirect.name)


@contextlib.contextmanager
def registered(*exchanges: type[Exchange]) -> Iterator[None]:
    """Groups made inside have these among their exchanges, or the twins."""
    exchanges = exchanges or (PackedGather, SharedMemoryDirect, SharedMemoryDirectFp8)
    for exchange in exchanges:
        EXCHANGES.register(exchange.name, exchange)
    try:
        yield
    finally:
        for exchange in exchanges:
            EXCHANGES.unregister(exchange.name)


def direct(timeout: float = 60.0, *, quantizes: bool = False) -> SharedMemoryDirect:
    name = "direct_fp8_twin" if quantizes else "direct_twin"
    with registered():
        exchange = ExpertParallel(timeout=timeout)._session.exchanges[name]
    assert isinstance(exchange, SharedMemoryDirect)
    return exchange


def tokens_of(rank: int, seed: int, M: int, K: int, topk: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that every rank can make again."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    hidden = torch.randn(M, K, generator=generator).to(dtype)
    ids = torch.randint(-1, 9, (M, topk), generator=generator)
    return hidden, torch.rand(M, topk, generator=generator), ids


def rounds_of_the_protocol(rounds: int, *, skewed: bool, quantizes: bool, aside: bool) -> list[str]:
    """Calls of changing shapes, with pauses of the ranks' own, each compared bit for bit; returns what is wrong.

    The results of a rank are its rows times its number plus one, in the dtype of rows, so that the order in which they
    are added shows. Some calls have no tokens on a rank, and capacity beyond everyone's.
    """
    exchange, rank, size = direct(quantizes=quantizes), dist.get_rank(), dist.get_world_size()
    place = Placement(rank, (2, 3, 3)[:size])
    shared, own = random.Random(0), random.Random(rank)  # noqa: S311 - shapes and pauses of a test
    faults = []
    for number in range(rounds):
        K, topk = shared.choice((128, 384) if quantizes else (16, 64)), shared.choice((1, 3))
        dtype = shared.choice((torch.float32, torch.float16))
        counts = [shared.choice((0, 1, 2, 7, 20)) for _ in range(size)]
        capacity = max(*counts, 1) + shared.choice((0, 2))
        every = [tokens_of(each, number, counts[each], K, topk, dtype) for each in range(size)]
        _pause(own, skewed)
        hidden, weights, ids = every[rank]
        tokens = LocalTokens(hidden, weights, ids, place, capacity, replicated=False)
        with mock.patch.object(push, "ROWS_ASIDE", 0) if aside else contextlib.nullcontext():
            arrived = exchange.dispatch(tokens)
        every_row: Any = arrived.hidden_states
        if aside:
            assert isinstance(every_row, TravellingRows)
            if not torch.equal(every_row.own, hidden) or every_row.first != rank * capacity:
                faults.append(f"round {number}: own rows")
            every_row = every_row.wait()
        _pause(own, skewed)
        for origin, (rows, its_weights, its_ids) in enumerate(every):
            part = slice(origin * capacity, origin * capacity + counts[origin])
            local = torch.where((its_ids >= 0) & (its_ids < place.experts), its_ids - place.first, -1)
            local = torch.where(its_ids < 0, -1, local).int()
            padding = arrived.topk_ids[part.stop : (origin + 1) * capacity]
            sent = quantize_rows_torch(rows) if quantizes else (rows,)
            there = every_row[:2] if quantizes else (every_row,)
            same = all(torch.equal(a[part].float(), b.float()) for a, b in zip(there, sent, strict=True))
            if not same or not torch.equal(arrived.topk_ids[part], local):
                faults.append(f"round {number}: tokens of rank {origin}")
            if not torch.equal(arrived.topk_weights[part], its_weights) or not (padding == -1).all():
                faults.append(f"round {number}: slots of rank {origin}")
        partial = torch.full((size * capacity, K), torch.nan, dtype=dtype)
        for origin, (rows, _, _) in enumerate(every):
            partial[origin * capacity : origin * capacity + counts[origin]] = rows * (rank + 1)
        # Some backends store results, whatever the other ranks' do.
        results = stored(partial, arrived.out) if own.random() < 0.5 else partial
        with mock.patch.object(TravellingRows, "wait") as waits:
            out = exchange.combine(results, arrived, tokens)
        if waits.called != aside:
            faults.append(f"round {number}: results do not wait for rows")
        total = torch.zeros(hidden.shape)
        for each in range(size):
            total += (hidden * (each + 1)).float()
        if not torch.equal(out, total.to(dtype)):
            faults.append(f"round {number}: results")
    return faults


def stored(partial: Tensor, out: PeerRows | None) -> PeerRows:
    """Store results in the memory of the ranks that they are for."""
    assert out is not None
    for rows, address in zip(partial.view(-1, out.rows, partial.shape[1]), out.addresses.tolist(), strict=True):
        memory = (ctypes.c_uint8 * rows.nbytes).from_address(address + out.offset)
        torch.frombuffer(memory, dtype=rows.dtype).copy_(rows.flatten())
    return out


def _pause(own: random.Random, skewed: bool) -> None:
    if skewed and own.random() < 0.5:
        time.sleep(own.random() * 0.01)


def a_rank_that_comes_too_late(victim: int, seconds: float, *, stores: bool) -> tuple[bool, bool, tuple[str, str]]:
    """One rank makes the second call when the others have given up.

    Returns:
        Whether the first call was right, whether the second one's results are NaN, and what the others' third raises.
    """
    exchange, rank, size = direct(timeout=100.0), dist.get_rank(), dist.get_world_size()
    place = Placement(rank, (2, 3, 3)[:size])
    hidden, weights, ids = tokens_of(rank, 0, 3, 16, 2, torch.float32)
    tokens = LocalTokens(hidden, weights, ids, place, 3, replicated=False)

    def call() -> Tensor:
        arrived = exchange.dispatch(tokens)
        assert isinstance(arrived.hidden_states, Tensor)
        partial = arrived.hidden_states.clone()
        return exchange.combine(stored(partial, arrived.out) if stores else partial, arrived, tokens)

    right = torch.equal(call(), hidden * size)
    dist.barrier()
    nan, raised = False, ("", "")
    if rank != victim:
        with mock.patch.object(exchange.collectives.watch, "timeout", seconds):
            nan = bool(call().isnan().all())
        try:
            call()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            raised = type(error).__name__, str(error)
    dist.barrier()
    if rank == victim:
        nan = bool(call().isnan().all())
    return right, nan, raised


def group_with(**options: Any) -> ExpertParallel:
    with registered():
        return ExpertParallel(**options)
