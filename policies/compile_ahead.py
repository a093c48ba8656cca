"""Compiles what a calibration is about to time, on all cores, before its race.

Triton, vLLM and DeepGEMM compile on a candidate's first run, one after another in the process that asks, and keep the
result on disk. So many processes each run candidates once on a call that asks for nothing: every id is -1. Kernels are
compiled and launched, and no weight is read, which is why the weights can be shapes with next to no memory behind them.
"""

import contextlib
import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moe_dispatch.machine import Machine
from moe_dispatch.storage import cache_dir, locked, write_atomically

from .schema import Candidate, Layer
from .supervisor import CandidateFailedError, Supervisor, WorkerDiedError

MOST_PROCESSES: Final = 32
# A process takes seconds to start: one for every so many jobs pays.
LEAST_JOBS: Final = 4
# Written down every so many jobs, for a calibration that runs meanwhile.
KEPT_EVERY: Final = 32


@dataclass(frozen=True)
class Job:
    """A candidate to be compiled for a token count."""

    layer: Layer
    M: int
    candidate: Candidate

    @property
    def digest(self) -> str:
        """Names it together with the versions of what compiles it."""
        named = (self.layer.key, self.M, self.candidate.identity, sorted(self.candidate.versions.items()))
        return hashlib.sha256(repr((*named, self.candidate.package, self.candidate.commit)).encode()).hexdigest()[:16]


def in_order(jobs: Iterable[Job]) -> list[Job]:
    """One token count of each candidate first: the others mostly find its kernels compiled."""
    place: dict[object, int] = {}
    ordered = []
    for job in jobs:
        key = job.layer.key, job.candidate.identity
        place[key] = place.get(key, -1) + 1
        ordered.append((place[key], job))
    return [job for _, job in sorted(ordered, key=lambda pair: pair[0])]


def compiled_path(machine: Machine, directory: Path | None = None) -> Path:
    """Where it is remembered what was compiled on a machine."""
    return (directory or cache_dir()) / "compiled" / f"{machine.fingerprint}.txt"


def compile_ahead(
    jobs: Iterable[Job],
    start: Callable[[], Supervisor],
    remembered: Path,
    deadline: float = math.inf,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Compile the jobs that were not compiled before, each process taking the next one.

    What fails here fails again in the race, which names it. An interruption or the deadline leaves the rest to it.

    Args:
        jobs: What to compile.
        start: Makes a worker.
        remembered: File of what was compiled before; see `compiled_path`. Without it, or with the compilers' own
            caches gone, all this costs is time.
        deadline: Of `time.monotonic`.
        on_progress: Told of the jobs done and of all of them, from any thread.
    """
    before = _read(remembered)
    queue = [job for job in in_order(jobs) if job.digest not in before]
    total = len(queue)
    done: list[str] = []
    lock, stop = threading.Lock(), threading.Event()

    def work() -> None:
        worker = start()
        loaded: set[str] = set()
        try:
            while queue and not stop.is_set() and time.monotonic() < deadline:
                with lock:
                    if not queue:
                        return
                    # Loading a library takes a process seconds, so it stays with what it has loaded.
                    job = queue.pop(next((i for i, one in enumerate(queue) if one.candidate.backend in loaded), 0))
                loaded.add(job.candidate.backend)
                with contextlib.suppress(WorkerDiedError, CandidateFailedError):
                    worker.compile(job.layer, job.M, job.candidate)
                with lock:
                    done.append(job.digest)
                    if len(done) % KEPT_EVERY == 0:
                        _remember(remembered, done)
                    if on_progress is not None:
                        on_progress(len(done), total)
        finally:
            worker.close()

    processes = min(MOST_PROCESSES, os.cpu_count() or 1, math.ceil(total / LEAST_JOBS))
    if not processes:
        return
    with ThreadPoolExecutor(processes) as pool:
        try:
            for running in [pool.submit(work) for _ in range(processes)]:
                running.result()
        finally:
            stop.set()
            with lock:
                _remember(remembered, done)


def _remember(path: Path, done: Iterable[str]) -> None:
    # Lost for want of room, it is compiled again, which finds the compilers' caches full.
    with contextlib.suppress(OSError), locked(path):
        write_atomically(path, "".join(f"{line}\n" for line in sorted({*_read(path), *done})))


def _read(path: Path) -> set[str]:
    try:
        return set(path.read_text(encoding="ascii", errors="replace").split())
    except OSError:
        return set()
