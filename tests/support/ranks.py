"""Processes that form a gloo group and run functions together: the ranks of the tests of expert parallelism."""

import contextlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

# Imports torch once; each rank is a fork of a process that has done nothing else.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.ranks", "tests.parallel.programs"])
PATIENCE = 120.0  # Seconds for one function: the cores may be busy with other tests.


@dataclass(frozen=True)
class Raised:
    """What a function raised on a rank, how many seconds after its start, and its traceback."""

    name: str
    text: str
    seconds: float
    trace: str


class Ranks:
    """Some processes in one gloo group.

    Args:
        size: How many.
        folder: For the file by which they meet, and their caches.
    """

    def __init__(self, size: int, folder: Path) -> None:
        self.size = size
        self._pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(theirs, rank, size, str(folder)), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def outcomes(self, function: Callable[..., Any], *arguments: Any, but: Sequence[int] = ()) -> list[Any]:
        """Run a function on every rank: what each returned, or `Raised`; None for a rank in `but`, which ends in it."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results: list[Any] = []
        for rank, pipe in enumerate(self._pipes):
            if rank in but:
                results.append(None)
                continue
            assert pipe.poll(PATIENCE), f"rank {rank} did not answer within {PATIENCE} s"
            results.append(pipe.recv())
        return results

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run a function on every rank, none of which may raise."""
        results = self.outcomes(function, *arguments)
        for rank, result in enumerate(results):
            assert not isinstance(result, Raised), f"rank {rank}: {result.trace}"
        return results

    def end(self) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


@contextlib.contextmanager
def ranks(size: int, folder: Path) -> Iterator[Ranks]:
    """Some processes for the time of a block."""
    started = Ranks(size, folder)
    try:
        yield started
    finally:
        started.end()


def _serve(pipe: Connection, rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["MOE_DISPATCH_CACHE_DIR"] = f"{folder}/cache"
    os.environ["MOE_DISPATCH_DISABLE"] = "torch_grouped"  # its kernels would run in Triton's interpreter, slowly
    store = FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE))
    while (order := pipe.recv()) is not None:
        function, arguments = order
        start = time.monotonic()
        try:
            result = function(*arguments)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            result = Raised(type(error).__name__, str(error), time.monotonic() - start, traceback.format_exc())
        pipe.send(result)
    os._exit(0)  # a group in which a rank was lost does not come down by itself
