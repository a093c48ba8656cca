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
from collections import deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moe_dispatch.machine import Machine
from moe_dispatch.policies.calibration.worker_process import CandidateFailedError, WorkerDiedError, WorkerProcess
from moe_dispatch.policies.measurements.schema import Candidate, Layer
from moe_dispatch.settings import cache_dir
from moe_dispatch.system.files import locked, write_atomically

MOST_PROCESSES: Final = 32
# A process takes seconds to start: one for every so many jobs pays.
LEAST_JOBS: Final = 8
# Loading a library takes tens of seconds of a core, so few processes do, beside the one that has to in any case.
LIBRARY_PROCESSES: Final = 3
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
    start: Callable[[], WorkerProcess],
    remembered: Path,
    deadline: float = math.inf,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    libraries: Collection[str] = (),
    racer: WorkerProcess | None = None,
) -> list[str]:
    """Compile the jobs that were not compiled before, each process taking the next one.

    What fails here is tried again in the race, which has the memory to itself, and names what fails there too. An
    interruption or the deadline leaves the rest to it.

    Args:
        jobs: What to compile.
        start: Makes a worker.
        remembered: File of what was compiled before; see `compiled_path`. Without it, or with the compilers' own
            caches gone, all this costs is time.
        deadline: Of `time.monotonic`.
        on_progress: Told of the jobs taken and of all of them, from any thread.
        libraries: Backends that load a library.
        racer: The worker of the race, which loads these libraries meanwhile; it is not closed.

    Returns:
        What failed, each with the reason.
    """
    before = _read(remembered)
    queue = Jobs((job for job in in_order(jobs) if job.digest not in before), libraries)
    total = len(queue)
    done: list[str] = []
    failed: list[str] = []
    lock, stop = threading.Lock(), threading.Event()

    def work(worker: WorkerProcess, *, to_keep: bool) -> None:
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
            # Not in a thread of the pool: a worker dies with the thread that started it.
            if racer is not None:
                work(racer, to_keep=True)
            for one in running:
                one.result()
        finally:
            stop.set()
            with lock:
                _remember(remembered, done)
    return failed


class Jobs:
    """Jobs by backend: a process stays with what it has loaded, since loading a library takes it tens of seconds.

    Args:
        jobs: In the order in which they are done.
        libraries: Backends that load one.
    """

    def __init__(self, jobs: Iterable[Job], libraries: Collection[str]) -> None:
        self._jobs: dict[str, deque[Job]] = {}
        for job in jobs:
            self._jobs.setdefault(job.candidate.backend, deque()).append(job)
        self._seats = dict.fromkeys(libraries, LIBRARY_PROCESSES)

    def __len__(self) -> int:
        return sum(map(len, self._jobs.values()))

    def take(self, loaded: set[str], *, every_library: bool) -> Job | None:
        """The next job for a process that has loaded these backends, which is noted; None if there is none for it.

        Args:
            loaded: Its backends.
            every_library: Whether it has to load them all in any case, and so begins with a job of each.
        """
        waiting = {name: len(jobs) for name, jobs in self._jobs.items() if jobs}
        loading = {name for name in waiting if name in self._seats and name not in loaded}
        open_ = loading if every_library else {name for name in loading if self._seats[name]}
        if open_ and (every_library or not loaded):
            name = min(open_)  # loading takes longest, so it comes first
        else:
            mine = [name for name in waiting if name in loaded]
            choice = mine or [name for name in waiting if name not in loading] or sorted(open_)
            if not choice:
                return None
            name = max(choice, key=lambda name: waiting[name])
        if name in loading and not every_library:
            self._seats[name] -= 1
        loaded.add(name)
        return self._jobs[name].popleft()


def _remember(path: Path, done: Iterable[str]) -> None:
    # Lost for want of room, it is compiled again, which finds the compilers' caches full.
    with contextlib.suppress(OSError), locked(path):
        write_atomically(path, "".join(f"{line}\n" for line in sorted({*_read(path), *done})))


def _read(path: Path) -> set[str]:
    try:
        return set(path.read_text(encoding="ascii", errors="replace").split())
    except OSError:
        return set()
