"""The supported versions, each in an environment of its own: `make matrix`, or `make matrix CELLS=core-torch211`.

A cell's versions are pinned in tests/matrix/. Its outcome and duration go to tests/matrix/record.json, from which
`python -m tests.matrix.table` writes the table in README.md.

Environments are made by uv, which links files from its cache: a second environment with the same torch costs neither
time nor disk. Cells run one after another, with WORKERS processes each (2).
"""

import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nox

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))
from tests.matrix.cells import CELLS, Outcome, keep, kind  # noqa: E402

PINS = ROOT / "tests" / "matrix"
WORKERS = os.environ.get("WORKERS", "2")
nox.options.default_venv_backend = "uv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True
nox.options.stop_on_first_error = False

# What depends on torch: dispatch, torch.compile, autocast, refused input.
DISPATCH_TESTS = (
    "tests/core/test_core.py",
    "tests/core/test_dispatcher.py",
    "tests/core/test_bad_input.py",
    "tests/core/test_autocast.py",
)
# Versions that are written into the record.
RECORDED = ("torch", "triton", "transformers", "vllm", "numpy")


def _prepare_environment() -> None:
    """Let uv be found, and find what pip and pyenv are set up for; keep the user's settings of the library out."""
    for name in [name for name in os.environ if name.startswith("MOE_DISPATCH_")]:
        del os.environ[name]
    # uv lies beside nox, which need not be on PATH.
    os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    # uv reads none of pip's settings: wheels in a local folder are CPU builds of torch where a machine has them.
    if links := os.environ.get("PIP_FIND_LINKS"):
        os.environ.setdefault("UV_FIND_LINKS", links)
    os.environ.setdefault("UV_PYTHON_DOWNLOADS", "never")
    os.environ.setdefault("UV_HTTP_TIMEOUT", "300")
    os.environ.setdefault("UV_LINK_MODE", "hardlink")
    # pyenv's `python3.13` answers only where a version of it is selected.
    if "PYENV_VERSION" not in os.environ and (pyenv := shutil.which("pyenv")):
        listed = subprocess.run([pyenv, "versions", "--bare"], capture_output=True, text=True, check=True).stdout  # noqa: S603
        os.environ["PYENV_VERSION"] = ":".join(reversed(re.findall(r"^3\.1[1-9]\.\d+$", listed, re.MULTILINE)))


_prepare_environment()

# Runs a cell and returns the versions that it ran with.
Body = Callable[[nox.Session, str], dict[str, str]]


def cell(name: str, body: Body, pins: str) -> None:
    """Make a session of this name, which keeps its outcome in the record."""

    def run(session: nox.Session) -> None:
        begun, used, passed, versions = time.monotonic(), _cpu_seconds(), False, dict[str, str]()
        try:
            versions = body(session, pins)
            passed = True
        finally:
            # With arguments of the user's own it is another cell.
            if not session.posargs:
                seconds, cpu_seconds = round(time.monotonic() - begun), round(_cpu_seconds() - used)
                keep(name, Outcome(passed, seconds, time.strftime("%Y-%m-%d"), versions, cpu_seconds))

    run.__doc__ = body.__doc__
    nox.session(name=name)(run)


def _cpu_seconds() -> float:
    """Processor time of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _versions(session: nox.Session, python: str = "python") -> dict[str, str]:
    """The versions in an environment; by default the session's own."""
    code = (
        "import importlib.metadata as m, platform; print('python', platform.python_version())\n"
        f"for name in {RECORDED}:\n"
        "  try: print(name, m.version(name))\n"
        "  except m.PackageNotFoundError: pass"
    )
    printed = session.run(python, "-c", code, silent=True, external=True)
    return dict(line.split() for line in str(printed).splitlines())


def _install(session: nox.Session, pins: str, *further: str) -> None:
    session.install("-r", str(PINS / f"{pins}.txt"), "-r", str(PINS / "common.txt"), *further)
    session.install("--no-deps", "-e", ".")


def _pytest(session: nox.Session, *arguments: str) -> None:
    workers = () if WORKERS == "0" else ("-n", WORKERS, "--dist", "worksteal")
    session.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, *arguments, *session.posargs)


def core(session: nox.Session, pins: str) -> dict[str, str]:
    """Dispatch and kernels on one torch and its Triton.

    Every case of the dispatch, every thirteenth of a long list of kernels' cases in Triton's interpreter, and one
    default of each backend compiled for each device class.
    """
    _install(session, pins)
    _pytest(session, "-m", "not timing and not matrix", *DISPATCH_TESTS)
    _pytest(session, "-m", "not timing and not matrix", "--every", "13", "tests/backends")
    return _versions(session)


def defaults(session: nox.Session, pins: str) -> dict[str, str]:
    """Compile every default, and what `explain` promises for the machines that ship, with one Triton.

    With the pinned Triton for every device class, with the newest for those that differ most, with the others for that
    of the shipped table.
    """
    _install(session, pins)
    devices = {"torch213": "", "torch215": "sm_90 or sm_100"}.get(pins, "sm_90")
    _pytest(session, "-m", "matrix", "-k", devices, "tests/backends")
    return _versions(session)


def integration_transformers(session: nox.Session, pins: str) -> dict[str, str]:
    """Run the transformers integration against one release."""
    _install(session, pins)
    _pytest(session, *(str(path) for path in sorted((ROOT / "tests").rglob("test_transformers*.py"))))
    return _versions(session)


def integration_vllm(session: nox.Session, pins: str) -> dict[str, str]:
    """Run the plugin against one vLLM's own classes, without a GPU and so without most of what vLLM depends on."""
    wanted = (PINS / f"{pins}.txt").read_text(encoding="utf-8").split()
    vllm = next(word for word in wanted if word.startswith("vllm=="))
    beside = [word for word in wanted if "==" in word and word != vllm]
    session.install(*beside, "-r", str(PINS / "vllm-imports.txt"), "-r", str(PINS / "common.txt"))
    session.install("--no-deps", vllm, "-e", ".")
    _pytest(session, *(str(path) for path in sorted((ROOT / "tests/integrations").glob("test_vllm*.py"))))
    return _versions(session)


def packaging(session: nox.Session, pins: str) -> dict[str, str]:
    """Build the wheel, install it in a new environment outside the repository, and do there what README begins with."""
    session.install("build", "setuptools>=77")
    python = f"python3.{pins.removeprefix('python3')}"
    with tempfile.TemporaryDirectory() as folder:
        session.run("python", "-m", "build", "--no-isolation", "--outdir", folder, ".", silent=True)
        wheel = next(Path(folder).glob("*.whl"))
        session.run("uv", "venv", "--quiet", "--python", python, f"{folder}/venv", external=True)
        into = f"{folder}/venv/bin/python"
        pinned = ("-c", str(PINS / f"{pins}.txt"), str(wheel))
        session.run("uv", "pip", "install", "--quiet", "--python", into, *pinned, external=True)
        example = str(PINS / "first_steps.py")
        session.run(into, example, str(ROOT / "README.md"), external=True, env={"PYTHONPATH": None})
        return _versions(session, into)


BODIES = {
    "core": core,
    "defaults": defaults,
    "transformers": integration_transformers,
    "vllm": integration_vllm,
    "packaging": packaging,
}
for name, pins in CELLS.items():
    cell(name, BODIES[kind(name)], pins)
