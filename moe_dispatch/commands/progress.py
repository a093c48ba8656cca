"""Progress of long commands on stderr: a bar on a terminal, a line now and then in a pipe or a log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from moe_dispatch.commands.console import ERR, plain

LINE_SECONDS: Final = 10.0  # between two lines where there is no terminal


class Show(Protocol):
    """Tells how far a command is."""

    def __call__(self, what: str, done: int, total: int | None, left_s: float | None = None) -> None:
        """Show progress.

        Args:
            what: The work at hand.
            done: Steps that are finished.
            total: All steps; None while unknown.
            left_s: Estimated seconds left; None while unknown.
        """


@contextmanager
def progress() -> Iterator[Show]:
    """Show how far a command is, in whichever way suits stderr."""
    if not ERR.is_terminal:
        yield _Lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, TextColumn("{task.fields[left]}"), console=ERR, transient=True) as bar:
        task = bar.add_task("starting", total=None, left="")

        def show(what: str, done: int, total: int | None, left_s: float | None = None) -> None:
            bar.update(task, completed=done, total=total, description=plain(what), left=_left(left_s))

        yield show


class _Lines:
    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._next = self._begin
        self._last_done = -1

    def __call__(self, what: str, done: int, total: int | None, left_s: float | None = None) -> None:
        now = time.monotonic()
        finished = done == total and done != self._last_done
        if now < self._next and not finished:
            return
        self._next, self._last_done = now + LINE_SECONDS, done
        parts = [f"{done}/{total if total is not None else '?'}", what, f"{now - self._begin:.0f} s", _left(left_s)]
        ERR.print("  ".join(plain(part) for part in parts if part), soft_wrap=True)


def _left(left_s: float | None) -> str:
    return "" if left_s is None else f"{left_s:.0f} s left"
