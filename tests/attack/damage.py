"""What may happen to a file: its content spoilt, or something else in its place."""

import json
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hypothesis import example
from hypothesis import strategies as st

FOREIGN_USER: Final = 12345
_LARGE: Final = 500 << 20

JSON_VALUES: Final = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 80), 1 << 80), st.floats(), st.text(max_size=12),
    st.sampled_from([0, -1, 1, 2, 99, 1e308, "", "x" * 3000, "\x1b[31m", "[bold]", "../../etc/passwd", [], {}, [[]]]),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """One thing that happens to a file; `apply` gets its path, where the valid content is."""

    name: str
    apply: Callable[[Path], object]

    def __repr__(self) -> str:
        return f"Damage({self.name})"


CONTENTS: Final[Mapping[str, Callable[[bytes], bytes]]] = {
    "nothing": lambda content: content,
    "empty": lambda _: b"",
    "half of it": lambda content: content[: len(content) // 2],
    "blank": lambda _: b" \n" * 100,
    "null": lambda _: b"null",
    "a list": lambda content: b"[" + content + b"]",
    "an object": lambda _: b"{}",
    "a text": lambda _: b'"{}"',
    "deep lists": lambda _: b"[" * 100_000,
    "deep objects": lambda _: b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "deep and closed": lambda _: b"[" * 3_000 + b"]" * 3_000,
    "an endless number": lambda _: b"9" * 10_000,
    "an infinite number": lambda content: content.replace(b"1", b"1e999"),
    "NaN": lambda content: content.replace(b":0", b":NaN").replace(b": 0", b": NaN"),
    "a byte-order mark": lambda content: b"\xef\xbb\xbf" + content,
    "UTF-16": lambda content: content.decode().encode("utf-16"),
    "not UTF-8": lambda content: content[: len(content) // 2] + b"\xff\xfe" + content[len(content) // 2 :],
    "a lone surrogate": lambda content: content.replace(b'"', b'"\\ud800', 1),
    "NUL bytes": lambda content: content + b"\0" * 4096,
    "lost blocks": lambda content: b"\0" * len(content),
    "twice": lambda content: content + content,
    "junk after it": lambda content: content + b"}\n<html>",
    "a key twice": lambda content: content.replace(b"{", b'{"schema_version": 1, "schema_version": 99, ', 1),
    "a program": lambda _: b"import os; os.system('true')",
}


def _truncated(share: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(share * len(content))]


def _overwritten(share: float, junk: bytes) -> Callable[[bytes], bytes]:
    def spoil(content: bytes) -> bytes:
        place = int(share * len(content))
        return content[:place] + junk + content[place + len(junk) :]

    return spoil


def _edited(steps: list[int], value: object, *, delete: bool) -> Callable[[bytes], bytes]:
    """One value somewhere in the JSON replaced or deleted; `steps` choose the way to it."""

    def spoil(content: bytes) -> bytes:
        data = json.loads(content)
        inner: Any = data
        for step in steps:
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            if not keys:
                break
            key = keys[step % len(keys)]
            if step == steps[-1] or not isinstance(inner[key], dict | list):
                if delete:
                    del inner[key]
                else:
                    inner[key] = value
                break
            inner = inner[key]
        return json.dumps(data).encode("utf-8", "surrogatepass")

    return spoil


def newer_schema(content: bytes) -> bytes:
    """The same file as a later version of the package might write it."""
    data = json.loads(content)
    if isinstance(data, dict):
        data = data | {"schema_version": 99, "from_the_future": [1, 2]}
    return json.dumps(data).encode()


def _content(spoil: Callable[[bytes], bytes], name: str) -> Damage:
    return Damage(name, lambda path: path.write_bytes(spoil(path.read_bytes())))


NEWER_SCHEMA: Final = _content(newer_schema, "a newer schema")
contents: st.SearchStrategy[Damage] = st.one_of(
    st.sampled_from(sorted(CONTENTS)).map(lambda name: _content(CONTENTS[name], name)),
    st.floats(0, 1).map(lambda share: _content(_truncated(share), f"truncated at {share:.3f}")),
    st.builds(
        lambda share, junk: _content(_overwritten(share, junk), f"{junk!r} at {share:.3f}"),
        st.floats(0, 1), st.binary(min_size=1, max_size=6),
    ),
    st.builds(
        lambda steps, value, delete: _content(
            _edited(steps, value, delete=delete), f"{'deleted' if delete else repr(value)[:60]} by {steps}"
        ),
        st.lists(st.integers(0, 30), min_size=1, max_size=6), JSON_VALUES, st.booleans(),
    ),
    st.just(NEWER_SCHEMA),
)  # fmt: skip


# Something else in place of the file.


def _replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.rename(path.with_name("kept-elsewhere"))
        make(path)

    return apply


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket has to be short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name[:60])
            Path(path.name[:60]).rename(path)
    finally:
        os.chdir(here)


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(_LARGE)


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "file").touch()


def _read_only(path: Path) -> None:
    path.chmod(0o400)
    path.parent.chmod(0o500)


ENTRIES: Final[Mapping[str, Callable[[Path], None]]] = {
    "missing": _replaced(lambda path: None),
    "a FIFO": _replaced(os.mkfifo),
    "a folder": _replaced(lambda path: path.mkdir()),
    "a folder with a file": _replaced(_folder),
    "a socket": _replaced(_socket),
    "500 MB": _replaced(_huge),
    "a link to itself": _replaced(lambda path: path.symlink_to(path)),
    "a link to nothing": _replaced(lambda path: path.symlink_to("nothing")),
    "a link to the file": _replaced(lambda path: path.symlink_to("kept-elsewhere")),
    "a link to a folder": _replaced(lambda path: path.symlink_to(path.parent)),
    "a link to /dev/zero": _replaced(lambda path: path.symlink_to("/dev/zero")),
    "a disk that cannot be read": _replaced(lambda path: path.symlink_to("/proc/self/mem")),  # EIO at address 0
    "a link to /dev/full": _replaced(lambda path: path.symlink_to("/dev/full")),
    "unreadable": lambda path: path.chmod(0),
    "read-only": _read_only,
} | ({"another user's": lambda path: os.chown(path, FOREIGN_USER, -1)} if os.geteuid() == 0 else {})

entries: st.SearchStrategy[Damage] = st.sampled_from(sorted(ENTRIES)).map(lambda name: Damage(name, ENTRIES[name]))
damages: st.SearchStrategy[Damage] = st.one_of(contents, contents, contents, entries)


NAMED: Final = (
    *(_content(spoil, name) for name, spoil in CONTENTS.items()), NEWER_SCHEMA,
    *(Damage(name, apply) for name, apply in ENTRIES.items()),
)  # fmt: skip
Test = Callable[..., None]


def every_named_damage(**others: object) -> Callable[[Test], Test]:
    """Run a Hypothesis test on each of `NAMED` before drawn damages; `others` are its further arguments."""

    def decorate(test: Test) -> Test:
        for damage in NAMED:
            test = example(damage=damage, **others)(test)
        return test

    return decorate
