"""The parent's side of the worker: starts it, asks it, and turns whatever happens to it into a reason."""

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Protocol

from moe_dispatch.backend import Backend
from moe_dispatch.errors import MoEDispatchError
from moe_dispatch.policies.measurements.schema import Candidate, LayerShape
from moe_dispatch.problem import Mode
from moe_dispatch.settings import Settings

# Variables that hold paths, which are made absolute because the worker's working directory is another one.
PATH_VARIABLES: Final = (
    "CUDA_CACHE_PATH", "DG_JIT_CACHE_DIR", "HF_HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR",
    "TORCH_HOME", "TRITON_CACHE_DIR", "TRITON_DUMP_DIR", "TRITON_HOME", "VLLM_CACHE_ROOT", "XDG_CACHE_HOME",
)  # fmt: skip
MACHINE_VARIABLE: Final = "MOE_DISPATCH_MACHINE"
START_TIMEOUT_S: Final = 180.0
PREPARE_TIMEOUT_S: Final = 300.0
_TAIL_BYTES: Final = 2000
_ROOT: Final = Path(__file__).parents[3]  # the folder that this very package was imported from


class WorkerDiedError(MoEDispatchError):
    """The worker is gone, and with it the candidate that it was running.

    Attributes:
        cause: What happened, as a sentence.
        timed_out: Whether it was killed because an answer took too long.
    """

    def __init__(self, cause: str, *, timed_out: bool = False) -> None:
        self.cause, self.timed_out = cause, timed_out
        super().__init__(cause)


class BudgetSpentError(MoEDispatchError):
    """The deadline of the calibration passed while the worker was at work; it was killed."""


class NotPreparedError(MoEDispatchError):
    """A layer, its inputs or their fp32 reference could not be made; no candidate had a part in that."""


class CandidateFailedError(MoEDispatchError):
    """A candidate raised or was wrong, and the worker lives."""

    def __init__(self, cause: str) -> None:
        self.cause = cause
        super().__init__(cause)


@dataclass(frozen=True)
class PointSetup:
    """What a worker is told of a point, once; after that it knows the candidates by their index."""

    M: int
    mode: Mode
    routings: tuple[str, ...]
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Samples:
    """Times of one candidate that took turns with others.

    Attributes:
        us: Its time in each round, in µs; samples of one round lie side by side in time. Empty if it failed.
        failed: What it raised; empty if it was timed.
    """

    us: tuple[float, ...] = ()
    failed: str = ""


class Worker(Protocol):
    """What a calibration asks of the process in which candidates run.

    Every method may also raise `BudgetSpentError`. Those that run a point's candidates, which they know by their index,
    raise `CandidateFailedError` where one raised or is wrong, `WorkerDiedError` where it crashed, hung or lost the
    device, and `NotPreparedError` where layer and point could not be made again after that.

    Attributes:
        spent: Seconds that answers took, by operation.
    """

    spent: dict[str, float]

    def layer(self, layer: LayerShape) -> None:
        """Allocate the weights of a layer.

        Raises:
            NotPreparedError: They do not fit, or the worker died while it made them.
        """

    def point(self, setup: PointSetup) -> None:
        """Make the inputs of a point and their fp32 references, and take its candidates.

        Raises:
            NotPreparedError: They do not fit, or the worker died while it made them.
        """

    def compile(self, layer: LayerShape, M: int, candidate: Candidate) -> None:
        """Compile one candidate, without the layer's weights.

        Raises:
            WorkerDiedError: It crashed, hung or lost the device; the next request starts another process.
            CandidateFailedError: The candidate raised.
        """

    def launch(self, candidate: int) -> float:
        """Run a candidate twice, alone: µs of the second run."""

    def check(self, candidate: int, tolerance: float, *, briefly: bool) -> float:
        """Compare a candidate with the fp32 reference: its relative error, which may not exceed the tolerance.

        With `briefly` it runs only eagerly and on the first routing distribution.
        """

    def time(self, candidates: Sequence[int], routing: str, budget_s: float, rounds: int) -> list[Samples]:
        """Time candidates that take turns, for `budget_s` seconds each and at least `rounds` samples."""

    def energy(self, candidate: int, seconds: float) -> float:
        """Energy of one call in joules, averaged over `seconds` of calls on the inputs of all distributions."""

    def close(self) -> None:
        """End the worker, whatever it does."""

    def kill(self) -> None:
        """End it from another thread, whose request raises `WorkerDiedError`; it starts no process any more."""


# Makes a worker from a device, the backends ("module:Class" by name), the timeout and the deadline.
StartWorker = Callable[[str, dict[str, str], float, float], Worker]


class WorkerProcess:
    """A `Worker` in a process of its own, which is started again after it died.

    Args:
        device: ``"cuda:0"`` or ``"cpu"``.
        backends: Name -> "module:Class" of the backends registered in this process.
        timeout_s: Seconds that a request may take for each of its candidates.
        deadline: Time of `time.monotonic` at which the worker is killed, whatever it does.

    Attributes:
        restarts: Number of processes started.
    """

    def __init__(self, device: str, backends: dict[str, str], timeout_s: float, deadline: float = math.inf) -> None:
        self._device, self._backends, self._timeout_s, self._deadline = device, backends, timeout_s, deadline
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: IO[str] | None = None
        self._answers = -1
        self._buffer = b""
        self._stderr: IO[bytes] | None = None
        self._layer: LayerShape | None = None
        self._setup: PointSetup | None = None
        self._killed = False
        self.restarts = 0
        self.spent: dict[str, float] = {}

    def layer(self, layer: LayerShape) -> None:
        """See `Worker.layer`."""
        self._layer, self._setup = layer, None
        self._prepare("layer", layer=layer.model_dump())

    def point(self, setup: PointSetup) -> None:
        """See `Worker.point`."""
        self._setup = None
        if self._process is None and self._layer is not None:
            self.layer(self._layer)
        candidates = [(candidate.backend, candidate.config) for candidate in setup.candidates]
        self._prepare("point", M=setup.M, mode=setup.mode, routings=setup.routings, candidates=candidates)
        self._setup = setup

    def compile(self, layer: LayerShape, M: int, candidate: Candidate) -> None:
        """See `Worker.compile`."""
        self._ask(
            "compile", self._timeout_s, layer=layer.model_dump(), M=M, candidate=(candidate.backend, candidate.config)
        )

    def launch(self, candidate: int) -> float:
        """See `Worker.launch`."""
        answer = self._ask_about_point("launch", 1, candidate=candidate)
        return float(answer["us"])

    def check(self, candidate: int, tolerance: float, *, briefly: bool) -> float:
        """See `Worker.check`."""
        answer = self._ask_about_point("check", 1, candidate=candidate, tolerance=tolerance, briefly=briefly)
        if "wrong" in answer:
            raise CandidateFailedError(answer["wrong"])
        return float(answer["error"])

    def time(self, candidates: Sequence[int], routing: str, budget_s: float, rounds: int) -> list[Samples]:
        """See `Worker.time`."""
        answer = self._ask_about_point(
            "time", len(candidates), candidates=list(candidates), routing=routing, budget_s=budget_s, rounds=rounds
        )
        return [
            Samples(us=tuple(us)) if us else Samples(failed=f"raised {failed or 'nothing, and was not timed'}")
            for us, failed in zip(answer["us"], answer["failed"], strict=True)
        ]

    def energy(self, candidate: int, seconds: float) -> float:
        """See `Worker.energy`."""
        answer = self._ask_about_point("energy", 1, seconds, candidate=candidate, seconds=seconds)
        return float(answer["joules"])

    def close(self) -> None:
        """See `Worker.close`."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
            if self._requests is not None:
                with contextlib.suppress(OSError):
                    self._requests.close()
            os.close(self._answers)
        if self._stderr is not None:
            self._stderr.close()
            self._stderr = None

    def kill(self) -> None:
        """See `Worker.kill`."""
        self._killed = True
        if (process := self._process) is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _prepare(self, op: str, **request: Any) -> None:
        try:
            self._ask(op, PREPARE_TIMEOUT_S, **request)
        except CandidateFailedError as error:
            self.close()  # releases whatever memory it holds; the next point starts from an empty device
            raise NotPreparedError(error.cause) from error
        except WorkerDiedError as error:
            raise NotPreparedError(error.cause) from error

    def _ask_about_point(self, op: str, count: int, longer_s: float = 0.0, **request: Any) -> dict[str, Any]:
        """Ask about `count` candidates; after a death, layer and point are made again first."""
        if self._process is None and self._setup is not None:
            self.point(self._setup)
        return self._ask(op, self._timeout_s * count + longer_s, **request)

    def _ask(self, op: str, timeout_s: float, **request: Any) -> dict[str, Any]:
        if self._process is None:
            self._start()
        answer = self._exchange(op, timeout_s, **request)
        if answer.get("lost"):
            self.close()
            raise WorkerDiedError(f"lost the CUDA context: {answer['raised']}")
        if "raised" in answer:
            raise CandidateFailedError(f"{'out of memory:' if answer['memory'] else 'raised'} {answer['raised']}")
        return answer

    def _start(self) -> None:
        to_read, requests = os.pipe()
        answers, to_write = os.pipe()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        # -P: a file of the working directory must not be imported in place of a module.
        self._process = subprocess.Popen(  # noqa: S603 - our own module under our own interpreter
            [sys.executable, "-P", "-m", "moe_dispatch.policies.calibration.worker", str(to_read), str(to_write)],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=self._stderr,  # libraries print; the protocol has pipes of its own
            stderr=self._stderr,
            pass_fds=(to_read, to_write),
            env=worker_environment(),
            start_new_session=True,  # Ctrl-C is for this process to handle
        )
        os.close(to_read)
        os.close(to_write)
        self._requests = os.fdopen(requests, "w", encoding="utf-8")
        self._answers, self._buffer = answers, b""
        self.restarts += 1
        if self._killed:  # by `kill`, which may have found no process yet
            self.close()
            raise WorkerDiedError("its worker was killed")
        answer = self._exchange("start", START_TIMEOUT_S, device=self._device, backends=self._backends)
        if "raised" in answer:
            self.close()
            raise WorkerDiedError(f"its worker could not start on {self._device}: {answer['raised']}")

    def _exchange(self, op: str, timeout_s: float, **request: Any) -> dict[str, Any]:
        assert self._requests is not None  # noqa: S101 - started
        try:
            print(json.dumps({"op": op, **request}), file=self._requests, flush=True)
        except BrokenPipeError:
            raise WorkerDiedError(self._exit_reason()) from None
        begin = time.monotonic()
        limit = min(begin + timeout_s, self._deadline)
        while b"\n" not in self._buffer:
            left = limit - time.monotonic()
            ready = select.select([self._answers], [], [], max(left, 0))[0]
            if not ready:
                self.close()
                if limit == self._deadline:
                    raise BudgetSpentError(f"the budget was spent {time.monotonic() - begin:.0f} s into {op!r}")
                # Slow and hung look alike, and on a CPU slow is likely.
                how = "too slow" if self._device == "cpu" else "hung"
                raise WorkerDiedError(f"{how}: no answer within {timeout_s:g} s", timed_out=True)
            chunk = os.read(self._answers, 1 << 16)
            if not chunk:
                raise WorkerDiedError(self._exit_reason())
            self._buffer += chunk
        self.spent[op] = self.spent.get(op, 0.0) + time.monotonic() - begin
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _exit_reason(self) -> str:
        """How the process ended, with the last line that it printed."""
        assert self._process is not None and self._stderr is not None  # noqa: S101, PT018 - it was started
        code = self._process.wait()
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - _TAIL_BYTES))
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        self.close()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        return f"its worker was {how}" + (f": {lines[-1][:300]}" if lines else "")


def worker_targets(backends: Mapping[str, type[Backend]]) -> dict[str, str]:
    """Backends as "module:Class" by name, as a worker registers them."""
    return {name: f"{backend.__module__}:{backend.__qualname__}" for name, backend in backends.items()}


def worker_environment() -> dict[str, str]:
    """The environment of a worker: this process's, with the same modules importable from any working directory."""
    # A time in Triton's interpreter is no measurement of anything.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Where this process imports from, except for the working directory as such ("", of `python -c`). This very package
    # is added last, after the standard library, in case it came from there.
    paths = [os.path.abspath(path) for path in sys.path if path]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*paths, str(_ROOT)]))
    environment["PYTHONSAFEPATH"] = "1"  # the same as -P, for processes that the worker starts
    for name in PATH_VARIABLES:
        if value := environment.get(name):
            environment[name] = os.path.abspath(value)
    if os.path.isfile(machine := Settings.from_environment().machine):  # and not the name of a shipped one
        environment[MACHINE_VARIABLE] = os.path.abspath(machine)
    return environment
