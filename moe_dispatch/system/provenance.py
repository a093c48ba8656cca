"""Where a measurement comes from: the versions and the commit that it was made with."""

import os
import subprocess
from pathlib import Path

from moe_dispatch.machine import Machine
from moe_dispatch.system.libraries import library_version


def versions(machine: Machine) -> dict[str, str]:
    """Of everything that a time on this machine depends on."""
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
    """What ``MOE_DISPATCH_COMMIT`` says, else the checked-out commit, with ``-dirty`` where files differ from it.

    Files that travelled may have no history with them, or an older one. Empty where nothing tells.
    """
    if told := os.environ.get("MOE_DISPATCH_COMMIT"):
        return told

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD")
    if not head:
        return ""
    return f"{head}-dirty" if git("status", "--porcelain", "--untracked-files=no") else head
