"""The table of supported versions in README.md, from the files of pins and the record of the matrix.

    python -m tests.matrix.table          # writes it

A test holds README to it.
"""

from pathlib import Path
from typing import Final

from tests.matrix.cells import CELLS, Outcome, kind, outcomes, pins

README: Final = Path(__file__).parents[2] / "README.md"
BEGIN: Final = "<!-- made by `python -m tests.matrix.table` -->"
END: Final = "<!-- end -->"
_NAMES: Final = {"torch": "torch", "triton": "Triton", "vllm": "vLLM", "transformers": "transformers"}
# What a row is about, and what goes with it.
_SUBJECTS: Final = {"torch": ("torch", "triton"), "vllm": ("vllm", "torch"), "transformers": ("transformers", "torch")}


def table() -> str:
    """The rows, one for each file of pins, with each of its cells' last outcome."""
    recorded = outcomes()
    lines = ["| Versions | Cells of `make matrix`, and how they last ended |", "|---|---|"]
    for file in dict.fromkeys(CELLS.values()):
        ended = (f"`{cell}`: {_ended(recorded.get(cell), file)}" for cell, of in CELLS.items() if of == file)
        lines.append(f"| {versions(file)} | {'; '.join(ended)} |")
    return "\n".join(lines)


def versions(file: str) -> str:
    """The versions that a row is about: ``"torch 2.11.0, Triton 3.6.0"``."""
    pinned, subject = pins(file), kind(file)
    if subject == "python":
        digits = file.removeprefix("python")
        return f"Python {digits[0]}.{digits[1:]}, torch {pinned['torch']}"
    return ", ".join(f"{_NAMES[library]} {pinned[library]}" for library in _SUBJECTS[subject])


def _ended(outcome: Outcome | None, file: str) -> str:
    if outcome is None or (outcome.passed and not ran_with_pins(outcome, file)):
        return "not run"
    return f"{'passed' if outcome.passed else 'failed'} on {outcome.date}"


def ran_with_pins(outcome: Outcome, file: str) -> bool:
    """Whether a recorded run had the versions that are pinned now; a CPU build of torch is the same version."""
    ran = {library: version.partition("+")[0] for library, version in outcome.versions.items()}
    return all(ran.get(library, version) == version for library, version in pins(file).items())


def with_table(text: str) -> str:
    """README's text with the table of today."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
