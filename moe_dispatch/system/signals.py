"""SIGTERM, which ends a process without unwinding it."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

# Clean-ups of the blocks that run, in any thread, with the process that entered them: a forked child may not clean up
# after its parent. Appending and removing are atomic; a lock could be held by the thread that the signal interrupts.
_clean_ups: list[tuple[int, Callable[[], None]]] = []


@contextlib.contextmanager
def cleaned_up_on_sigterm(clean_up: Callable[[], None]) -> Iterator[None]:
    """Call `clean_up` before SIGTERM ends the process inside this block.

    Only where the signal's default action would end it: a handler of the program decides for itself, also one that is
    installed inside the block. Python lets the main thread alone install a handler, so a block in another thread is
    covered only while one in the main thread runs. Ctrl-C raises and needs nothing. While native code holds the main
    thread the signal waits for it, so a hang is ended by SIGKILL.
    """
    entry = (os.getpid(), clean_up)
    _clean_ups.append(entry)
    installed = False
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end)
        installed = True
    try:
        yield
    finally:
        _clean_ups.remove(entry)
        # The program may have installed a handler in the meantime, which stays.
        if installed and signal.getsignal(signal.SIGTERM) is _end:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(signum: int, _frame: object) -> None:
    for process, clean_up in reversed(_clean_ups.copy()):
        if process == os.getpid():
            with contextlib.suppress(Exception):  # the others are still to be called, and the process to be ended
                clean_up()
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
