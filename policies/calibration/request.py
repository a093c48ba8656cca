"""What a calibration is asked to do, checked once."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from moe_dispatch.errors import InvalidInputError
from moe_dispatch.machine import Machine
from moe_dispatch.policies.calibrated import calibration_path
from moe_dispatch.policies.measurements.schema import LayerShape
from moe_dispatch.problem import Mode
from moe_dispatch.workloads import ROUTINGS

DEFAULT_TOKENS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
DEFAULT_ROUTINGS: Final = ("uniform", "dirichlet-4")
DEFAULT_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, kw_only=True)
class CalibrationRequest:
    """What a calibration measures, where, and for how long.

    Attributes:
        device: The device on which candidates run.
        tokens: Token counts, ascending and distinct.
        modes: Graph, eager or both; the first starts with all candidates, the second with the finalists of the first.
        routings: Names of routing distributions; successive halving runs on the first one, the final on all.
        refine: Whether to measure between token counts where the winner changes.
        backends: See `calibrate`, as for all that are not listed.

    Raises:
        InvalidInputError: A value is out of its range; the message says which and what is allowed.
    """

    machine: Machine
    device: torch.device
    layers: tuple[LayerShape, ...]
    tokens: tuple[int, ...] = DEFAULT_TOKENS
    modes: tuple[Mode, ...] = ("eager",)
    routings: tuple[str, ...] = DEFAULT_ROUTINGS
    backends: tuple[str, ...] | None = None
    most_configs: int | None = None
    refine: bool = True
    resume: bool = False
    compile_only: bool = False
    budget_s: float | None = None
    timeout_s: float = DEFAULT_TIMEOUT_S
    energy_s: float = 0.0
    directory: Path | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "tokens", "modes", "routings"):
            if not getattr(self, name):
                raise InvalidInputError(f"a calibration needs at least one of its {name}, got none")
        if self.tokens[0] < 1:
            raise InvalidInputError(f"tokens must be at least 1, got {self.tokens[0]}")
        if list(self.tokens) != sorted(set(self.tokens)):
            raise InvalidInputError(f"tokens must ascend without duplicates, got {list(self.tokens)}")
        if unknown := [name for name in self.routings if name not in ROUTINGS]:
            raise InvalidInputError(f"routings must be among {', '.join(ROUTINGS)}, got {', '.join(unknown)}")
        possible = possible_modes(self.machine)
        if not set(self.modes) <= set(possible):
            raise wrong_modes(self.modes, possible)
        if self.most_configs is not None and self.most_configs < 1:
            raise InvalidInputError(f"most_configs must be at least 1, got {self.most_configs}")
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise InvalidInputError(f"timeout_s must be a positive number of seconds, got {self.timeout_s}")
        for name in ("budget_s", "energy_s"):
            seconds = getattr(self, name)
            if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
                raise InvalidInputError(f"{name} must be a number of seconds, at least 0, got {seconds}")

    @property
    def path(self) -> Path:
        """The calibration file that the result is merged into."""
        return calibration_path(self.machine, self.directory)


def wrong_modes(modes: Iterable[Mode], possible: Iterable[Mode]) -> InvalidInputError:
    """What to raise of modes that a machine lacks."""
    return InvalidInputError(
        f"modes must be among {', '.join(possible)} here, got {', '.join(modes)}; a graph needs CUDA"
    )


def possible_modes(machine: Machine) -> tuple[Mode, ...]:
    """The modes that a machine has: CUDA graphs need a CUDA device."""
    return ("graph", "eager") if machine.device == "cuda" else ("eager",)
