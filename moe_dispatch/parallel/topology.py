"""Which devices the ranks of a group have and what joins them: what times of exchanges depend on."""

import hashlib
import importlib
from typing import Any

import pydantic
import torch

from moe_dispatch.machine import Machine


class Topology(pydantic.BaseModel):
    """The ranks of a group.

    Attributes:
        devices: The fingerprint of each rank's device (`Machine.fingerprint`), in the order of ranks.
        hosts: The number of each rank's host; hosts are numbered as they occur.
        nvlinks: For each rank, how many NVLinks join its device to each other GPU of its host; None where that is not
            known or differs from GPU to GPU, 0 without NVLink and on a CPU.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    devices: tuple[str, ...]
    hosts: tuple[int, ...]
    nvlinks: tuple[int | None, ...]

    @property
    def key(self) -> str:
        """A file name: the number of ranks, the first one's device, and a hash of everything."""
        digest = hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:10]
        return f"{len(self.devices)}x{self.devices[0].rpartition('-')[0]}-{digest}"

    def __str__(self) -> str:
        names = ", ".join(dict.fromkeys(self.devices))
        links = dict.fromkeys("unknown links" if n is None else f"NV{n}" if n else "no NVLink" for n in self.nvlinks)
        return f"{len(self.devices)} ranks on {len(set(self.hosts))} hosts: {names}, {', '.join(links)}"


def nvlinks(machine: Machine, device: torch.device) -> int | None:
    """See `Topology.nvlinks`."""
    if machine.device != "cuda":
        return 0
    try:  # torch has no public way to ask
        module: Any = importlib.import_module("torch._C._distributed_c10d")
        kind: Any = importlib.import_module("torch._C._autograd").DeviceType.CUDA
        matrix = module._detect_dma_connectivity(kind, "nvlink").matrix
    except (ImportError, AttributeError, RuntimeError):
        return None
    here = torch.cuda.current_device() if device.index is None else device.index
    others = {count for other, count in enumerate(matrix[here]) if other != here}
    return others.pop() if len(others) == 1 else None
