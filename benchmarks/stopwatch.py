"""Where the time of a run goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up seconds by kind of work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def spending(self, work: str) -> Iterator[None]:
        """Count the time inside towards a kind of work."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[work] = self.seconds.get(work, 0.0) + time.perf_counter() - begin

    def __str__(self) -> str:
        return ", ".join(f"{work} {seconds:.0f} s" for work, seconds in self.seconds.items())
