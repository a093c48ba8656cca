"""Libraries: which are installed, and which releases are known to work. Nothing here imports any of them."""

import functools
import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Final

from moe_dispatch.system.files import read_bytes
from moe_dispatch.system.version import distribution_version, distributions


@dataclass(frozen=True)
class Releases:
    """Consecutive releases of one library that are known to work.

    Attributes:
        library: The library, named as `library_version` takes it.
        first: First release of the range, ``"0.20.2"``.
        last: Last release of the range; ``"0.26"`` stands for all of 0.26. Newer releases are neither known to work
            nor known to fail.
        requirement: What pip installs to get the best release of the range, ``"vllm==0.26.0"``.
        torch: The torch that the releases are built for, ``"2.11"``; empty where they do not depend on it.
        exact_torch: Whether the wheels must not run under another torch: they may import, and then misread tensors.
        wheel: The PyPI distribution, where the library comes in several.
        held_by: The releases whose interface a test holds; the others lie between them.
    """

    library: str
    first: str
    last: str
    requirement: str
    torch: str = ""
    exact_torch: bool = False
    wheel: str = ""
    held_by: tuple[str, ...] = ()

    def covers(self, version: str) -> bool:
        """Whether a version, with or without its wheel's name, lies in the range."""
        number, _, wheel = version.partition(" ")
        release, last = _numbers(number), _numbers(self.last)
        return wheel.strip("()") == self.wheel and _numbers(self.first) <= release and release[: len(last)] <= last


# The one table from which hints, `moe-dispatch doctor` and the README's support matrix are made. Releases for the
# oldest torch come first.
KNOWN_TO_WORK: Final = (
    Releases("torch", "2.11", "2.15", "torch==2.15.*"),
    Releases("triton", "3.6", "3.6", "triton==3.6.*", torch="2.11"),
    Releases("triton", "3.7", "3.7", "triton==3.7.*", torch="2.13"),
    Releases("triton", "3.8", "3.8", "triton==3.8.*", torch="2.14"),
    Releases("triton", "3.9", "3.9", "triton==3.9.*", torch="2.15"),
    Releases("vllm", "0.20.2", "0.26", "vllm==0.26.0", torch="2.11", held_by=("0.20.2", "0.26.0")),
    Releases("vllm", "0.27", "0.32", "vllm==0.32.0", torch="2.13", held_by=("0.27.0", "0.32.0")),
    Releases("vllm", "0.33", "0.33", "vllm==0.33.0", torch="2.14", held_by=("0.33.0",)),
    Releases(
        "deep_gemm", "0.1.3", "0.1.3", "sgl-deep-gemm==0.1.3", torch="2.11", exact_torch=True, wheel="sgl-deep-gemm",
        held_by=("0.1.3",),
    ),
    Releases(
        "deep_gemm", "0.1.5.post2", "0.2.1", "sgl-deep-gemm==0.2.1", torch="2.13", exact_torch=True,
        wheel="sgl-deep-gemm", held_by=("0.2.1",),
    ),
    Releases(
        "deep_gemm", "0.2.2", "0.2.5", "sgl-deep-gemm==0.2.5", torch="2.14", exact_torch=True, wheel="sgl-deep-gemm",
        held_by=("0.2.5",),
    ),
    # The copies inside vLLM's wheels.
    Releases("deep_gemm", "2.5.0", "2.5.0", "vllm==0.26.0", torch="2.11", held_by=("2.5.0",)),
    Releases("deep_gemm", "2.8.1", "2.8.1", "vllm==0.33.0", torch="2.14", held_by=("2.8.1",)),
    Releases("transformers", "5.17", "5.24", "transformers>=5.17,<5.25"),
)  # fmt: skip


@dataclass(frozen=True)
class LibraryStatus:
    """A library on a machine, as `moe-dispatch doctor` shows it.

    Attributes:
        library: As in `Releases`.
        installed: Version here; empty where it is absent.
        known: The releases known to work with this torch, ``"0.20.2 to 0.26"``; where there are none, those for other
            torches, ``"0.33 (torch 2.14)"``.
        fault: Why the installed version is not among them; empty if it is, or if none is installed.
        remedy: The command that installs the best release for this torch; where none is known for it, the newest one
            together with the torch that it is built for.
    """

    library: str
    installed: str
    known: str
    fault: str
    remedy: str


def library_status(library: str, installed: str, torch_version: str) -> LibraryStatus:
    """Compare an installed version with the releases that are known to work.

    Args:
        library: As in `Releases`.
        installed: As `library_version` says it; empty where the library is absent.
        torch_version: ``"2.11.0+cu130"``.
    """
    torch = _minor(torch_version)
    fitting = _fitting(library, torch)
    known = " or ".join(_range(releases, with_torch=not fitting) for releases in fitting or _of(library)) or "none"
    # A torch for CUDA depends on one Triton, which pip finds if both are named; a torch for the CPU depends on none.
    alone = fitting and library != "triton"
    remedy = f"pip install '{fitting[0].requirement}'" if alone else _with_its_torch(fitting or _of(library))
    return LibraryStatus(library, installed, known, release_fault(library, installed, torch_version), remedy)


def library_statuses(libraries: Mapping[str, str], torch_version: str, triton_version: str) -> list[LibraryStatus]:
    """The status of every library in `KNOWN_TO_WORK`.

    Args:
        libraries: Versions by name, as in `Machine.libraries`. A library that is not among them counts as absent,
            except transformers, which is looked up.
        torch_version: ``"2.11.0+cu130"``.
        triton_version: ``"3.6.0"``; empty where it is absent.
    """
    versions = {"torch": torch_version, "triton": triton_version, "transformers": library_version("transformers")}
    versions |= libraries
    names = dict.fromkeys(releases.library for releases in KNOWN_TO_WORK)
    return [library_status(name, versions.get(name, ""), torch_version) for name in names]


def release_fault(library: str, installed: str, torch_version: str) -> str:
    """Why an installed version is not among those known to work with this torch; empty if it is or none is here."""
    if not installed:
        return ""
    torch = _minor(torch_version)
    ranges = [releases for releases in _of(library) if releases.covers(installed)]
    if any(releases.torch in ("", torch) for releases in ranges):
        return ""
    if ranges:
        return f"{library} {installed} is built for torch {ranges[0].torch}, and this is torch {torch}"
    return f"{library} {installed} is not among the releases that are known to work"


def unusable_wheel(library: str, installed: str, torch_version: str) -> str:
    """Why an installed wheel must not be loaded under this torch, and what to install; empty if nothing is known."""
    torch = _minor(torch_version)
    ranges = [releases for releases in _of(library) if releases.covers(installed)]
    if not ranges or any(not releases.exact_torch or releases.torch == torch for releases in ranges):
        return ""
    number, wheel = ranges[0].torch, ranges[0].wheel
    fault = f"{wheel} {installed.partition(' ')[0]} is built for torch {number}, and this is torch {torch}"
    if fitting := [releases for releases in _fitting(library, torch) if releases.wheel == wheel]:
        return f"{fault}; pip install '{fitting[0].requirement}'"
    return f"{fault}; no release for torch {torch} is known: use torch {number}"


def install_hint(library: str, wheel: str = "") -> str:
    """How to install a library, by torch: ``"pip install vllm==0.26.0 (torch 2.11) or vllm==0.32.0 (torch 2.13)"``."""
    choices = [f"{releases.requirement} (torch {releases.torch})" for releases in _of(library, wheel)]
    return f"pip install {' or '.join(choices)}"


def library_version(name: str) -> str:
    """The version of a library without importing it; empty where it is absent.

    `deep_gemm` may be a package of its own, from several wheels and then followed by the wheel's name, or vLLM's copy.
    What counts is the package that an import would find. Metadata are read once for each name and search path, since
    that takes a quarter of a millisecond and is asked for each kind of call.
    """
    return _read_version(name, tuple(sys.path))


@functools.lru_cache(maxsize=64)
def _read_version(name: str, _search_path: tuple[str, ...]) -> str:
    if name == "deep_gemm":
        package = deep_gemm_package()
        if package is None:
            return ""
        for wheel in ("sgl-deep-gemm", "deep-gemm"):
            if version := _installed_at(wheel, package):
                return f"{version} ({wheel})"
        return _declared_version(package)
    return distribution_version(name.replace("_", "-")) if _spec(name) else ""


def deep_gemm_package() -> Path | None:
    """The folder of DeepGEMM: top-level, or vLLM's copy; found without importing either."""
    for name, inside in (("deep_gemm", "."), ("vllm", "third_party/deep_gemm")):
        spec = _spec(name)
        for location in (spec.submodule_search_locations or ()) if spec else ():
            if os.path.isfile((package := Path(location, inside)) / "__init__.py"):
                return package
    return None


def _spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a module without a spec stands under this name in sys.modules
        return None


def _of(library: str, wheel: str | None = None) -> list[Releases]:
    return [
        releases for releases in KNOWN_TO_WORK if releases.library == library and wheel in (None, "", releases.wheel)
    ]


def _fitting(library: str, torch: str) -> list[Releases]:
    return [releases for releases in _of(library) if releases.torch in ("", torch)]


def _with_its_torch(choices: list[Releases]) -> str:
    newest = max(choices, key=lambda releases: _numbers(releases.torch))
    torch = f"torch=={newest.torch}.*"
    requirements = dict.fromkeys((newest.requirement, torch))
    return " ".join(("pip install", *(f"'{requirement}'" for requirement in requirements)))


def _range(releases: Releases, *, with_torch: bool) -> str:
    numbers = releases.first if releases.first == releases.last else f"{releases.first} to {releases.last}"
    torch = f"torch {releases.torch}" if with_torch and releases.torch else ""
    details = ", ".join(filter(None, (releases.wheel, torch)))
    return f"{numbers} ({details})" if details else numbers


def _minor(version: str) -> str:
    """``"2.11.0+cu130"`` to ``"2.11"``."""
    return ".".join(version.split(".")[:2])


def _numbers(version: str) -> tuple[int, ...]:
    """``"0.1.5.post2"`` to ``(0, 1, 5, 2)``."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0]))


def _installed_at(wheel: str, package: Path) -> str:
    """The version of a distribution if it is the one that installed this package; empty otherwise."""
    for distribution, version in distributions(wheel):
        if Path(str(distribution.locate_file(package.name))).resolve() == package.resolve():
            return version
    return ""


def _declared_version(package: Path) -> str:
    if declared := re.search(r"^__version__ = ['\"]([^'\"]+)", _text(package / "__init__.py"), re.MULTILINE):
        return declared.group(1)
    return _text(package / "VERSION").strip() or "unknown"


def _text(path: Path) -> str:
    try:
        return read_bytes(path).decode(errors="replace")
    except OSError:
        return ""
