"""Which backends failed at which problems: avoided in this process, and in later ones after a failure that killed one.

A failure that a process survives may have been of the moment: it is recorded for `doctor`, and obeyed by that process
only. A failure that kills (illegal access, a hang, a crash) is obeyed by every process: `QuarantineEntry.is_obeyed`. It
bars the backend from eager calls and CUDA graphs alike, as `warm_up` runs eagerly what a capture will want.
A process that dies cannot record anything, so the first run of a backend on a kind of problem leaves a marker that its
success removes; a marker whose process is gone says what that process died of.

Write access here is enough to bar backends, so files of other users and symbolic links are not read. Disk trouble
is logged and never breaks a call.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, get_args

import pydantic

from moe_dispatch.errors import PolicyFileError
from moe_dispatch.machine import Machine
from moe_dispatch.problem import Mode, MoEProblem
from moe_dispatch.registry import LAST_RESORT
from moe_dispatch.settings import cache_dir
from moe_dispatch.stored_files import NewerFileError, parsed
from moe_dispatch.system.files import (
    UnusableFileError,
    list_files,
    locked,
    open_regular,
    read_bytes,
    set_aside,
    write_atomically,
)
from moe_dispatch.system.libraries import library_version
from moe_dispatch.system.signals import cleaned_up_on_sigterm

logger = logging.getLogger(__name__)

SCHEMA: Final = 2
MAX_BYTES: Final = 4 << 20  # An entry takes about 500 bytes.
MAX_MARKER_BYTES: Final = 64 << 10
# A process that died in a first run may have been killed for other reasons, so one death bars a backend for this long
# only. A second one bars it until a version changes.
OBEYED_FOR: Final = datetime.timedelta(hours=24)
STRIKES: Final = 2

_marker_numbers = itertools.count()
_IMPORTED_IN: Final = os.getpid()  # in a fork, the parent's


class QuarantineEntry(pydantic.BaseModel):
    """One backend barred from one kind of problem.

    Attributes:
        backend: The backend's name.
        problem: repr of the problem with M rounded up to a power of two (`MoEProblem.bucket`), eager if the entry is
            fatal.
        cause: What happened, one line.
        fatal: Whether it killed a process or its CUDA context.
        when: The last time, in UTC, ISO 8601.
        versions: The software it happened under; another value of any ends the entry.
        strikes: How often it happened.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    backend: str
    problem: str
    cause: str
    fatal: bool
    when: str
    versions: dict[str, str]
    strikes: int = pydantic.Field(default=1, ge=1)

    @property
    def is_obeyed(self) -> bool:
        """Whether later processes avoid the backend: after a fatal failure of the last 24 hours, or after two."""
        return self.fatal and self.backend != LAST_RESORT and (self.strikes >= STRIKES or self._is_recent())

    def _is_recent(self) -> bool:
        try:
            age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(self.when)
            return abs(age) < OBEYED_FOR  # a clock that was ahead may have been set back since
        except (ValueError, TypeError, OverflowError):  # no time, or one without its zone
            return True


class _File(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    schema_version: Literal[2] = SCHEMA
    entries: list[QuarantineEntry] = []


class _KeptFileError(OSError):
    """The file is not to be replaced: a newer version of this package wrote it, or it cannot be read just now."""


class Quarantine:
    """The quarantine of one machine. The last resort is never in it.

    Args:
        machine: The machine; other hardware has another file.
        directory: Defaults to the cache directory.
    """

    def __init__(self, machine: Machine, directory: Path | None = None) -> None:
        self._machine = machine
        self._path = (directory or cache_dir()) / "quarantine" / f"{machine.fingerprint}.json"
        self._recorded: dict[tuple[str, str], QuarantineEntry] | None = None
        self._barred: dict[tuple[str, MoEProblem], QuarantineEntry] = {}

    def cause(self, backend: str, problem: MoEProblem) -> str:
        """Why `backend` is barred from problems like this one; empty if it is not."""
        if self._barred and (barred := self._barred.get((backend, problem.bucket))):
            return barred.cause
        if self._recorded == {}:  # as nearly always, and asked for every new kind of call
            return ""
        entry = self.recorded(backend, problem)
        return entry.cause if entry else ""

    def recorded(self, backend: str, problem: MoEProblem) -> QuarantineEntry | None:
        """The entry of an earlier process that this one obeys for `backend` and problems like this one, if any."""
        if self._recorded is None:
            self._recorded = {(entry.backend, entry.problem): entry for entry in self.entries() if entry.is_obeyed}
        return self._recorded.get((backend, repr(problem.eager_bucket))) if self._recorded else None

    def bar(self, backend: str, problem: MoEProblem, cause: str, *, fatal: bool) -> bool:
        """Avoid `backend` for problems like this one, in this process at once and on disk for `doctor`.

        The last resort is never barred: without it nothing would be left to run.

        Returns:
            Whether it was not avoided in this process before. Of threads that ask at once, one is told so.
        """
        if backend == LAST_RESORT:
            return False
        entry = self._entry(backend, problem, cause, fatal=fatal)
        modes = get_args(Mode) if fatal else (problem.mode,)
        kinds = [(backend, dataclasses.replace(problem.bucket, mode=mode)) for mode in modes]
        known = [self._barred.setdefault(kind, entry) for kind in kinds]
        is_new = any(one is entry for one in known)
        if is_new or fatal:
            self._add(entry)
        return is_new

    def entries(self) -> tuple[QuarantineEntry, ...]:
        """What is on disk and still holds under the versions of today."""
        collected = self._collect_stale_markers()
        versions = self._versions()
        return tuple(entry for entry in (*self._read().entries, *collected) if entry.versions == versions)

    def reset(self) -> int:
        """Lift everything; returns how many entries were lifted. A file that cannot be read is set aside.

        Raises:
            OSError: The file cannot be replaced.
        """
        self._collect_stale_markers()
        count = 0
        if os.path.lexists(self._path):
            with locked(self._path):
                try:
                    count = len(self._load().entries)
                except _KeptFileError as error:
                    set_aside(self._path, error)
                write_atomically(self._path, _File().model_dump_json(indent=1))
        self._recorded, self._barred = {}, {}
        return count

    @contextlib.contextmanager
    def first_run(self, backend: str, problem: MoEProblem) -> Iterator[None]:
        """Leave a marker while a backend first runs a kind of problem: if the process dies inside, it is remembered.

        The marker is held under a file lock, which the system releases with the process, however that ends. Ctrl-C and
        SIGTERM remove the marker: a run that was ended on purpose did not fail.
        """
        cause = "the process died or was killed during its first run here (a crash, a hang, or a SIGKILL from outside)"
        if os.getpid() != _IMPORTED_IN and self._machine.device == "cpu":
            cause += (
                "; it was a fork, and torch hangs in a fork of a process in which it has computed on the CPU: spawn "
                "processes, or call torch.set_num_threads(1) in a fork first"
            )
        marker, handle = self._mark(self._entry(backend, problem, cause, fatal=True))

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

    # Markers.

    def _mark(self, entry: QuarantineEntry) -> tuple[Path, int | None]:
        """Write a marker and lock it; no handle where the disk refuses, which must not stop the run."""
        handle = None
        marker = self._path  # replaced by a name of its own: a backend may run another one inside of its first run
        try:
            self._make_folder()
            while handle is None:
                name = f"{self._path.stem}.{os.getpid()}-{next(_marker_numbers)}.running"
                marker = self._path.with_name(name)
                with contextlib.suppress(FileExistsError):  # a dead process had the same number
                    handle = os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            fcntl.flock(handle, fcntl.LOCK_EX)
            os.write(handle, entry.model_dump_json().encode())
        except OSError as error:
            logger.info("no crash marker for %s: %s", entry.backend, error)
            if handle is not None:
                with contextlib.suppress(OSError):
                    marker.unlink(missing_ok=True)
                os.close(handle)
            return marker, None
        return marker, handle

    def _collect_stale_markers(self) -> list[QuarantineEntry]:
        """Move the markers of dead processes into the file; returns those that the file cannot take."""
        kept = []
        for marker in list_files(self._path.parent, f"{self._path.stem}.*.running"):
            try:
                handle = open_regular(marker, writable=True, limit=MAX_MARKER_BYTES, trusted=True)
            except UnusableFileError as error:
                logger.warning("%s", set_aside(marker, error))
                continue
            except OSError as error:
                logger.info("%s cannot be read: %s", marker, error)
                continue
            with os.fdopen(handle, "rb") as file, contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while the process lives
                content = file.read()
                try:
                    entry = QuarantineEntry.model_validate_json(content) if content else None
                except ValueError as error:
                    logger.warning("%s", set_aside(marker, error))
                    continue
                if entry is not None and entry.backend != LAST_RESORT and not self._add(entry):
                    kept.append(entry)
                else:
                    marker.unlink(missing_ok=True)
        return kept

    # The file.

    def _load(self) -> _File:
        """The file's content; a damaged one is set aside.

        Raises:
            _KeptFileError: It must not be replaced.
        """
        try:
            content = read_bytes(self._path, limit=MAX_BYTES, trusted=True)
            return parsed(_File, content, "it", SCHEMA, "what it recorded counts no more")
        except FileNotFoundError:
            return _File()
        except NewerFileError as error:
            raise _KeptFileError(str(error)) from error
        except (UnusableFileError, PolicyFileError) as error:
            logger.warning("the quarantine starts anew: %s", set_aside(self._path, error))
            return _File()
        except OSError as error:
            raise _KeptFileError(str(error)) from error

    def _read(self) -> _File:
        try:
            return self._load()
        except _KeptFileError as error:
            logger.warning("the quarantine %s is not read, and left as it is: %s", self._path, error)
            return _File()

    def _add(self, entry: QuarantineEntry) -> bool:
        """Write an entry; returns whether the file has it now."""
        try:
            self._make_folder()
            with locked(self._path):
                entries = self._load().entries
                # Entries of other versions stay: another environment may share this cache.
                same = (entry.backend, entry.problem, entry.versions)
                old = next((old for old in entries if (old.backend, old.problem, old.versions) == same), None)
                if old is not None and old.fatal:
                    if not entry.fatal:
                        return True  # the weaker entry adds nothing
                    entry = entry.model_copy(update={"strikes": old.strikes + entry.strikes})
                kept = [other for other in entries if other is not old]
                write_atomically(self._path, _File(entries=[*kept, entry]).model_dump_json(indent=1))
        except OSError as error:
            logger.warning("the quarantine of %s could not be written to %s: %s", entry.backend, self._path, error)
            return False
        return True

    def _make_folder(self) -> None:
        """Make the folder, for this user alone."""
        folder = self._path.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid == os.geteuid() and status.st_mode & 0o077:  # as earlier versions made it
            folder.chmod(0o700)

    def _entry(self, backend: str, problem: MoEProblem, cause: str, *, fatal: bool) -> QuarantineEntry:
        return QuarantineEntry(
            backend=backend,
            problem=repr(problem.eager_bucket if fatal else problem.bucket),
            cause=cause,
            fatal=fatal,
            when=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            versions=self._versions(),
        )

    def _versions(self) -> dict[str, str]:
        machine = self._machine
        software = {"driver": machine.driver, "cuda": machine.cuda, "torch": machine.torch, "triton": machine.triton}
        return {"moe_dispatch": library_version("moe_dispatch"), **software, **machine.libraries}
