"""JSON Lines files of benchmark rows: one row a line as `moe-dispatch bench` writes them, or packed (`packed`).

A name that ends with ``.xz`` is that of a compressed file, as the repository's own record has them.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import pydantic

from moe_dispatch.benchmarks.packed import DAMAGED, is_packed, unpack
from moe_dispatch.benchmarks.rows import BenchRow, RowKey
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.system.compression import read_bytes

MAX_BYTES: Final = 128 << 20  # A sweep of seven models at fifteen token counts takes about 1 MiB.


def append(path: Path, row: BenchRow) -> None:
    """Add a row in one write, so that an interrupted run leaves whole lines.

    Raises:
        InvalidInputError: The file cannot be written, or the disk is full; the rows before are kept.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(0, 2)
            if file.tell():
                file.seek(-1, 2)
                # A run killed inside a write leaves half a line: end it, so that it spoils no row but its own.
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(row.model_dump_json().encode() + b"\n")
            file.flush()
    except OSError as error:
        raise InvalidInputError(
            f"a row cannot be written to {path} ({error.strerror or error}); what was written before is kept, and "
            "--resume goes on with it where there is room"
        ) from error


def load(paths: Iterable[Path]) -> list[BenchRow]:
    """Read rows from files, and from every ``.jsonl`` and ``.jsonl.xz`` file of rows in folders.

    A later row replaces an earlier one of the same key and machine. Other records in a folder (JSON Lines that begin
    with another kind of object) are passed over.

    Raises:
        InvalidInputError: A file cannot be read, or a line in it is neither a row nor one that was cut off.
    """
    rows: dict[tuple[str, RowKey], BenchRow] = {}
    for path in paths:
        for file in _files_below(path) if os.path.isdir(path) else [path]:
            lines = _lines(file)
            if os.path.isdir(path) and _is_other_record(lines):
                continue
            for row in _parse(file, lines):
                rows[row.fingerprint, row.key] = row
    return list(rows.values())


def _files_below(folder: Path) -> list[Path]:
    """The files of rows in a folder. What may not be listed, or is removed meanwhile, has none."""
    walk = os.walk(folder)  # `Path.rglob` raises where a folder goes away under it
    suffixes = (".jsonl", ".jsonl.xz")
    return sorted(Path(parent, name) for parent, _, names in walk for name in names if name.endswith(suffixes))


def timed_keys(path: Path, fingerprint: str) -> set[RowKey]:
    """Keys of a machine's rows that have a time; empty if the file does not exist.

    A row without a time is measured again: what lacked memory or was wrong may have been repaired.
    """
    rows = load([path]) if os.path.lexists(path) else []
    return {row.key for row in rows if row.us is not None and row.fingerprint == fingerprint}


def _lines(path: Path) -> list[bytes]:
    """The lines of a file, as bytes: one that was cut off may end inside of a letter."""
    try:
        return read_bytes(path, limit=MAX_BYTES).splitlines()
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{path} cannot be read ({error}); give .jsonl files of `moe-dispatch bench`"
        ) from error


def _is_other_record(lines: list[bytes]) -> bool:
    """Whether lines begin with a JSON object that is neither a row nor the head of a packed file."""
    try:
        first = json.loads(lines[0]) if lines else None
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and not {"workload", "packed"} & set(first)


def _parse(path: Path, lines: list[bytes]) -> Iterator[BenchRow]:
    if is_packed(lines):
        try:
            yield from unpack(b"\n".join(lines).decode())
        except DAMAGED as error:
            raise InvalidInputError(f"{path} cannot be read: {error}") from error
        return
    for number, line in enumerate(lines, start=1):
        try:
            yield BenchRow.model_validate_json(line)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            if first["type"] == "json_invalid" and "EOF" in first["msg"]:  # cut off inside a write
                continue
            raise InvalidInputError(
                f"{path}:{number} is not a benchmark row: {'.'.join(map(str, first['loc']))} {first['msg']}"
            ) from error
