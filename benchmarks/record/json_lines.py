"""Rows of a record, written as they come: a run that is ended leaves what it has."""

import json
from collections.abc import Mapping
from pathlib import Path


def append(path: str | Path, row: Mapping[str, object]) -> None:
    """Append one row to a file of JSON lines."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
