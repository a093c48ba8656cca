"""Runs the worker and outlives it: whatever happens to it becomes a reason."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO, Any, Final

from moe_dispatch.errors import MoEDispatchError
from moe_dispatch.policies.measurements.schema import Candidate, Layer

START_TIMEOUT_S: Final = 180.0
PREPARE_TIMEOUT_S: Final = 300.0
_TAIL_BYTES: Final = 2000


class WorkerDiedError(MoEDispatchError):
    """The worker is gone, and with it what it was running.

    Attributes:
        cause: What happened, for a person.
    """

    def __init__(self, cause: str) -> None:
        self.cause = cause
        super().__init__(cause)


class NotPreparedError(MoEDispatchError):
    """The layer, its inputs or their fp32 reference could not be made; no candidate had a part in it."""


class CandidateFailedError(MoEDispatchError):
    """The candidate raised, and the worker lives."""

    def __init__(self, cause: str, *, memory: bool) -> None:
        self.cause, self.memory = cause, memory
        super().__init__(cause)


class WorkerProcess:
    """A worker process that is started again after it died.

    Args:
        device: ``"cuda:0"`` or ``"cpu"``.
        backends: Name -> "module:Class" of what this process has registered.
        timeout_s: Most seconds that one candidate may take for one request.

    Attributes:
        restarts: How often a process was started.
        spent: Seconds that answers took, by operation.
    """

    def __init__(self, device: str, backends: dict[str, str], timeout_s: float) -> None:
        self._device, self._backends, self._timeout_s = device, backends, timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: IO[str] | None = None
        self._answers = -1
        self._buffer = b""
        self._stderr: IO[bytes] | None = None
        self._layer: Layer | None = None
        self._point: tuple[int, tuple[str, ...]] | None = None
        self.restarts = 0
        self.spent: dict[str, float] = {}

    def layer(self, layer: Layer) -> None:
        """Allocate a layer's weights.

        Raises:
            NotPreparedError: They do not fit, or the worker died of it.
        """
        self._layer, self._point = layer, None
        self._prepare("layer", layer=layer.model_dump())

    def point(self, M: int, routings: Sequence[str]) -> None:
        """Make the inputs of M tokens and what fp32 makes of them, for each routing distribution.

        Raises:
            NotPreparedError: They do not fit, or the worker died of it.
        """
        self._point = None
        if self._process is None and self._layer is not None:
            self.layer(self._layer)
        self._prepare("point", M=M, routings=list(routings))
        self._point = M, tuple(routings)

    def compile(self, layer: Layer, M: int, candidate: Candidate) -> None:
        """Have one candidate compiled, without the layer's weights.

        Raises:
            WorkerDiedError: It crashed, hung or lost the device meanwhile; the next request starts it again.
            CandidateFailedError: The candidate raised.
        """
        request = {"M": M, "backend": candidate.backend, "config": candidate.config}
        self._ask("compile", self._timeout_s, layer=layer.model_dump(), **request)

    def ask(self, op: str, work: float = 1.0, **request: Any) -> dict[str, Any]:
        """Ask about candidates; after a death the worker is started, and layer and point are made again first.

        Args:
            op: ``"launch"``, ``"check"`` or ``"time"``.
            work: Candidates in the request: each has the timeout to itself.
            **request: Its arguments.

        Raises:
            WorkerDiedError: It crashed, hung or lost the device while it answered.
            CandidateFailedError: The candidate raised.
            NotPreparedError: Layer and point could not be made again.
        """
        if self._process is None and self._point is not None:
            self.point(*self._point)
        return self._ask(op, self._timeout_s * work, **request)

    def close(self) -> None:
        """End the worker, whatever it does."""
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

    def _prepare(self, op: str, **request: Any) -> None:
        try:
            self._ask(op, PREPARE_TIMEOUT_S, **request)
        except CandidateFailedError as error:
            self.close()  # with whatever memory it holds; the next point starts from an empty device
            raise NotPreparedError(f"out of memory: {error.cause}" if error.memory else error.cause) from error
        except WorkerDiedError as error:
            raise NotPreparedError(error.cause) from error

    def _ask(self, op: str, timeout_s: float, **request: Any) -> dict[str, Any]:
        if self._process is None:
            self._start()
        answer = self._exchange(op, timeout_s, **request)
        if answer.get("lost"):
            self.close()
            raise WorkerDiedError(f"lost the CUDA context: {answer['raised']}")
        if "raised" in answer:
            raise CandidateFailedError(answer["raised"], memory=answer["memory"])
        return answer

    def _start(self) -> None:
        to_read, requests = os.pipe()
        answers, to_write = os.pipe()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        # A time in Triton's interpreter is no measurement of anything.
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment = {**inherited, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(  # noqa: S603 - our own module under our own interpreter
            [sys.executable, "-m", "moe_dispatch.policies.calibration.worker", str(to_read), str(to_write)],
            stdin=subprocess.DEVNULL,
            stdout=self._stderr,  # libraries print; the protocol has pipes of its own
            stderr=self._stderr,
            pass_fds=(to_read, to_write),
            env=environment,
            start_new_session=True,  # Ctrl-C is for this process to handle
        )
        os.close(to_read)
        os.close(to_write)
        self._requests = os.fdopen(requests, "w", encoding="utf-8")
        self._answers, self._buffer = answers, b""
        self.restarts += 1
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
        deadline = begin + timeout_s
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            ready = select.select([self._answers], [], [], max(left, 0))[0]
            if not ready:
                self.close()
                raise WorkerDiedError(f"hung: no answer within {timeout_s:.0f} s")
            chunk = os.read(self._answers, 1 << 16)
            if not chunk:
                raise WorkerDiedError(self._exit_reason())
            self._buffer += chunk
        self.spent[op] = self.spent.get(op, 0.0) + time.monotonic() - begin
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _exit_reason(self) -> str:
        assert self._process is not None and self._stderr is not None  # noqa: S101, PT018 - it lived
        code = self._process.wait()
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - _TAIL_BYTES))
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        self.close()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        return f"its worker was {how}" + (f": {lines[-1][:300]}" if lines else "")
