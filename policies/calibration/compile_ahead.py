"""Compiles the candidates of a calibration or a benchmark on all cores, before they are timed.

Triton, vLLM and DeepGEMM compile in the process that first runs a candidate, one kernel after another, and keep the
result on disk. So several processes each run candidates once on a call whose ids are all -1. Such a call compiles and
launches the kernels but reads no weights, which is why the weights can be placeholders without memory behind them.
Candidates of which that is not true (`Backend.reads_whole_layer`) are left to their first runs.

Nothing is timed meanwhile: the processes launch on the device that measures, and take every core.
"""

import contextlib
import hashlib
import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moe_dispatch.backend import Backend
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

# Share of a budget after which nothing more is compiled ahead; the rest is compiled by each candidate's first run.
COMPILE_SHARE: Final = 0.5
MOST_PROCESSES: Final = 32
# Jobs per process, because starting a process takes seconds.
LEAST_JOBS: Final = 8
# Processes that load the same library, beside the measuring worker, because loading takes tens of seconds of a core.
LIBRARY_PROCESSES: Final = 3
# A backend's other jobs are left to their first runs after so many of them took a process down: another process takes
# seconds to start, and tens of seconds to load a library.
MOST_DEATHS: Final = 2
# The record of compiled jobs is written after this many of them, for a calibration that runs at the same time.
KEPT_EVERY: Final = 32
_CORES_OF_GROUP: Final = Path("/sys/fs/cgroup/cpu.max")


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

    def __str__(self) -> str:
        return f"{self.candidate.backend} at M={self.M} of {self.layer}"


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


def libraries_of(backends: Mapping[str, Backend] | Mapping[str, type[Backend]]) -> dict[str, str]:
    """The library that a backend loads, by the backend's name, of those that load one."""
    return {name: each.requirements.libraries[0] for name, each in backends.items() if each.requirements.libraries}


def compile_ahead(
    jobs: Iterable[Job],
    start: Callable[[], Worker],
    remembered: Path,
    deadline: float = math.inf,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    libraries: Mapping[str, str] | None = None,
    measuring_worker: Worker | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> list[str]:
    """Compile the jobs that were not compiled before, each process taking the next one.

    A job that fails here is compiled again by the candidate's first run, which has the memory to itself and reports
    what fails there too. After the deadline the remaining jobs are left to the first runs as well. An interruption ends
    the workers at once.

    Args:
        jobs: What to compile.
        start: Makes a worker.
        remembered: File that records what was compiled before; see `compiled_path`. If it is lost, or the compilers'
            own caches are, only time is lost.
        deadline: Time of `time.monotonic` after which no job starts.
        on_progress: Called with the number of jobs taken and of all jobs, from any thread.
        libraries: The library that a backend loads, by the backend's name.
        measuring_worker: The worker that measures afterwards. It takes jobs too, so that it has loaded the libraries
            when it starts measuring, and it is not closed.
        meanwhile: Called once in this thread while the workers compile, unless there is nothing to compile.

    Returns:
        A line for each job that failed, with the reason.
    """
    before = _read(remembered)
    queue = Jobs((job for job in in_order(jobs) if job.digest not in before), libraries or {})
    processes = min(MOST_PROCESSES, usable_cores(), math.ceil(len(queue) / LEAST_JOBS))
    if not processes:
        return []
    compilation = _Compilation(queue, remembered, deadline, on_progress)
    workers = [start() for _ in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        try:
            running = [pool.submit(compilation.work, worker, to_keep=False) for worker in workers]
            if meanwhile is not None:
                meanwhile()
            # In this thread, not in one of the pool: Linux kills a worker when the thread that started it ends.
            if measuring_worker is not None:
                compilation.work(measuring_worker, to_keep=True)
            for future in running:
                future.result()
        except BaseException:
            compilation.stop.set()
            for worker in workers:
                worker.kill()  # or the pool would wait for what they are compiling
            raise
        finally:
            compilation.stop.set()
            compilation.remember()
    return compilation.failed


def usable_cores() -> int:
    """Cores that this process may run on, and no more than its control group gets the time of: a container's limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, read_bytes(_CORES_OF_GROUP).split())
    except (OSError, ValueError):  # no control group, or no limit: "max"
        return cores
    return max(1, min(cores, quota // period))


class _Compilation:
    """What the threads share that each let a worker compile one job after another.

    Attributes:
        failed: A line for each job that failed.
        stop: Set when no further job is to start.
    """

    def __init__(
        self, queue: "Jobs", remembered: Path, deadline: float, on_progress: Callable[[int, int], None] | None
    ) -> None:
        self._queue, self._remembered, self._deadline, self._on_progress = queue, remembered, deadline, on_progress
        self._total = len(queue)
        self._done: list[str] = []
        self._deaths: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.failed: list[str] = []
        self.stop = threading.Event()

    def work(self, worker: Worker, *, to_keep: bool) -> None:
        """Have a worker compile until nothing is left for it."""
        loaded: set[str] = set()
        try:
            while not self.stop.is_set() and time.monotonic() < self._deadline:
                with self._lock:
                    job = self._queue.take(loaded, every_library=to_keep)
                if job is None:
                    return
                error: CandidateFailedError | WorkerDiedError | None = None
                try:
                    worker.compile(job.layer, job.M, job.candidate)
                except BudgetSpentError:
                    return
                except (WorkerDiedError, CandidateFailedError) as raised:
                    error = raised
                self._took(job, error)
        finally:
            if not to_keep:
                worker.close()

    def remember(self) -> None:
        """Record what was compiled."""
        with self._lock:
            _remember(self._remembered, self._done)

    def _took(self, job: Job, error: CandidateFailedError | WorkerDiedError | None) -> None:
        backend = job.candidate.backend
        with self._lock:
            if error is None:
                self._done.append(job.digest)
            else:
                self.failed.append(f"{job}: {error}")
                self._deaths[backend] += isinstance(error, WorkerDiedError)
                if self._deaths[backend] >= MOST_DEATHS:
                    self.failed += [f"{other}: not tried after that" for other in self._queue.drop(backend)]
            if len(self._done) % KEPT_EVERY == 0:
                _remember(self._remembered, self._done)
            if self._on_progress is not None:
                self._on_progress(self._total - len(self._queue), self._total)


class Jobs:
    """Waiting jobs by backend, each taken in the given order.

    A process stays with the libraries it has loaded, because loading takes tens of seconds.

    Args:
        libraries: The library that a backend loads, by the backend's name.
    """

    def __init__(self, jobs: Iterable[Job], libraries: Mapping[str, str]) -> None:
        self._jobs: dict[str, deque[Job]] = {}
        for job in jobs:
            self._jobs.setdefault(job.candidate.backend, deque()).append(job)
        self._libraries = libraries
        # Processes that may still load each library.
        self._may_load = dict.fromkeys(libraries.values(), LIBRARY_PROCESSES)

    def __len__(self) -> int:
        return sum(map(len, self._jobs.values()))

    def take(self, loaded: set[str], *, every_library: bool) -> Job | None:
        """The next job for a process; None if there is no job for it.

        Its library, or else its backend, is added to `loaded`. With `every_library` the process has to load every
        library in any case, and so takes a job of each first.
        """
        waiting = {name: len(jobs) for name, jobs in self._jobs.items() if jobs}
        unloaded = [name for name in waiting if name in self._libraries and self._libraries[name] not in loaded]
        loadable = [name for name in unloaded if every_library or self._may_load[self._libraries[name]]]
        if loadable and (every_library or not loaded):
            choice = loadable  # loading takes longest, so it comes first
        else:
            mine = [name for name in waiting if self._libraries.get(name, name) in loaded]
            choice = mine or [name for name in waiting if name not in unloaded] or loadable
        if not choice:
            return None
        # Of libraries, the one that the fewest processes have loaded.
        name = max(choice, key=lambda name: (self._may_load.get(self._libraries.get(name, ""), 0), waiting[name]))
        if name in unloaded and not every_library:
            self._may_load[self._libraries[name]] -= 1
        loaded.add(self._libraries.get(name, name))
        return self._jobs[name].popleft()

    def drop(self, backend: str) -> list[Job]:
        """Take all waiting jobs of a backend."""
        return list(self._jobs.pop(backend, ()))


def _remember(path: Path, done: Iterable[str]) -> None:
    # An entry that cannot be written costs a second compilation, which the compilers' own caches make short.
    with contextlib.suppress(OSError), locked(path):
        write_atomically(path, "".join(f"{line}\n" for line in sorted({*_read(path), *done})))


def _read(path: Path) -> set[str]:
    try:
        return set(read_bytes(path).decode("ascii", errors="replace").split())
    except OSError:
        return set()
