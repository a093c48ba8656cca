"""What happened to each backend in this process, counted."""

import dataclasses
import threading
from dataclasses import dataclass


@dataclass
class BackendStats:
    """What happened to one backend in this process."""

    ran: int = 0
    fell_back: int = 0
    quarantined: int = 0


class Counters:
    """Counts by backend, from any thread."""

    def __init__(self) -> None:
        self._counts: dict[str, BackendStats] = {}
        self._lock = threading.Lock()

    def count(self, name: str, *, ran: int = 0, fell_back: int = 0, quarantined: int = 0) -> None:
        """Add to what is known of a backend."""
        with self._lock:
            counted = self._counts.setdefault(name, BackendStats())
            counted.ran += ran
            counted.fell_back += fell_back
            counted.quarantined += quarantined

    def counts(self) -> dict[str, BackendStats]:
        """A copy of all of it."""
        with self._lock:
            return {name: dataclasses.replace(counted) for name, counted in self._counts.items()}
