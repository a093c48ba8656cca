"""The machine: the device, its limits, and the versions of everything that a choice may depend on."""

import functools
import hashlib
import json
import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Self

import pydantic

from moe_dispatch.errors import InvalidInputError, UnknownNameError
from moe_dispatch.settings import Settings
from moe_dispatch.system.files import read_bytes, read_json
from moe_dispatch.system.libraries import library_version

if TYPE_CHECKING:
    from torch import device as Device

# Common GPUs by short name, each with the source of its figures, and the software that they are described with: that of
# the run that measured the H200's table, unless a description says otherwise.
SHIPPED: Final = Path(__file__).with_name("machines.json")
MAX_BYTES: Final = 1 << 20  # A report of `moe-dispatch doctor --json` has a few KiB.

Text = Annotated[str, pydantic.Field(max_length=200)]
Size = Annotated[int, pydantic.Field(ge=0, lt=1 << 60)]
Number = Annotated[int, pydantic.Field(ge=0, lt=1000)]


class Machine(pydantic.BaseModel):
    """A device and the software around it; JSON both ways, so that a laptop can ask what an H200 would do.

    Descriptions of common GPUs ship with the package (`shipped_machines`).

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        name: The device's name as its vendor spells it.
        capability: CUDA compute capability, None on a CPU.
        sms: Streaming multiprocessors; cores on a CPU.
        memory_bytes: Memory of the device; of the host for a CPU.
        l2_bytes: L2 cache; 0 where unknown.
        shared_memory_per_block: Opt-in limit in bytes; 0 on a CPU.
        driver: Version of the GPU's driver; empty on a CPU.
        cuda: CUDA version that torch was built with; empty for a build for CPUs or ROCm.
        torch: Version of torch.
        triton: Version of Triton; empty where it is not installed.
        libraries: Versions of optional libraries (``vllm``, ``deep_gemm``); a missing key is a missing library.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    device: str = pydantic.Field(pattern="^(cuda|cpu)$")
    name: Text
    capability: tuple[Number, Number] | None = None
    sms: int = pydantic.Field(ge=1, lt=1 << 20)
    memory_bytes: Size
    l2_bytes: Size = 0
    shared_memory_per_block: Size = 0
    driver: Text = ""
    cuda: Text = ""
    torch: Text
    triton: Text = ""
    libraries: dict[Text, Text] = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _capability_goes_with_cuda(self) -> Self:
        if (self.capability is None) == (self.device == "cuda"):
            raise ValueError("a cuda machine has a capability such as [9, 0], and a cpu has null")
        return self

    @property
    def fingerprint(self) -> str:
        """An identifier of the hardware alone: measurements carry the versions that they depend on themselves."""
        hardware = f"{self.name}|{self.capability}|{self.sms}|{self.memory_bytes >> 30}"
        return f"{self.slug}-{hashlib.sha256(hardware.encode()).hexdigest()[:10]}"

    @property
    def slug(self) -> str:
        """The name as a file name: ``nvidia_h200``."""
        return re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_") or "unknown"

    @classmethod
    def load(cls, name_or_path: str | Path) -> Self:
        """A shipped machine by name, or one described in a JSON file.

        Args:
            name_or_path: ``"h200"`` or ``"NVIDIA H200"``, in any case (`shipped_machines`); or the path of a
                description, alone or within a report of ``moe-dispatch doctor --json``. Text with a ``/`` or ending in
                ``.json`` is a path.

        Raises:
            UnknownNameError: No shipped machine has this name.
            InvalidInputError: The file is missing or is not a machine.
        """
        text = str(name_or_path)
        if not isinstance(name_or_path, Path) and "/" not in text and not text.lower().endswith(".json"):
            wanted = _letters(text)
            for name, machine in _shipped().items():
                if wanted and wanted in (_letters(name), _letters(machine["name"])):
                    return cls.model_validate(machine)
            raise UnknownNameError("machine", text[:80], (*shipped_machines(), "path/to/machine.json"))
        try:
            described = read_json(Path(name_or_path), limit=MAX_BYTES)
            if isinstance(described, dict):
                described = described.get("machine", described)
            return cls.model_validate(described)
        except (OSError, ValueError) as error:  # pydantic's errors are ValueErrors
            why = _first_fault(error) if isinstance(error, pydantic.ValidationError) else error
            if isinstance(error, OSError):
                why = error.strerror or error  # without the path, which may be long
            raise InvalidInputError(
                f"{text[:300]} is not a machine description ({why}); `moe-dispatch doctor --json` prints one"
            ) from error

    @classmethod
    def inspect(cls, device: "Device | str | int | None" = None) -> Self:
        """Look at this machine's device; the current CUDA device if None, else the CPU.

        `MOE_DISPATCH_MACHINE` (a shipped name or a JSON file) replaces what is seen: an H200 told that it is an sm_80
        device makes every choice that an A100 would.

        Raises:
            InvalidInputError: There is no such device, or `MOE_DISPATCH_MACHINE` is no machine or of another kind.
        """
        present = present_device(device)
        if described := Settings.from_environment().machine:
            machine = cls.load(described)
            if machine.device != present.type and device is not None:
                raise InvalidInputError(
                    f"MOE_DISPATCH_MACHINE={described} describes a {machine.device} machine, and what runs here is on "
                    f"{present}; unset it, or ask without running: `moe-dispatch explain --machine {described}`"
                )
            return machine
        return cls._inspect_cuda(present) if present.type == "cuda" else cls._inspect_cpu()

    @classmethod
    def _inspect_cuda(cls, device: "Device") -> Self:
        import torch

        properties = torch.cuda.get_device_properties(device)
        return cls(
            device="cuda",
            name=properties.name,
            capability=(properties.major, properties.minor),
            sms=properties.multi_processor_count,
            memory_bytes=properties.total_memory,
            l2_bytes=properties.L2_cache_size,
            # torch's stubs do not know the opt-in limit, which is what a kernel may really ask for.
            shared_memory_per_block=getattr(properties, "shared_memory_per_block_optin", 0),
            driver=_driver_version(),
            cuda=torch.version.cuda or "",
            **_software(),
        )

    @classmethod
    def _inspect_cpu(cls) -> Self:
        import torch

        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
        return cls(
            device="cpu",
            name=_cpu_name(),
            sms=os.cpu_count() or 1,
            memory_bytes=memory,
            cuda=torch.version.cuda or "",
            **_software(),
        )


def shipped_machines() -> tuple[str, ...]:
    """Names of the machine descriptions that ship with the package, for `Machine.load`."""
    return tuple(_shipped())


@functools.cache
def _shipped() -> dict[str, dict[str, Any]]:
    shipped = json.loads(SHIPPED.read_bytes())
    machines: dict[str, dict[str, Any]] = shipped["machines"]
    for machine in machines.values():
        del machine["source"]
    return {name: {"device": "cuda", **shipped["software"], **machine} for name, machine in machines.items()}


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def default_device() -> str:
    """``"cuda"`` where torch sees a CUDA device, else ``"cpu"``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def present_device(name: "Device | str | int | None" = None) -> "Device":
    """A device that is here, a GPU with its number; the current CUDA device if None or unnumbered, else the CPU.

    Raises:
        InvalidInputError: There is no such device.
    """
    import torch

    wanted = name if name is not None else default_device()
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError) as error:
        raise InvalidInputError(f"device must be cpu, cuda or cuda:N, got {wanted!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise InvalidInputError(f"device must be cpu, cuda or cuda:N, got {wanted!r}")
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise InvalidInputError(f"device {str(device)!r} was asked for, and torch sees {count} CUDA devices here")
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


@functools.cache
def current_machine(device_type: str, index: int | None = None) -> Machine:
    """The machine behind a torch device, inspected once per process."""
    return Machine.inspect(device_type if index is None else f"{device_type}:{index}")


def _software() -> dict[str, object]:
    import torch

    libraries = {name: version for name in ("vllm", "deep_gemm") if (version := library_version(name))}
    return {"torch": torch.__version__, "triton": library_version("triton"), "libraries": libraries}


def _first_fault(error: pydantic.ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))


def _driver_version() -> str:
    return _match(Path("/proc/driver/nvidia/version"), r"\b(\d{3,}\.\d+(?:\.\d+)?)\b") or "unknown"


def _cpu_name() -> str:
    name = _match(Path("/proc/cpuinfo"), r"^model name\s*:\s*(.+)$") or platform.processor() or platform.machine()
    return name.strip()[:200]


def _match(path: Path, pattern: str) -> str:
    """The first group of a pattern in a text file; empty where there is none."""
    try:
        text = read_bytes(path).decode(errors="replace")
    except OSError:
        return ""
    matched = re.search(pattern, text, re.MULTILINE)
    return matched.group(1) if matched else ""
