"""SIGTERM, which ends a process without unwinding it."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def cleaned_up_on_sigterm(clean_up: Callable[[], None]) -> Iterator[None]:
    """Call `clean_up` before SIGTERM ends the process inside this block.

    Only where the signal's default action would end it, and in the main thread: elsewhere Python lets nobody set a
    handler, and where the program has one of its own, it decides. Ctrl-C needs nothing, it raises. While native code
    holds the main thread the signal waits for it, so a hang is ended by SIGKILL.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(signum: int, _frame: object) -> None:
        clean_up()
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
