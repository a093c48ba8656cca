"""How often each backend ran, was replaced and was quarantined in this process."""

import dataclasses
import threading
from dataclasses import dataclass


@dataclass
class BackendStats:
    """Counts of one backend in this process.

    Attributes:
        ran: Calls that it computed.
        fell_back: Calls that another backend had to compute in its place.
        quarantined: Times that it was quarantined.
    """

    ran: int = 0
    fell_back: int = 0
    quarantined: int = 0


class Counters:
    """Counts by backend, safe to use from any thread."""

    def __init__(self) -> None:
        self._counts: dict[str, BackendStats] = {}
        self._lock = threading.Lock()

    def count(self, name: str, *, ran: int = 0, fell_back: int = 0, quarantined: int = 0) -> None:
        """Add to the counts of a backend."""
        with self._lock:
            stats = self._counts.setdefault(name, BackendStats())
            stats.ran += ran
            stats.fell_back += fell_back
            stats.quarantined += quarantined

    def counts(self) -> dict[str, BackendStats]:
        """A copy of all counts."""
        with self._lock:
            return {name: dataclasses.replace(stats) for name, stats in self._counts.items()}
