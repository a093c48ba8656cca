"""Compiles the candidates of a calibration on all cores, before they are timed.

Triton, vLLM and DeepGEMM compile in the process that first runs a candidate, one kernel after another, and keep the
result on disk. So several processes each run candidates once on a call whose ids are all -1. Such a call compiles and
launches the kernels but reads no weights, which is why the weights can be placeholders without memory behind them.
Candidates of which that is not true (`Backend.reads_whole_layer`) are left to their first runs.
"""

import contextlib
import hashlib
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moe_dispatch.machine import Machine
from moe_dispatch.policies.calibration.worker_process import (
    BudgetSpentError,
    CandidateFailedError,
    Worker,
    WorkerDiedError,
)
from moe_dispatch.policies.measurements.schema import Candidate, LayerShape
from moe_dispatch.settings import cache_dir
from moe_dispatch.system.files import locked, read_bytes, write_atomically

MOST_PROCESSES: Final = 32
# Jobs per process, because starting a process takes seconds.
LEAST_JOBS: Final = 8
# Processes that load the same library, beside the measuring worker, because loading takes tens of seconds of a core.
LIBRARY_PROCESSES: Final = 3
# The record of compiled jobs is written after this many of them, for a calibration that runs at the same time.
KEPT_EVERY: Final = 32


@dataclass(frozen=True)
class Job:
    """A candidate to be compiled for a layer and a token count."""

    layer: LayerShape
    M: int
    candidate: Candidate

    @property
    def digest(self) -> str:
        """A name of the job that changes with the versions of everything that compiles it."""
        parts = (self.layer.key, self.M, self.candidate.identity, sorted(self.candidate.versions.items()))
        return hashlib.sha256(repr((*parts, self.candidate.package, self.candidate.commit)).encode()).hexdigest()[:16]


def in_order(jobs: Iterable[Job]) -> list[Job]:
    """The jobs with one token count of each candidate first, since the kernels of the others are mostly the same."""
    place: dict[object, int] = {}
    ordered = []
    for job in jobs:
        key = job.layer.key, job.candidate.identity
        place[key] = place.get(key, -1) + 1
        ordered.append((place[key], job))
    return [job for _, job in sorted(ordered, key=lambda pair: pair[0])]


def compiled_path(machine: Machine, directory: Path | None = None) -> Path:
    """The file that records what was compiled on a machine."""
    return (directory or cache_dir()) / "compiled" / f"{machine.fingerprint}.txt"


def compile_ahead(
    jobs: Iterable[Job],
    start: Callable[[], Worker],
    remembered: Path,
    deadline: float = math.inf,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    libraries: Collection[str] = (),
    measuring_worker: Worker | None = None,
) -> list[str]:
    """Compile the jobs that were not compiled before, each process taking the next one.

    A job that fails here is compiled again by the candidate's first run, which has the memory to itself and reports
    what fails there too. After an interruption or the deadline the remaining jobs are left to the first runs as well.

    Args:
        jobs: What to compile.
        start: Makes a worker.
        remembered: File that records what was compiled before; see `compiled_path`. If it is lost, or the compilers'
            own caches are, only time is lost.
        deadline: Time of `time.monotonic` after which no job starts.
        on_progress: Called with the number of jobs taken and of all jobs, from any thread.
        libraries: Names of backends that load a library.
        measuring_worker: The worker that measures afterwards. It takes jobs too, so that it has loaded the libraries
            when it starts measuring, and it is not closed.

    Returns:
        A line for each job that failed, with the reason.
    """
    before = _read(remembered)
    queue = Jobs((job for job in in_order(jobs) if job.digest not in before), libraries)
    total = len(queue)
    done: list[str] = []
    failed: list[str] = []
    lock, stop = threading.Lock(), threading.Event()

    def work(worker: Worker, *, to_keep: bool) -> None:
        loaded: set[str] = set()
        try:
            while not stop.is_set() and time.monotonic() < deadline:
                with lock:
                    job = queue.take(loaded, every_library=to_keep)
                if job is None:
                    return
                reason = ""
                try:
                    worker.compile(job.layer, job.M, job.candidate)
                except BudgetSpentError:
                    return
                except (WorkerDiedError, CandidateFailedError) as error:
                    reason = f"{job.candidate.backend} at M={job.M} of {job.layer}: {error}"
                with lock:
                    if reason:
                        failed.append(reason)
                    else:
                        done.append(job.digest)
                    if len(done) % KEPT_EVERY == 0:
                        _remember(remembered, done)
                    if on_progress is not None:
                        on_progress(total - len(queue), total)
        finally:
            if not to_keep:
                worker.close()

    processes = min(MOST_PROCESSES, os.cpu_count() or 1, math.ceil(total / LEAST_JOBS))
    if not processes:
        return failed
    with ThreadPoolExecutor(processes) as pool:
        try:
            running = [pool.submit(work, start(), to_keep=False) for _ in range(processes)]
            # In this thread, not in one of the pool: Linux kills a worker when the thread that started it ends.
            if measuring_worker is not None:
                work(measuring_worker, to_keep=True)
            for future in running:
                future.result()
        finally:
            stop.set()
            with lock:
                _remember(remembered, done)
    return failed


class Jobs:
    """Waiting jobs by backend, each taken in the given order.

    A process stays with the libraries it has loaded, because loading takes tens of seconds.
    """

    def __init__(self, jobs: Iterable[Job], libraries: Collection[str]) -> None:
        self._jobs: dict[str, deque[Job]] = {}
        for job in jobs:
            self._jobs.setdefault(job.candidate.backend, deque()).append(job)
        self._may_load = dict.fromkeys(libraries, LIBRARY_PROCESSES)  # processes that may still load each library

    def __len__(self) -> int:
        return sum(map(len, self._jobs.values()))

    def take(self, loaded: set[str], *, every_library: bool) -> Job | None:
        """The next job for a process, whose backend is added to `loaded`; None if there is no job for it.

        With `every_library` the process has to load every library in any case, and so takes a job of each first.
        """
        waiting = {name: len(jobs) for name, jobs in self._jobs.items() if jobs}
        unloaded = {name for name in waiting if name in self._may_load and name not in loaded}
        loadable = unloaded if every_library else {name for name in unloaded if self._may_load[name]}
        if loadable and (every_library or not loaded):
            name = min(loadable)  # loading takes longest, so it comes first
        else:
            mine = [name for name in waiting if name in loaded]
            choice = mine or [name for name in waiting if name not in unloaded] or sorted(loadable)
            if not choice:
                return None
            name = max(choice, key=lambda name: waiting[name])
        if name in unloaded and not every_library:
            self._may_load[name] -= 1
        loaded.add(name)
        return self._jobs[name].popleft()


def _remember(path: Path, done: Iterable[str]) -> None:
    # An entry that cannot be written costs a second compilation, which the compilers' own caches make short.
    with contextlib.suppress(OSError), locked(path):
        write_atomically(path, "".join(f"{line}\n" for line in sorted({*_read(path), *done})))


def _read(path: Path) -> set[str]:
    try:
        return set(read_bytes(path).decode("ascii", errors="replace").split())
    except OSError:
        return set()
