"""First calls in flight: a fork waits for those of other threads, and a backend that calls itself is stopped.

They are watched, and so they begin on a GPU that has nothing else to do.

A first call imports modules, reads files and compiles kernels. A child forked in the middle of that would find locks
held (those of Python's import system among them) by a thread that it does not have, and wait for ever.
"""

import os
import threading
from collections.abc import Sequence
from typing import Final

import torch

from moe_dispatch.dispatch.errors import DeviceLostError
from moe_dispatch.system import failures

FORK_WAIT_SECONDS: Final = 30.0  # After this a fork goes ahead: the first call may itself be waiting for it.
# First runs of one backend at a time. More are no crowd of threads but a backend that calls itself in new threads.
MAX_CONCURRENT: Final = 256


class _Listed:
    def __init__(self, first_calls: "FirstCalls", backend: str) -> None:
        self._first_calls, self._backend = first_calls, backend

    def __enter__(self) -> None:
        self._first_calls.begin(self._backend)

    def __exit__(self, *_: object) -> None:
        self._first_calls.end()


class FirstCalls:
    """The threads that are in a first call, and the backends that they run for the first time.

    ``with FIRST_CALLS:`` lists a thread while it plans a kind of call.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._forks = 0  # that wait for first calls of other threads
        self._backends: dict[int, list[str]] = {}

    def running(self, backend: str) -> "_Listed":
        """While this thread probes a backend or runs a kind of call on it for the first time.

        Raises:
            RecursionError: The backend is calling itself by way of `moe_forward`.
        """
        return _Listed(self, backend)

    def begin(self, backend: str = "") -> None:
        """List this thread until `end`: it plans, or runs this backend; see `running`."""
        thread = threading.get_ident()
        with self._lock:
            mine = self._backends.get(thread, [])
            if backend and (backend in mine or self._running(backend) >= MAX_CONCURRENT):
                raise RecursionError(
                    f"backend {backend!r} calls moe_forward, which chooses {backend!r} again; a backend that wraps "
                    "another one names it: moe_forward(…, backend=…)"
                )
            self._backends.setdefault(thread, mine).append(backend)

    def end(self, *_: object) -> None:
        """End what this thread began last."""
        thread = threading.get_ident()
        with self._lock:
            mine = self._backends[thread]
            mine.pop()
            if not mine:
                del self._backends[thread]
            if self._forks:
                self._changed.notify_all()

    __enter__, __exit__ = begin, end

    def _running(self, backend: str) -> int:
        return sum(backend in names for names in self._backends.values())

    def before_fork(self) -> None:
        """Wait for the first calls of other threads, and keep new ones from starting until the fork is done."""
        thread = threading.get_ident()
        self._changed.acquire()
        self._forks += 1
        self._changed.wait_for(lambda: not self._backends.keys() - {thread}, FORK_WAIT_SECONDS)

    def after_fork_in_parent(self) -> None:
        """Let first calls start again."""
        self._forks -= 1
        self._changed.release()

    def after_fork_in_child(self) -> None:
        """Forget the other threads, which this process does not have."""
        thread = threading.get_ident()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._forks = 0
        self._backends = {other: names for other, names in self._backends.items() if other == thread}


FIRST_CALLS: Final = FirstCalls()


def wait_for_earlier_work(device: torch.device, suspects: Sequence[str] = ()) -> None:
    """Wait for a GPU, so that an error of earlier work surfaces here and is not booked on the backend that runs next.

    Raises:
        DeviceLostError: The CUDA context is gone; it names the suspects, which ran last.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        if failures.lost_device(error):
            raise DeviceLostError(suspects, error, certain=False) from error
        raise


os.register_at_fork(
    before=FIRST_CALLS.before_fork,
    after_in_parent=FIRST_CALLS.after_fork_in_parent,
    after_in_child=FIRST_CALLS.after_fork_in_child,
)
