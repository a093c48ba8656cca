"""Reading, writing and locking on disks that are full, foreign or without locks.

tests/attack/test_files.py puts everything else in the place of a file: FIFOs, sockets, endless or damaged content.
"""

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_dispatch.errors import InvalidInputError
from moe_dispatch.settings import cache_dir
from moe_dispatch.system import files
from moe_dispatch.system.files import (
    UnusableFileError,
    check_writable,
    list_files,
    locked,
    private_temporary_folder,
    read_bytes,
    set_aside,
    write_atomically,
)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.mkdir()


def test_entries_that_are_set_aside_are_numbered_and_none_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "entry.json"
    for text in ("first", "second"):
        path.write_text(text)
        assert "damaged" in set_aside(path, "damaged")
    assert [(tmp_path / f"entry.json.damaged-{number}").read_text() for number in (1, 2)] == ["first", "second"]
    assert "set aside" in set_aside(path, "gone already")


def test_a_read_is_bounded_whatever_size_is_announced(tmp_path: Path) -> None:
    with pytest.raises(UnusableFileError, match="more than 10 bytes"):
        read_bytes(Path("/proc/self/maps"), limit=10)
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    assert read_bytes(path, limit=10) == b"0123456789"
    with pytest.raises(UnusableFileError, match="10 bytes and at most 9"):
        read_bytes(path, limit=9)


def test_a_trusted_file_is_no_link_and_no_other_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_text("ours")
    link.symlink_to(path)
    assert read_bytes(path, trusted=True) == b"ours" == read_bytes(link)
    with pytest.raises(UnusableFileError, match="symbolic link"):
        read_bytes(link, trusted=True)
    owner = path.stat().st_uid
    if owner == 0:
        os.chown(path, 12345, -1)
        owner = 12345
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(UnusableFileError, match=f"belongs to user {owner}"):
        read_bytes(path, trusted=True)


@pytest.mark.parametrize("folder", ["missing", "x" * 300, "file/below"])
def test_a_folder_that_cannot_be_listed_holds_nothing(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert list_files(tmp_path / folder, "*.running") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_home_that_may_not_be_searched_holds_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    tmp_path.chmod(0o755)
    script = (
        "import os, sys; from pathlib import Path; from moe_dispatch.system.files import *\n"
        f"os.setuid(12345); os.environ['HOME'] = {str(home)!r}\n"
        "folder = Path.home() / 'cache'\n"
        "assert list_files(folder, '*') == []\n"
        "for use in (read_bytes, check_writable):\n"
        "    try: use(folder / 'file')\n"
        "    except OSError: continue\n"
        "    sys.exit(use.__name__)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_pattern_of_a_listing_matches_names(tmp_path: Path) -> None:
    for name in ("a.running", "b.running", "a.json"):
        (tmp_path / name).write_text("")
    assert list_files(tmp_path, "*.running") == [tmp_path / "a.running", tmp_path / "b.running"]


def test_a_write_replaces_no_device_and_no_link(tmp_path: Path) -> None:
    """As root, a calibration exported to /dev/null would take that from the whole system."""
    device, fifo, socket_, folder = (tmp_path / name for name in ("device", "fifo", "socket", "folder"))
    os.mkfifo(fifo)
    folder.mkdir()
    others = [fifo, folder]
    if os.geteuid() == 0:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.stat(os.devnull).st_rdev)
        others.append(device)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(socket_))
        for path in (*others, socket_, Path(os.devnull)):
            link = tmp_path / f"link to {path.name}"
            link.symlink_to(path)
            kind = stat.S_IFMT(path.stat().st_mode)
            for target in (path, link):
                with pytest.raises(UnusableFileError, match="not a regular file"):
                    write_atomically(target, "{}")
            assert stat.S_IFMT(path.stat().st_mode) == kind
            assert link.is_symlink()
    (tmp_path / "file").write_text("old")
    linked = tmp_path / "link"
    linked.symlink_to("file")
    write_atomically(linked, "new")
    assert linked.is_symlink()
    assert (tmp_path / "file").read_text() == "new"


def test_a_write_sweeps_what_killed_writers_left(tmp_path: Path) -> None:
    path = tmp_path / "cali[b]ration.json"
    old, fresh = (tmp_path / f".{path.name}.{letter * 16}.tmp" for letter in "0f")
    other = tmp_path / f".other.json.{'0' * 16}.tmp"
    for left in (old, fresh, other):
        left.write_text("half")
    before = time.time() - 2 * files.STALE_SECONDS
    for left in (old, other):
        os.utime(left, (before, before))
    write_atomically(path, "whole")
    assert path.read_text() == "whole"
    assert sorted(tmp_path.iterdir()) == sorted([path, fresh, other])


def test_whether_a_file_can_be_written_is_known_before(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "calibration.json")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "below", tmp_path / ("x" * 300) / "file"):
        with pytest.raises(OSError):  # noqa: PT011 - of any kind
            check_writable(path)


def test_a_full_disk_is_seen_before_the_work() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    mounted = subprocess.run(
        ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=16k none /mnt && exec \"$0\" -c \"$1\"", sys.executable,
         "from pathlib import Path; from moe_dispatch.system.files import check_writable\n"
         "try: check_writable(Path('/mnt/calibration.json'))\n"
         "except OSError as error: print(error.errno, list(Path('/mnt').iterdir()))\n"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "mount" in mounted.stderr or "unshare" in mounted.stderr:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    assert mounted.stdout.strip() == f"{errno.ENOSPC} []", mounted


def test_without_locks_the_block_runs_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for _ in range(2):
        with locked(tmp_path / "file.json"):
            write_atomically(tmp_path / "file.json", "{}")
    assert [record.message for record in caplog.records if "no file locks" in record.message] == [
        f"{tmp_path} has no file locks (No locks available); files are written there without"
    ]


def test_a_lock_that_is_never_released_ends_the_wait(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    with (
        locked(path),
        pytest.raises(TimeoutError, match=r"locked by another process for 0\.05 s"),
        locked(path, timeout_s=0.05),
    ):
        pytest.fail("two holders of one lock")
    with locked(path, timeout_s=0.05):
        pass


@pytest.mark.parametrize("make", [_fifo, _folder], ids=["fifo", "folder"])
def test_a_lock_file_of_another_kind_blocks_nothing(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / ".file.json.lock")
    try:
        with locked(tmp_path / "file.json", timeout_s=1.0):
            pass
    except OSError:
        pass


def test_a_relative_cache_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_DISPATCH_CACHE_DIR", "cache")
    with pytest.raises(InvalidInputError, match="must be an absolute path, got 'cache'"):
        cache_dir()


def test_a_relative_xdg_folder_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_DISPATCH_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "moe_dispatch"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "moe_dispatch"


def test_a_relative_home_is_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_DISPATCH_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "somewhere")
    assert cache_dir() == private_temporary_folder()


def test_a_temporary_folder_that_others_can_enter_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    private_temporary_folder.cache_clear()
    expected = tmp_path / f"moe_dispatch-{os.geteuid()}"
    expected.mkdir()
    expected.chmod(0o777)
    made = private_temporary_folder()
    assert made != expected
    assert made.stat().st_mode & 0o777 == 0o700
    private_temporary_folder.cache_clear()
    expected.chmod(0o700)
    assert private_temporary_folder() == expected
    private_temporary_folder.cache_clear()
