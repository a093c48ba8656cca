"""Which shipped table serves a device that has none of its own, and how the two devices' times differ."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Final

from moe_dispatch.errors import PolicyFileError
from moe_dispatch.machine import Machine
from moe_dispatch.measure.ceilings import KNOWN_CEILINGS
from moe_dispatch.problem import MoEProblem
from moe_dispatch.system.compression import read_bytes
from moe_dispatch.system.files import MAX_BYTES

# A device with fewer multiprocessors than this share of the measured one's (a MIG slice, say) is left to the rules:
# which configuration is fastest depends on how many programs run at once.
LEAST_SHARE: Final = 0.5
TABLE: Final = ".json.xz"
# A table's choices carry over while memory and matrix rates differ alike. Where one differs from the other by more than
# this factor (an H20 has .83 of an H200's bandwidth and .15 of its matrix rate), layers become bound by products at so
# many fewer tokens that the learned model, each part of which is scaled by its own rate, decides.
MOST_IMBALANCE: Final = 2.0


@dataclass(frozen=True)
class DataSheet:
    """A device's rates as its vendor states them; only ratios of them are used.

    Attributes:
        bandwidth: Memory bandwidth in TB/s.
        bf16: Dense BF16 products in TFLOP/s.
    """

    name: str
    sms: int
    bandwidth: float
    bf16: float
    capability: tuple[int, int] = (9, 0)


DATA_SHEETS: Final[Mapping[str, DataSheet]] = {
    "nvidia_h200": DataSheet("NVIDIA H200", 132, 4.8, 989),
    "nvidia_h200_nvl": DataSheet("NVIDIA H200 NVL", 132, 4.8, 835),
    "nvidia_h100_80gb_hbm3": DataSheet("NVIDIA H100 80GB HBM3", 132, 3.35, 989),
    "nvidia_h100_nvl": DataSheet("NVIDIA H100 NVL", 132, 3.9, 835),
    "nvidia_h100_pcie": DataSheet("NVIDIA H100 PCIe", 114, 2.0, 756),
    "nvidia_h800": DataSheet("NVIDIA H800", 132, 3.35, 989),
    "nvidia_h20": DataSheet("NVIDIA H20", 78, 4.0, 148),
    "nvidia_gh200_480gb": DataSheet("NVIDIA GH200 480GB", 132, 4.0, 990),
    "nvidia_gh200_144g_hbm3e": DataSheet("NVIDIA GH200 144G HBM3e", 132, 4.9, 990),
}


@dataclass(frozen=True)
class Nearest:
    """The measured device that stands in for another one.

    Attributes:
        slug: `Machine.slug` of the measured device.
        bandwidth: Memory bandwidth here over that of the measured device.
        rate: Matrix rate here over that of the measured device.
        evidence: Where the two ratios come from.
    """

    slug: str
    name: str
    bandwidth: float = 1.0
    rate: float = 1.0
    evidence: str = ""

    def note(self, what: str) -> str:
        """A sentence for `notes`: which device's table or model serves this one, and how it is scaled."""
        return (
            f"no {what} ships for this device; that of {self.name} serves it, scaled by {self.bandwidth:.2f} in "
            f"bandwidth and {self.rate:.2f} in matrix rate ({self.evidence}): `moe-dispatch calibrate` measures here"
        )

    def slowdown(self, problem: MoEProblem) -> float:
        """Time of a problem here over its time on the measured device: the ratio of their rooflines."""
        if (known := KNOWN_CEILINGS.get(self.slug)) is None or (flops := known.ceilings.flops(problem.dtype)) is None:
            return 1 / self.bandwidth
        ceilings = known.ceilings
        here = problem.roofline_us(ceilings.bandwidth * self.bandwidth, flops * self.rate)
        return here / problem.roofline_us(ceilings.bandwidth, flops)


def shipped(slug: str, suffix: str) -> Traversable:
    """The file that ships for a device: its table (`TABLE`) or its learned model (``".model.json"``)."""
    return resources.files("moe_dispatch.policies") / "tables" / f"{slug}{suffix}"


def read_shipped(slug: str, suffix: str) -> tuple[bytes, str]:
    """The content of the file that ships for a device, and its path for messages.

    Raises:
        PolicyFileError: It cannot be read or decompressed.
    """
    with resources.as_file(shipped(slug, suffix)) as path:
        try:
            return read_bytes(path, limit=MAX_BYTES), str(path)
        except OSError as error:
            raise PolicyFileError(f"{path} cannot be read: {error.strerror}; install the package again") from error
        except ValueError as error:
            raise PolicyFileError(f"{path} is damaged: {error}; install the package again") from error


def nearest(machine: Machine, suffix: str) -> Nearest | None:
    """The device whose shipped file serves a machine: the machine's own, else the most alike of its capability.

    Returns:
        None if nothing ships for devices of this capability, or the machine is too small a part of one, or if, for a
        table, its memory and matrix rates differ too unlike from theirs.
    """
    if shipped(machine.slug, suffix).is_file():
        return Nearest(machine.slug, machine.name)
    choices = [
        _compared(machine, slug, sheet)
        for slug, sheet in DATA_SHEETS.items()
        if sheet.capability == machine.capability
        and machine.sms >= LEAST_SHARE * sheet.sms
        and shipped(slug, suffix).is_file()
    ]
    if suffix == TABLE:
        limit = math.log(MOST_IMBALANCE)
        choices = [device for device in choices if abs(math.log(device.rate / device.bandwidth)) <= limit]
    return min(choices, key=lambda device: abs(math.log(device.bandwidth)) + abs(math.log(device.rate)), default=None)


def _compared(machine: Machine, slug: str, measured: DataSheet) -> Nearest:
    sheet = DATA_SHEETS.get(machine.slug)
    if sheet is not None and sheet.sms == machine.sms:
        ratios = sheet.bandwidth / measured.bandwidth, sheet.bf16 / measured.bf16
        return Nearest(slug, measured.name, *ratios, "by their data sheets")
    evidence = f"{machine.sms} multiprocessors against {measured.sms}; its bandwidth is not known and taken as equal"
    return Nearest(slug, measured.name, 1.0, machine.sms / measured.sms, evidence)
