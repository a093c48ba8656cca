"""Where the rows of a run come from: its machine, versions, commit and ceilings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from moe_dispatch.machine import Machine
from moe_dispatch.measure import Ceilings, known_ceilings, measure_ceilings
from moe_dispatch.measure.provenance import commit, versions


@dataclass(frozen=True)
class Provenance:
    """Facts that every row of a run repeats.

    Attributes:
        machine: The machine that measures.
        versions: Versions of the libraries that a time depends on.
        commit: Commit of the checkout in the working directory; empty outside one.
        measured: Ceilings that were measured when the run began.
    """

    machine: Machine
    versions: dict[str, str]
    commit: str
    measured: Ceilings

    @classmethod
    def here(cls, machine: Machine) -> "Provenance":
        """Facts of a run that begins now on this machine; measures the ceilings, which takes about a second."""
        measured = measure_ceilings(torch.device(machine.device))
        return cls(machine, versions(machine), commit(Path.cwd()), measured)

    @property
    def roofline(self) -> tuple[Ceilings, Literal["device", "measured"]]:
        """The ceilings that rooflines are computed from: the published ones of a known device, else the measured."""
        known = known_ceilings(self.machine)
        return (known, "device") if known else (self.measured, "measured")
