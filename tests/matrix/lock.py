"""Write requirements*.lock: every package that `make` installs for CI, with the hashes of its files.

    python -m tests.matrix.lock

They hold the wheels for Linux on x86_64 and for each Python that is announced. pyproject.toml and constraints.txt say
what is wanted, and uv resolves the rest. torch is in two files: requirements-cuda.lock has PyPI's builds with what they
need, and requirements-cpu.lock the CPU builds in the folder $PIP_FIND_LINKS.
"""

import hashlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.11", "3.12", "3.13")
COMMAND = (
    "pip", "compile", "--quiet", "--no-config", "--universal", "--python-version", PYTHONS[0], "--format",
    "pylock.toml", "--extra", "dev", "-c", "constraints.txt", "pyproject.toml",
)  # fmt: skip


def resolve() -> list[dict[str, Any]]:
    """The packages of a PEP 751 lock file."""
    uv = Path(sys.executable).with_name("uv")
    written = subprocess.run([uv, *COMMAND], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    packages: list[dict[str, Any]] = tomllib.loads(written)["packages"]
    return packages


def marker_of(package: dict[str, Any]) -> str | None:
    """The Pythons that need a package on Linux, as a marker; empty for all of them, None for none."""
    marker = Marker(package.get("marker", "python_version >= '3'"))
    linux = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    need = [
        python
        for python in PYTHONS
        if marker.evaluate({**linux, "python_version": python, "python_full_version": f"{python}.0", "extra": ""})
    ]
    if not need:
        return None
    return "" if len(need) == len(PYTHONS) else f" ; python_version in '{' '.join(need)}'"


def serves(wheel: str) -> bool:
    """Whether a wheel is for Linux with glibc on x86_64 and one of the Pythons."""
    for tag in parse_wheel_filename(wheel)[3]:
        if tag.platform != "any" and not ("manylinux" in tag.platform and tag.platform.endswith("x86_64")):
            continue
        if tag.abi == "abi3":
            fits = int(tag.interpreter.removeprefix("cp3") or 0) <= int(PYTHONS[-1][2:])
        else:
            exact = [f"cp{python.replace('.', '')}" for python in PYTHONS]
            fits = tag.interpreter == "py3" or tag.interpreter == tag.abi in exact
        if fits:
            return True
    return False


def hashes(package: dict[str, Any]) -> list[str]:
    """The SHA-256 of every file that serves, or of the sources where no wheel does."""
    files = {wheel["url"].rpartition("/")[2]: wheel["hashes"]["sha256"] for wheel in package.get("wheels", ())}
    sums = [digest for name, digest in files.items() if serves(name.replace("%2B", "+"))]
    return sums or [package["sdist"]["hashes"]["sha256"]]


def main() -> None:
    """Write the files; that of CPU builds only where some are at hand."""
    files: dict[str, list[str]] = {"requirements": [], "requirements-cpu": [], "requirements-cuda": []}
    for package in resolve():
        marker = marker_of(package)
        if marker is None:
            continue
        pin, of_torch = f"{package['name']}=={package['version']}", package["name"] == "torch"
        of_cuda = of_torch or package["name"].startswith(("nvidia-", "cuda-"))
        files["requirements-cuda" if of_cuda else "requirements"].append(_line(pin + marker, hashes(package)))
        wheels = Path(os.environ.get("PIP_FIND_LINKS", "/nowhere")).glob(f"torch-{package['version']}+cpu-*_x86_64.whl")
        if of_torch and (sums := [hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in sorted(wheels)]):
            files["requirements-cpu"].append(_line(f"{pin}+cpu", sums))
    for name, lines in files.items():
        if lines:
            text = "\n".join(("# Written by `python -m tests.matrix.lock`.", *lines, ""))
            (ROOT / f"{name}.lock").write_text(text, encoding="utf-8")


def _line(requirement: str, sums: list[str]) -> str:
    return " ".join((requirement, *(f"--hash=sha256:{digest}" for digest in sums)))


if __name__ == "__main__":
    main()
