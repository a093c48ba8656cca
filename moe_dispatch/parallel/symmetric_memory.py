"""Memory of every rank that all of a group address: torch's symmetric memory, whose interface is not public yet."""

import functools
import importlib
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch.system import failures

_MODULE: Final = "torch.distributed._symmetric_memory"
_ALIGNMENT: Final = 16


@dataclass(frozen=True)
class SymmetricMemory:
    """One allocation of every rank.

    Attributes:
        own: This rank's, uint8.
        addresses: The address of each rank's in this process.
        kept: What keeps the other ranks' memory mapped.
    """

    own: Tensor
    addresses: tuple[int, ...]
    kept: Any


@functools.cache
def missing() -> str:
    """Why torch has no symmetric memory here; empty if it has."""
    try:
        module = importlib.import_module(_MODULE)
    except ImportError as error:
        return f"torch {torch.__version__} has no symmetric memory ({error})"
    absent = [name for name in ("empty", "rendezvous") if not hasattr(module, name)]
    return f"torch {torch.__version__}: {_MODULE} lacks {', '.join(absent)}" if absent else ""


def allocate(group: dist.ProcessGroup, device: torch.device, nbytes: int) -> SymmetricMemory:
    """Memory of so many bytes on every rank, all zero. Collective.

    Each rank writes its number into its own memory and reads the others', so that an address that leads elsewhere is
    not found out by results.

    Raises:
        RuntimeError: A rank has not so much memory, devices do not reach each other, or an address leads elsewhere.
    """
    module = importlib.import_module(_MODULE)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    own, fault = None, ""
    try:
        own = module.empty(nbytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # out of memory, most likely: the others must not wait for this rank
        fault = failures.summary(error)
    ready = torch.tensor([own is not None], dtype=torch.int32, device=device)
    dist.all_reduce(ready, dist.ReduceOp.MIN, group)
    if own is None or not ready.item():
        raise RuntimeError(f"{nbytes >> 20} MiB of symmetric memory: {fault or 'another rank has none'}")
    handle = module.rendezvous(own, group.group_name)
    # Not get_buffer, which counts from the start of the allocation: torch may take several tensors from one.
    peers = [handle.get_remote_tensor(peer, (nbytes,), torch.uint8) for peer in range(size)]
    own.zero_()
    own[0] = _mark(rank)
    torch.cuda.synchronize(device)
    dist.barrier(group, device_ids=[device.index])
    seen = [int(peer[0]) for peer in peers]
    dist.barrier(group, device_ids=[device.index])  # all have read
    own.zero_()
    torch.cuda.synchronize(device)
    dist.barrier(group, device_ids=[device.index])  # all have memory that is zero
    addresses = tuple(peer.data_ptr() for peer in peers)
    if seen != [_mark(peer) for peer in range(size)]:
        raise RuntimeError(f"symmetric memory of ranks 0 to {size - 1} holds {seen}: addresses lead elsewhere")
    if any(address % _ALIGNMENT for address in addresses):
        raise RuntimeError(f"symmetric memory is not aligned to {_ALIGNMENT} bytes")
    return SymmetricMemory(own, addresses, (handle, peers))


def _mark(rank: int) -> int:
    return rank % 255 + 1
