"""Where it runs: the device, its limits, and the versions of everything that a choice may depend on."""

import functools
import hashlib
import json
import os
import platform
import re
from pathlib import Path
from typing import Self

import pydantic
import torch
from torch import device as Device

from moe_dispatch.errors import InvalidInputError
from moe_dispatch.settings import Settings
from moe_dispatch.system.libraries import library_version


class Machine(pydantic.BaseModel):
    """A device and the software around it; JSON both ways, so that a laptop can ask what an H200 would do.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        name: The device's name as its vendor spells it.
        capability: CUDA compute capability, None on a CPU.
        sms: Streaming multiprocessors; cores on a CPU.
        memory_bytes: Of the device.
        l2_bytes: L2 cache; 0 where unknown.
        shared_memory_per_block: Opt-in limit in bytes; 0 on a CPU.
        driver: Of the GPU; empty on a CPU.
        cuda: That torch was built with; empty for a CPU build.
        torch: Version.
        triton: Version; empty where it is not installed.
        libraries: Versions of optional libraries (``vllm``, ``deep_gemm``); a missing key is a missing library.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    device: str = pydantic.Field(pattern="^(cuda|cpu)$")
    name: str
    capability: tuple[int, int] | None = None
    sms: int = pydantic.Field(ge=1)
    memory_bytes: int = pydantic.Field(ge=0)
    l2_bytes: int = pydantic.Field(default=0, ge=0)
    shared_memory_per_block: int = pydantic.Field(default=0, ge=0)
    driver: str = ""
    cuda: str = ""
    torch: str
    triton: str = ""
    libraries: dict[str, str] = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _capability_goes_with_cuda(self) -> Self:
        if (self.capability is None) == (self.device == "cuda"):
            raise ValueError("a cuda machine has a capability such as [9, 0], and a cpu has null")
        return self

    @property
    def fingerprint(self) -> str:
        """Names the hardware, not the software: measurements carry the versions that they depend on themselves."""
        hardware = f"{self.name}|{self.capability}|{self.sms}|{self.memory_bytes >> 30}"
        return f"{self.slug}-{hashlib.sha256(hardware.encode()).hexdigest()[:10]}"

    @property
    def slug(self) -> str:
        """The name as a file name: ``nvidia_h200``."""
        return re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_") or "unknown"

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a machine from JSON: the description alone, or a whole report of ``moe-dispatch doctor --json``.

        Raises:
            InvalidInputError: The file is missing or is not a machine.
        """
        try:
            described = json.loads(Path(path).read_text(encoding="utf-8"))
            if isinstance(described, dict):
                described = described.get("machine", described)
            return cls.model_validate(described)
        except (OSError, ValueError) as error:  # pydantic's and json's errors are ValueErrors
            why = _first_fault(error) if isinstance(error, pydantic.ValidationError) else error
            raise InvalidInputError(
                f"{path} is not a machine description ({why}); `moe-dispatch doctor --json` prints one"
            ) from error

    @classmethod
    def inspect(cls, device: Device | str | int | None = None) -> Self:
        """Look at this machine's device; the current CUDA device if None, else the CPU.

        `MOE_DISPATCH_MACHINE` (a JSON file) replaces what is seen: an H200 told that it is an sm_80 device makes
        every choice that an A100 would.

        Raises:
            InvalidInputError: There is no such device, or `MOE_DISPATCH_MACHINE` describes another kind.
        """
        resolved = present_device(device)
        described = Settings.from_environment().machine
        if described:
            machine = cls.load(described)
            if machine.device != resolved.type and device is not None:
                raise InvalidInputError(
                    f"MOE_DISPATCH_MACHINE={described} describes a {machine.device} machine, and what runs here is on "
                    f"{resolved}; unset it, or ask without running anything: `moe-dispatch explain --machine FILE`"
                )
            return machine
        return cls._inspect_cuda(resolved) if resolved.type == "cuda" else cls._inspect_cpu()

    @classmethod
    def _inspect_cuda(cls, device: Device) -> Self:
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
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
        return cls(
            device="cpu",
            name=_cpu_name(),
            sms=os.cpu_count() or 1,
            memory_bytes=memory,
            cuda=torch.version.cuda or "",
            **_software(),
        )


def default_device() -> str:
    """``"cuda"`` where torch sees one, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def present_device(asked: Device | str | int | None = None) -> Device:
    """A device that is here, a GPU with its number; the current CUDA device if None or unnumbered, else the CPU.

    Raises:
        InvalidInputError: There is none such.
    """
    asked = asked if asked is not None else default_device()
    try:
        device = Device(asked)
    except RuntimeError as error:
        raise InvalidInputError(f"device must be cpu, cuda or cuda:N, got {asked!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise InvalidInputError(f"device must be cpu, cuda or cuda:N, got {asked!r}")
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InvalidInputError(f"device {str(device)!r} was asked for, and torch sees {count} CUDA devices here")
    return Device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device


@functools.cache
def current_machine(device_type: str, index: int | None = None) -> Machine:
    """The machine behind a torch device, inspected once per process."""
    return Machine.inspect(Device(device_type, index) if index is not None else device_type)


def _software() -> dict[str, object]:
    libraries = {name: version for name in ("vllm", "deep_gemm") if (version := library_version(name))}
    return {"torch": torch.__version__, "triton": library_version("triton"), "libraries": libraries}


def _first_fault(error: pydantic.ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))


def _driver_version() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found.group(1) if found else "unknown"


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()
