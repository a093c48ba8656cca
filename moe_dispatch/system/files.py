"""Files that other programs may have damaged: read without blocking, replaced whole, locked where locks exist.

Everything here raises `OSError` (and `ValueError` for content that is not JSON) and nothing else, so a caller that must
survive a bad disk needs one ``except``. Errors and log lines name the path.
"""

import contextlib
import errno
import fcntl
import fnmatch
import functools
import glob
import json
import logging
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

MAX_BYTES: Final = 32 << 20  # A calibration of every named workload takes about 1 MiB.
LOCK_SECONDS: Final = 30.0  # A lock protects one read and one write, so a longer wait means a stopped process.
STALE_SECONDS: Final = 600.0  # A temporary file this old was left by a process that died while it wrote.
_WRITE_TEST_BYTES: Final = 64 << 10
# What flock answers on a file system that has no locks, such as NFS without its lock daemon.
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})


class UnusableFileError(OSError):
    """The entry itself cannot be used, whatever the state of the disk: not a regular file, too large, or not ours."""


def open_regular(path: Path, *, writable: bool = False, limit: int = MAX_BYTES, trusted: bool = False) -> int:
    """Open an existing regular file and return its descriptor, which the caller closes. Never blocks on a FIFO.

    Args:
        path: What to open.
        writable: Open for reading and writing.
        limit: Largest accepted size in bytes.
        trusted: Refuse symbolic links and files whose owner is neither this user nor root.

    Raises:
        FileNotFoundError: There is no such file.
        UnusableFileError: It is no regular file, is larger than `limit`, or is not trusted.
        OSError: It cannot be opened.
    """
    flags = os.O_RDWR if writable else os.O_RDONLY
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | (os.O_NOFOLLOW if trusted else 0)
    try:
        handle = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ENXIO):  # a folder or a socket, or a FIFO that nothing reads
            raise UnusableFileError(error.errno, "it is not a regular file", str(path)) from error
        if trusted and error.errno == errno.ELOOP:
            raise UnusableFileError(error.errno, "it is a symbolic link", str(path)) from error
        raise
    try:
        _refuse_unusable(path, os.fstat(handle), limit, trusted=trusted)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _refuse_unusable(path: Path, status: os.stat_result, limit: int, *, trusted: bool) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UnusableFileError(errno.EINVAL, "it is not a regular file", str(path))
    if status.st_size > limit:
        raise UnusableFileError(
            errno.EFBIG, f"it has {status.st_size:,} bytes and at most {limit:,} are read", str(path)
        )
    if trusted and status.st_uid not in (0, os.geteuid()):
        raise UnusableFileError(errno.EPERM, f"it belongs to user {status.st_uid}", str(path))


def read_bytes(path: Path, *, limit: int = MAX_BYTES, trusted: bool = False) -> bytes:
    """The content of a regular file; see `open_regular` for the arguments and errors."""
    with os.fdopen(open_regular(path, limit=limit, trusted=trusted), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:  # it grew, or it is a file of /proc, whose size reads 0
        raise UnusableFileError(errno.EFBIG, f"it has more than {limit:,} bytes", str(path))
    return content


def read_json(path: Path, *, limit: int = MAX_BYTES) -> object:
    """The value in a JSON file, in UTF-8 with or without a byte-order mark.

    Raises:
        OSError: As `open_regular`.
        ValueError: The content is not UTF-8, not JSON, or nested too deeply.
    """
    content = read_bytes(path, limit=limit)
    try:
        return json.loads(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def list_files(folder: Path, pattern: str) -> list[Path]:
    """Entries of a folder by shell pattern, sorted; none where the folder is missing or may not be searched."""
    try:
        return sorted(folder / name for name in os.listdir(folder) if fnmatch.fnmatchcase(name, pattern))
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            logger.info("%s cannot be listed: %s", folder, error)
        return []


def set_aside(path: Path, why: object) -> str:
    """Rename an entry that cannot be used to ``NAME.damaged-1``, ``-2``, …, so that nothing is lost or read again.

    Returns:
        A sentence for a warning: what was wrong, and where the entry is now.
    """
    for number in range(1, 1000):
        target = path.with_name(f"{path.name}.damaged-{number}")
        if os.path.lexists(target):
            continue
        try:
            os.rename(path, target)
        except FileNotFoundError:  # another process was faster
            return f"{path} is set aside ({why})"
        except OSError as error:
            return f"{path} is ignored ({why}) and cannot be set aside ({error.strerror or error}); delete it"
        return f"{path} is set aside as {target.name} ({why})"
    return f"{path} is ignored ({why}); delete it and the entries set aside beside it"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file's content in one step: a reader sees the old content or the new, a full disk leaves the old.

    Of a symbolic link the file that it names is replaced. Temporary files that killed processes left for the same path
    are deleted on the way.

    Raises:
        UnusableFileError: There is something else than a regular file; nothing was changed, as below.
        OSError: The directory cannot be made or written.
    """
    path = Path(os.path.realpath(path))
    if os.path.exists(path) and not os.path.isfile(path):
        # Root could rename over a device, such as /dev/null, and take it from the whole system.
        raise UnusableFileError(errno.EINVAL, "it is not a regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    # Not `tempfile`, whose files only their owner may read: another user has to read what root measured in an image.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _sweep(path: Path) -> None:
    for temporary in list_files(path.parent, f".{glob.escape(path.name)}.????????????????.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - temporary.lstat().st_mtime > STALE_SECONDS:
                temporary.unlink()


def check_writable(path: Path) -> None:
    """Find out, before expensive work, whether `write_atomically` could write this file now.

    Raises:
        OSError: The directory cannot be made or written, or the disk is full.
    """
    probe = path.with_name(f".{path.name}.writable")
    try:
        write_atomically(probe, " " * _WRITE_TEST_BYTES)
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


@contextlib.contextmanager
def locked(path: Path, *, timeout_s: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold an exclusive lock beside `path` while reading, merging and replacing it; other processes wait.

    On a file system without locks the block runs unlocked, and a log line says so: two processes that write at the same
    moment may then lose one of both changes, and never produce a damaged file.

    Raises:
        UnusableFileError: The path is that of a folder without a name.
        OSError: The lock file cannot be made.
        TimeoutError: Another process holds the lock for longer than `timeout_s`; an `OSError` as well.
    """
    if not path.name:  # of "", "." or "/"
        raise UnusableFileError(errno.EISDIR, "it is a folder", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(f".{path.name}.lock")
    handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        _lock(handle, name, timeout_s)
        yield
    finally:
        os.close(handle)  # releases the lock, as the end of the process does


def _lock(handle: int, name: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    errno.ETIMEDOUT, f"locked by another process for {timeout_s:g} s", str(name)
                ) from error
            time.sleep(0.01)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _report_no_locks(name.parent, error.strerror)
            return
        else:
            return


@functools.cache
def _report_no_locks(folder: Path, why: str) -> None:
    logger.warning("%s has no file locks (%s); files are written there without", folder, why)


@functools.cache
def private_temporary_folder() -> Path:
    """A folder of this user alone in the system's temporary directory, for a user without a home directory.

    ``moe_dispatch-UID``, mode 0700. Where another user has taken that name, a fresh folder is made for this process.
    """
    base = Path(tempfile.gettempdir())
    folder = base / f"moe_dispatch-{os.geteuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077:
            return folder
        return Path(tempfile.mkdtemp(prefix="moe_dispatch-"))
    except OSError:
        return folder  # nothing can be written there; reading and writing report it
