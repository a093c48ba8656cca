"""Which backends failed at which problems: avoided in this process, and in later ones if the failure killed one.

A failure that a process survives is recorded so that `doctor` can show it, and applies to that process only: it may
have been the moment's. One that kills (illegal access, a hang, a crash) applies to every process until a version
changes or it is lifted. A process that dies cannot record anything, so the first run of a backend on a kind of problem
leaves a marker that its success removes; a marker whose process is gone tells what that process died of.
"""

import contextlib
import datetime
import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import pydantic

from moe_dispatch.machine import Machine
from moe_dispatch.problem import MoEProblem
from moe_dispatch.settings import cache_dir
from moe_dispatch.system.files import locked, write_atomically
from moe_dispatch.system.libraries import library_version
from moe_dispatch.system.signals import cleaned_up_on_sigterm

logger = logging.getLogger(__name__)

SCHEMA: Final = 1


class QuarantineEntry(pydantic.BaseModel):
    """One backend barred from one kind of problem.

    Attributes:
        backend: Its name.
        problem: repr of the problem with M rounded up to a power of two (`MoEProblem.bucket`).
        cause: What happened, one line.
        fatal: Whether it killed a process or its CUDA context.
        when: UTC, ISO 8601.
        versions: The software it happened under; another value of any ends the entry.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    backend: str
    problem: str
    cause: str
    # Entries written before 0.2 say "lethal".
    fatal: bool = pydantic.Field(validation_alias=pydantic.AliasChoices("fatal", "lethal"))
    when: str
    versions: dict[str, str]


class _File(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    schema_version: Literal[1] = SCHEMA
    entries: list[QuarantineEntry] = []


class Quarantine:
    """The quarantine of one machine. Disk trouble is logged and never breaks a call.

    Args:
        machine: Whose quarantine; other hardware has another file.
        directory: Defaults to the cache directory.
    """

    def __init__(self, machine: Machine, directory: Path | None = None) -> None:
        self._machine = machine
        self._path = (directory or cache_dir()) / "quarantine" / f"{machine.fingerprint}.json"
        self._lock = threading.Lock()
        self._barred: dict[tuple[str, str], str] | None = None

    def cause(self, backend: str, problem: MoEProblem) -> str:
        """Why `backend` is barred from problems like this one; empty if it is not."""
        if self._barred is None:
            with self._lock:
                if self._barred is None:
                    self._barred = {
                        (entry.backend, entry.problem): entry.cause for entry in self.entries() if entry.fatal
                    }
        return self._barred.get((backend, repr(problem.bucket)), "")

    def bar(self, backend: str, problem: MoEProblem, cause: str, *, fatal: bool) -> None:
        """Avoid `backend` for problems like this one, in this process at once and on disk for `doctor`."""
        self.cause(backend, problem)
        assert self._barred is not None  # noqa: S101 - filled by the line above
        self._barred[backend, repr(problem.bucket)] = cause
        self._add(self._entry(backend, problem, cause, fatal=fatal))

    def entries(self) -> tuple[QuarantineEntry, ...]:
        """What is on disk and still holds under the versions of today."""
        self._collect_stale_markers()
        versions = self._versions()
        return tuple(entry for entry in self._read().entries if entry.versions == versions)

    def reset(self) -> int:
        """Lift everything; returns how many entries were lifted.

        Raises:
            OSError: The file cannot be replaced.
        """
        self._collect_stale_markers()
        count = len(self._read().entries)
        if self._path.exists():
            with locked(self._path):
                write_atomically(self._path, _File().model_dump_json(indent=1))
        self._barred = {}
        return count

    @contextlib.contextmanager
    def first_run(self, backend: str, problem: MoEProblem) -> Iterator[None]:
        """Leave a marker while a backend first runs a kind of problem: if the process dies inside, it is remembered.

        The marker is held under a file lock, which the system releases with the process, however that ends. Ctrl-C and
        SIGTERM take the marker along: they are nobody's failure.
        """
        cause = "the process died or was killed during its first run here (a crash, a hang, or someone's SIGKILL)"
        entry = self._entry(backend, problem, cause, fatal=True)
        marker = self._path.with_name(f"{self._path.stem}.{os.getpid()}-{threading.get_ident()}.running")
        handle = self._mark(marker, entry)

        def forget() -> None:
            if handle is not None:
                with contextlib.suppress(OSError):
                    marker.unlink(missing_ok=True)

        with cleaned_up_on_sigterm(forget):
            try:
                yield
            finally:
                forget()
                if handle is not None:
                    os.close(handle)

    def _mark(self, marker: Path, entry: QuarantineEntry) -> int | None:
        """Write a marker and lock it; None where the disk will not have it, which must not stop the run."""
        handle = None
        try:
            marker.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(marker, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o644)
            fcntl.flock(handle, fcntl.LOCK_EX)
            os.write(handle, entry.model_dump_json().encode())
        except OSError as error:
            logger.info("no crash marker for %s: %s", entry.backend, error)
            if handle is not None:
                with contextlib.suppress(OSError):
                    marker.unlink(missing_ok=True)
                os.close(handle)
            return None
        return handle

    def _markers(self) -> list[Path]:
        return sorted(self._path.parent.glob(f"{self._path.stem}.*.running"))

    def _collect_stale_markers(self) -> None:
        for marker in self._markers():
            with contextlib.suppress(OSError), marker.open("r+", encoding="utf-8") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # its process lives
                with contextlib.suppress(pydantic.ValidationError):
                    self._add(QuarantineEntry.model_validate_json(file.read()))
                marker.unlink(missing_ok=True)

    def _entry(self, backend: str, problem: MoEProblem, cause: str, *, fatal: bool) -> QuarantineEntry:
        return QuarantineEntry(
            backend=backend,
            problem=repr(problem.bucket),
            cause=cause,
            fatal=fatal,
            when=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            versions=self._versions(),
        )

    def _versions(self) -> dict[str, str]:
        machine = self._machine
        software = {"driver": machine.driver, "cuda": machine.cuda, "torch": machine.torch, "triton": machine.triton}
        return {"moe_dispatch": library_version("moe_dispatch"), **software, **machine.libraries}

    def _read(self) -> _File:
        try:
            return _File.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return _File()
        except (OSError, pydantic.ValidationError) as error:
            logger.warning("the quarantine %s cannot be read and is taken for empty: %s", self._path, error)
            return _File()

    def _add(self, entry: QuarantineEntry) -> None:
        try:
            with locked(self._path):
                held = self._read().entries
                # Entries of other versions stay: another environment may share this cache.
                same = (entry.backend, entry.problem, entry.versions)
                kept = [old for old in held if (old.backend, old.problem, old.versions) != same]
                write_atomically(self._path, _File(entries=[*kept, entry]).model_dump_json(indent=1))
        except OSError as error:
            logger.warning("the quarantine of %s could not be written to %s: %s", entry.backend, self._path, error)
