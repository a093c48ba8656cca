"""The collectives that exchanges are made of, on NCCL and on gloo, with a failure told as the rank that is lost."""

import datetime
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, ReduceScatterOptions

from moe_dispatch.errors import InvalidInputError
from moe_dispatch.parallel.watch import Watch

# torch 2.13 renamed these two and deprecates the old names, the only ones that torch 2.11 has.
all_gather_flat: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_flat: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Collectives:
    """Collectives of one group on tensors of one device. Every rank must call the same ones in the same order.

    On gloo they block the host, for at most the watch's timeout. NCCL's are launched on the current stream; what goes
    wrong there is up to NCCL's own watchdog.

    Args:
        group: The process group.
        device: Where the tensors are.
        watch: Told of failures.

    Attributes:
        group: As given.
        watch: As given.
        device: As given.
        rank: This process's rank in the group.
        size: Ranks of the group.
        library: ``"nccl"`` or ``"gloo"``.

    Raises:
        InvalidInputError: The group has no backend for tensors of this device.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, watch: Watch) -> None:
        self.group, self.watch = group, watch
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.device = device
        self.library = _library(group, device)
        # Private in torch. They skip the checks of torch.distributed's functions, half of a call's time.
        gather, scatter = (getattr(group, name, None) for name in ("_allgather_base", "_reduce_scatter_base"))
        self._all_gather = _launcher(gather, AllgatherOptions()) or partial(all_gather_flat, group=group)
        self._reduce_scatter = _launcher(scatter, ReduceScatterOptions()) or partial(reduce_scatter_flat, group=group)

    @property
    def capturing(self) -> bool:
        """Whether a CUDA graph is captured."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def all_gather(self, rows: Tensor) -> Tensor:
        """Every rank's ``[C, …]``, one after another: ``[ranks·C, …]``. All ranks give the same shape."""
        out = rows.new_empty(self.size * rows.shape[0], *rows.shape[1:])
        self.all_gather_in_place(out, rows)
        return out

    def all_gather_in_place(self, rows: Tensor, own: Tensor) -> None:
        """Fill ``[ranks·C, …]``, of which every rank has written its own block of C: `own`, a view of `rows`."""
        if self.library == "nccl":
            self._launch(self._all_gather, rows, own)
        else:
            self._finish(all_gather_flat, rows, own)

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        """The sum over ranks of this rank's block of ``[ranks·C, K]``: ``[C, K]``.

        gloo adds in the tensors' dtype, one rank after another, and not every version has the operation for every
        dtype. So there it is an all-to-all of blocks, which are added in fp32 and rounded once.
        """
        if self.library == "gloo":
            blocks = torch.empty_like(rows)
            self._finish(dist.all_to_all_single, blocks, rows)
            return blocks.view(self.size, -1, *rows.shape[1:]).sum(0, dtype=torch.float32).to(rows.dtype)
        out = rows.new_empty(rows.shape[0] // self.size, *rows.shape[1:])
        self._launch(self._reduce_scatter, out, rows)
        return out

    def all_reduce(self, rows: Tensor) -> Tensor:
        """The sum over ranks, in place. On gloo it is added in fp32 and rounded once."""
        if self.library == "gloo" and rows.dtype != torch.float32:
            wide = rows.float()
            self._finish(dist.all_reduce, wide)
            return rows.copy_(wide)
        self._finish(dist.all_reduce, rows)
        return rows

    def all_to_all(self, rows: Tensor, sent: list[int], received: list[int], room: int = 0) -> Tensor:
        """Give each rank its rows, and get this rank's from each.

        Args:
            rows: ``[sum(sent), …]``, ordered by destination.
            sent: Rows for each rank.
            received: Rows from each rank.
            room: Rows of the result's memory, at least sum(received).

        Returns:
            ``[max(room, sum(received)), …]``, ordered by origin; rows beyond those received are uninitialised.
        """
        count = sum(received)
        out = rows.new_empty(max(room, count), *rows.shape[1:])
        self._finish(dist.all_to_all_single, out[:count], rows, received, sent)
        return out

    def _launch(self, collective: Callable[[Tensor, Tensor], None], out: Tensor, rows: Tensor) -> None:
        try:
            collective(out, rows)
        except RuntimeError as error:
            raise self.watch.blamed(error, time.monotonic() + self.watch.timeout) from error

    def _finish(self, collective: Any, *arguments: Any) -> None:
        with self.watch.waiting(self.watch.timeout):
            if self.library == "nccl":
                collective(*arguments, group=self.group)
                return
            work = collective(*arguments, group=self.group, async_op=True)
            work.wait(datetime.timedelta(seconds=self.watch.timeout))


def _launcher(method: Any, options: Any) -> Callable[[Tensor, Tensor], None] | None:
    """Calls a process group's method, with results on the current stream; None where this torch has no such method."""
    if method is None or not hasattr(options, "asyncOp"):
        return None
    options.asyncOp = False

    def launch(out: Tensor, rows: Tensor) -> None:
        if (work := method(out, rows, options)) is not None:
            work.wait()

    return launch


def _library(group: dist.ProcessGroup, device: torch.device) -> str:
    """The library that serves tensors of a device in a group."""
    configured = dict(
        pair.split(":") for pair in dist.get_backend_config(group).split(",") if ":" in pair
    )  # fmt: skip
    library = configured.get(device.type, "")
    needed = "nccl" if device.type == "cuda" else "gloo"
    if library != needed:
        raise InvalidInputError(
            f"tensors on {device.type} need a process group with {needed}, and this one has "
            f"{library or 'none'} for them; dist.new_group(backend={needed!r}) makes one"
        )
    return library
