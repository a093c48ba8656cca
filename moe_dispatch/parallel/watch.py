"""Which rank is to blame when ranks wait for each other in vain.

A collective that fails says that something is wrong and not with which rank. So a rank that fails leaves a note in the
process group's store, and looks there for the notes of the others: those that leave none are dead or late. A process on
the same host that is gone is known at once; any other is waited for until the others' timeout has passed as well.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from torch._C._distributed_c10d import Store

from moe_dispatch.parallel.errors import ExpertParallelLostError
from moe_dispatch.system import failures

GRACE: Final = 3.0  # Seconds beyond its timeout that a rank waits for the notes of others.
_POLL: Final = 0.02


@dataclass(frozen=True)
class ProcessIdentity:
    """A process as others on its host can look it up.

    Attributes:
        host: The boot of the host's kernel and the namespace that numbers the process.
        pid: Its number.
        started: When it started, in the kernel's ticks: another process may get the number later.
    """

    host: str
    pid: int
    started: str

    @classmethod
    def here(cls) -> Self:
        """This process."""
        return cls(_host(), os.getpid(), _status(os.getpid())[1])

    @property
    def gone(self) -> bool:
        """Whether it is known to have ended; False for a process of another host."""
        if not self.host or self.host != _host():
            return False
        state, started = _status(self.pid)
        return state in ("", "Z", "X") or started != self.started


class Watch:
    """Follows the calls of one group and names the rank that breaks one.

    Args:
        store: A store that every rank of the group reads and writes, for this purpose alone.
        ranks: Global ranks, in the order of the group.
        rank: This process's place among them.
        timeout: Seconds that a rank waits for the others in a call.

    Attributes:
        call: Number of the current call; 0 before the first.
        identities: The processes by rank, once they are known.
        lost: The error that ended the group's calls, if one did.
    """

    def __init__(self, store: Store, ranks: tuple[int, ...], rank: int, timeout: float) -> None:
        self._store, self._ranks, self._rank, self.timeout = store, ranks, rank, timeout
        self.call = 0
        self.identities: tuple[ProcessIdentity, ...] = ()
        self.lost: ExpertParallelLostError | None = None

    def begin(self) -> None:
        """Count a call.

        Raises:
            ExpertParallelLostError: An earlier call lost a rank.
        """
        if self.lost is not None:
            raise self.lost
        self.call += 1

    @contextlib.contextmanager
    def patience(self, timeout: float) -> Iterator[None]:
        """Wait longer for the other ranks inside, while first runs compile."""
        before, self.timeout = self.timeout, max(timeout, self.timeout)
        try:
            yield
        finally:
            self.timeout = before

    @contextlib.contextmanager
    def waiting(self, timeout: float) -> Iterator[None]:
        """Wait for other ranks inside; a failure there names the rank that is missing.

        Args:
            timeout: Seconds after which the other ranks' waiting ends too.

        Raises:
            ExpertParallelLostError: The others cannot be waited for any longer.
        """
        begun = time.monotonic()
        try:
            yield
        except RuntimeError as error:  # what torch.distributed raises; its subclasses tell timeouts from lost peers
            raise self.blamed(error, begun + timeout) from error

    def blamed(self, error: RuntimeError, deadline: float) -> ExpertParallelLostError:
        """The error that names the rank because of which torch.distributed failed; it ends the group's calls.

        Args:
            error: What torch.distributed raised.
            deadline: The time by `time.monotonic` at which the other ranks' waiting ends too.
        """
        self.lost = self._blame(error, deadline + GRACE)
        return self.lost

    def missing(self, place: int) -> ExpertParallelLostError:
        """The error of a rank that the device waited for in vain in an earlier call, which ends the group's calls."""
        why = f"it did not come to an earlier call within {self.timeout:.0f} s, whose results are NaN"
        self.lost = self._error([place], why)
        return self.lost

    def failed(self, error: BaseException) -> None:
        """Note for the other ranks that this one does not come to the current call, because of an error of its own."""
        with contextlib.suppress(RuntimeError):
            self._store.set(self._key(self._rank), f"raised {failures.summary(error)}")

    def broken(self, error: BaseException) -> None:
        """End the group's calls because of an error in a call that the other ranks are in as well."""
        if self.lost is None:
            self.failed(error)
            self.lost = self._error([self._rank], f"it raised {failures.summary(error)}")

    def _blame(self, error: BaseException, deadline: float) -> ExpertParallelLostError:
        seen = failures.summary(error)
        try:
            self._store.set(self._key(self._rank), "waited in vain")
            notes, missing = self._notes(deadline)
        except RuntimeError as unreachable:
            why = f"{seen}; and the process group's store cannot be reached ({failures.summary(unreachable)})"
            return ExpertParallelLostError((), self.call, why)
        if missing:
            gone = [i for i in missing if self._gone(i)]
            what = "its process has ended" if gone else f"nothing was heard of it for {self.timeout:.0f} s"
            return self._error(gone or missing, f"{what} ({seen})")
        raised = {i: note for i, note in notes.items() if note.startswith("raised")}
        if raised:
            return self._error(list(raised), f"it {next(iter(raised.values()))}")
        return ExpertParallelLostError((), self.call, f"every rank waited for the others in vain ({seen})")

    def _error(self, places: list[int], why: str) -> ExpertParallelLostError:
        return ExpertParallelLostError([self._ranks[i] for i in places], self.call, why)

    def _notes(self, deadline: float) -> tuple[dict[int, str], list[int]]:
        """The other ranks' notes of this call, and which ranks left none by the deadline."""
        notes: dict[int, str] = {}
        while True:
            missing = [i for i in range(len(self._ranks)) if i != self._rank and i not in notes]
            for i in missing:
                if self._store.check([self._key(i)]):
                    notes[i] = self._store.get(self._key(i)).decode()
            missing = [i for i in missing if i not in notes]
            if not missing or any(map(self._gone, missing)) or time.monotonic() > deadline:
                return notes, missing
            time.sleep(_POLL)

    def _gone(self, place: int) -> bool:
        return bool(self.identities) and self.identities[place].gone

    def _key(self, place: int) -> str:
        return f"call {self.call} of {place}"


def _host() -> str:
    """The kernel's boot and the namespace of process numbers; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _status(pid: int) -> tuple[str, str]:
    """State and start time of a process; both empty if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ""
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]
