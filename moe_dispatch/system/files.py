"""Where measurements and quarantine live on disk, and how they are written: whole or not at all."""

import contextlib
import fcntl
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cache_dir() -> Path:
    """``MOE_DISPATCH_CACHE_DIR``, else ``$XDG_CACHE_HOME/moe_dispatch``, else ``~/.cache/moe_dispatch``.

    A user without a home directory gets a folder in the system's temporary directory.
    """
    if named := os.environ.get("MOE_DISPATCH_CACHE_DIR"):
        return Path(named).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "moe_dispatch"
    try:
        return Path.home() / ".cache" / "moe_dispatch"
    except RuntimeError:  # a container's user may have no home
        return Path(tempfile.gettempdir()) / f"moe_dispatch-{os.getuid()}"


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step: a reader sees the old text or the new, a full disk leaves the old.

    Raises:
        OSError: The directory cannot be made or written; nothing was changed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not `tempfile`, whose files are their owner's alone: what root measured in an image, its user has to read.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock beside `path` while reading, merging and replacing it; other processes wait.

    Raises:
        OSError: The lock file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by a process that dies
        yield
