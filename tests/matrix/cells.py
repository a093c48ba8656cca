"""What the matrix's cells are, and the record of their last runs. Uses the standard library only: nox imports it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parent
RECORD: Final = FOLDER / "record.json"
# Every cell and its file of pins.
CELLS: Final = {
    **{f"{kind}-torch{torch}": f"torch{torch}" for torch in (211, 213, 214, 215) for kind in ("core", "defaults")},
    **{f"transformers{release}": f"transformers{release}" for release in ("517", "524")},
    **{f"vllm{release}": f"vllm{release}" for release in ("0202", "0240", "0260", "0270", "0320", "0330")},
    **{f"packaging-python{python}": f"python{python}" for python in (311, 312, 313)},
}


def kind(cell: str) -> str:
    """What a cell runs: ``"core"`` of ``"core-torch211"``, ``"vllm"`` of ``"vllm0202"``."""
    return cell.partition("-")[0].rstrip("0123456789")


@dataclass(frozen=True)
class Outcome:
    """The last run of a cell.

    Attributes:
        passed: Whether all of it passed.
        seconds: How long it took, the installation included, on a machine that may have been busy.
        cpu_seconds: Processor time of all its processes: half of it is what a cell takes on two idle cores, at best.
        date: The day, ``"2026-11-29"``.
        versions: Versions of Python and of the libraries in the cell's environment.
    """

    passed: bool
    seconds: int
    date: str
    versions: Mapping[str, str]
    cpu_seconds: int = 0


def outcomes(path: Path = RECORD) -> dict[str, Outcome]:
    if not path.exists():
        return {}
    return {name: Outcome(**fields) for name, fields in json.loads(path.read_text(encoding="utf-8")).items()}


def keep(cell: str, outcome: Outcome, path: Path = RECORD) -> None:
    """Write the outcome of a cell into the record, a line each, in place of an earlier one."""
    kept = outcomes(path) | {cell: outcome}
    lines = (f"{json.dumps(name)}: {json.dumps(asdict(kept[name]))}" for name in sorted(kept))
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def pins(name: str) -> dict[str, str]:
    """The versions that a file of pins names, by library: ``{"torch": "2.11.0", …}``."""
    lines = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
    return {library: version for library, _, version in pairs}
