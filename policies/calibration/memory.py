"""How much memory measuring a layer needs, computed before it is allocated: on a CPU too much means SIGKILL."""

from pathlib import Path
from typing import Final

import torch

from moe_dispatch.problem import ELEMENT_BYTES, MoEProblem, stored_bytes
from moe_dispatch.system.files import read_bytes
from moe_dispatch.workspace import gibibytes

_CGROUP: Final = Path("/sys/fs/cgroup")
_MAX_BYTES: Final = 1 << 20  # What the kernel prints of a process or a group has a few KiB.
# fp32 copies of one expert that are alive at once while its weights are drawn, scaled and quantised.
_EXPERT_COPIES: Final = 6


def weight_bytes(problem: MoEProblem) -> int:
    """Peak memory of making a layer's random weights (`make_experts`), in bytes."""
    elements = (problem.gate_up_rows + problem.N) * problem.K
    plain = ELEMENT_BYTES[problem.act_dtype] * elements * problem.E
    # Codes lie beside what they are quantised from.
    codes = stored_bytes(problem.dtype, elements * problem.E) if problem.quantized else 0
    return plain + codes + 4 * _EXPERT_COPIES * elements


def input_bytes(problem: MoEProblem, count: int) -> int:
    """Peak memory of making `count` inputs of a problem with their routings, in bytes."""
    one = problem.M * (problem.K * ELEMENT_BYTES[problem.act_dtype] + 8 * problem.topk)
    drawn = 4 * problem.M * problem.K  # in fp32, before it is rounded
    # Logits and noise of the routing are drawn on the host.
    return count * one + drawn + (12 * problem.M * problem.E if problem.device == "cpu" else 0)


def require(needed: int, what: str, device: torch.device) -> None:
    """Check that memory for `what` is free.

    Raises:
        MemoryError: It is not; the message has both sizes.
    """
    free = free_bytes(device)
    if free is not None and needed > free:
        raise MemoryError(f"{what} need {gibibytes(needed)}, and {gibibytes(free)} are free")


def free_bytes(device: torch.device) -> int | None:
    """Memory that this process can still allocate, in bytes; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    known = [size for size in (_available_on_host(), _left_in_cgroup()) if size is not None]
    return min(known, default=None)


def _available_on_host() -> int | None:
    available = _fields(Path("/proc/meminfo")).get("MemAvailable:")
    return None if available is None else 1024 * available


def _left_in_cgroup() -> int | None:
    """What the memory limit of this process's control group (version 2) leaves, page cache not counted as used."""
    try:
        name = _text(Path("/proc/self/cgroup")).strip().rpartition("::/")[2]
        folder = _CGROUP / name if (_CGROUP / name / "memory.max").exists() else _CGROUP
        limit = int(_text(folder / "memory.max"))
        used = int(_text(folder / "memory.current"))
    except (OSError, ValueError):  # no control group, or no limit: "max"
        return None
    return max(0, limit - used + _fields(folder / "memory.stat").get("inactive_file", 0))


def _text(path: Path) -> str:
    return read_bytes(path, limit=_MAX_BYTES).decode("ascii")


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name and a number, as the kernel writes them."""
    try:
        lines = _text(path).splitlines()
        return {line.split()[0]: int(line.split()[1]) for line in lines if len(line.split()) > 1}
    except (OSError, ValueError):
        return {}
