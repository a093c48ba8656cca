"""Rows of a record, written as they come: a run that is ended leaves what it has."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_dispatch.machine import Machine
from moe_dispatch.measure.provenance import commit, versions
from moe_dispatch.system.compression import read_bytes
from moe_dispatch.system.files import MAX_BYTES


def append(path: str | Path, row: Mapping[str, object]) -> None:
    """Append one row to a file of JSON lines."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def report(path: str | Path, row: Mapping[str, object]) -> None:
    """Append one row, and print it."""
    print(json.dumps(row), flush=True)
    append(path, row)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, which is compressed if its name ends with .xz."""
    return list(map(json.loads, read_bytes(path, limit=MAX_BYTES).decode().splitlines()))


def write(
    path: str | Path, rows: Iterable[Mapping[str, object]], machine: Machine, **facts: object
) -> list[Mapping[str, object]]:
    """Write a record anew: its origin with these facts, then each row as soon as it is there, which is printed too.

    Returns the rows.
    """
    written = []
    Path(path).write_text("", encoding="utf-8")
    append(path, {"origin": origin(machine), **facts})
    for row in rows:
        report(path, row)
        written.append(row)
    return written


def origin(machine: Machine) -> dict[str, object]:
    """What every record says once: the machine, the commit, and the versions that it was measured with."""
    return {"machine": machine.name, "commit": commit(Path.cwd()), "versions": versions(machine)}
