"""Why a backend was chosen, as data that prints itself."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moe_dispatch.machine import Machine
from moe_dispatch.policy import Choice
from moe_dispatch.problem import MoEProblem


@dataclass(frozen=True)
class Candidate:
    """A ranked choice, and every reason against it; none if it could run.

    Attributes:
        against: Every reason why it cannot run.
    """

    choice: Choice
    against: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """The ranking for one problem on one machine.

    Attributes:
        machine: The machine that the ranking is for.
        candidates: The ranked choices, best first, the last resort last.
        unranked: Registered backends that no policy ranked, each with its reasons against (empty if it could run).
        notes: Unknown names in the environment, retired measurements, refused files.
    """

    problem: MoEProblem
    machine: Machine
    candidates: tuple[Candidate, ...]
    unranked: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()

    @property
    def chosen(self) -> Candidate | None:
        """The first candidate with nothing against it; None if nothing can run the problem."""
        return next((candidate for candidate in self.candidates if not candidate.against), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return {
            "problem": asdict(self.problem),
            "machine": self.machine.model_dump(mode="json"),
            "chosen": asdict(self.chosen) if self.chosen else None,
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "unranked": {name: list(reasons) for name, reasons in self.unranked.items()},
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"{self.problem}", f"on {self.machine.name}"]
        chosen = self.chosen
        for candidate in self.candidates:
            choice = candidate.choice
            mark = "->" if candidate is chosen else "  "
            lines.append(f"{mark} {_label(choice)}: {choice.reason} [{choice.policy}]")
            lines += [f"     not here: {reason}" for reason in candidate.against]
        for name, reasons in self.unranked.items():
            lines.append(f"   {name}: " + ("; ".join(reasons) or "could run, but no policy ranks it"))
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def _label(choice: Choice) -> str:
    if not choice.config:
        return choice.backend
    return f"{choice.backend}({', '.join(f'{name}={value}' for name, value in choice.config.items())})"
