"""The origin of a measurement: the versions and the commit that it was made with."""

import subprocess
from pathlib import Path

from moe_dispatch.machine import Machine
from moe_dispatch.settings import Settings
from moe_dispatch.system.libraries import library_version


def versions(machine: Machine) -> dict[str, str]:
    """Versions of everything that a time on this machine may depend on."""
    return {
        "moe_dispatch": library_version("moe_dispatch") or "unknown",
        "torch": machine.torch,
        "triton": machine.triton,
        "cuda": machine.cuda,
        "driver": machine.driver,
        "transformers": library_version("transformers"),
        **machine.libraries,
    }


def commit(folder: Path) -> str:
    """``MOE_DISPATCH_COMMIT``, else the checked-out commit of a folder, with ``-dirty`` where tracked files differ.

    The variable is for sources that were copied without their history. Empty where neither tells.
    """
    if named := Settings.from_environment().commit:
        return named

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD")
    if not head:
        return ""
    return f"{head}-dirty" if git("status", "--porcelain", "--untracked-files=no") else head
