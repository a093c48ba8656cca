"""Install what tests need into the environment that runs this; needs nothing but Python and pip.

    .venv/bin/python tests/matrix/install.py

On Linux and x86_64, with the Pythons that requirements*.lock are for, pip checks every file against their hashes. torch
is a CPU build where pip finds that one (PyPI has none), else a CUDA build. Where an index lacks a locked file, and on
other systems, the versions of constraints.txt are installed without hashes. A file that has another hash ends it.
"""

import platform
import subprocess
import sys

LOCKED = (platform.system(), platform.machine()) == ("Linux", "x86_64") and sys.version_info < (3, 14)
MISMATCH = "DO NOT MATCH THE HASHES"


def pip(*arguments: str) -> str:
    """Run pip install; empty if it succeeded, else what it printed to stderr, which is never empty."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    done = subprocess.run([*command, *arguments], stderr=subprocess.PIPE, text=True, check=False)
    return (done.stderr or f"pip ended with {done.returncode}") if done.returncode else ""


def locked(name: str) -> str:
    """Install one of the locked files; as `pip`.

    Raises:
        SystemExit: A file has another hash than the locked one.
    """
    failure = pip("--require-hashes", "--no-deps", "-r", name)
    if MISMATCH in failure:
        sys.exit(failure)
    return failure


def main() -> None:
    """Install the dependencies, and this package as a link to the checkout."""
    failure = "not locked for this system"
    if LOCKED:
        failure = locked("requirements.lock") or (locked("requirements-cpu.lock") and locked("requirements-cuda.lock"))
        if failure:
            print(f"{failure}\nThis index lacks locked files: installing by constraints.txt, without hashes.")
    by_lock = ("--no-deps", "--no-build-isolation", "-e", ".")
    if failure := pip(*(("-c", "constraints.txt", "-e", ".[dev]") if failure else by_lock)):
        sys.exit(failure)


if __name__ == "__main__":
    main()
