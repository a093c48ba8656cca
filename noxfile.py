"""The versions that are supported, each in an environment of its own: `make matrix`, or `nox -s core-torch211`.

The pins of a cell are in tests/matrix/<cell>.txt. README's table is made from the same files by tests/matrix/table.py.
"""

from pathlib import Path

import nox

PINS = Path("tests/matrix")
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.stop_on_first_error = False

# Everything that depends on torch and Triton: kernels interpreted and compiled without a GPU, dispatch, torch.compile.
TORCH_TESTS = (
    "tests/backends",
    "tests/core/test_dispatcher.py",
    "tests/core/test_bad_input.py",
    "tests/core/test_core.py",
)


def _install(session: nox.Session, cell: str) -> None:
    session.install("-r", str(PINS / f"{cell}.txt"), "-c", str(PINS / "common.txt"))
    session.install("--no-deps", "-e", ".")


@nox.session
@nox.parametrize("torch", ["211", "213", "214", "215"], ids=["torch211", "torch213", "torch214", "torch215"])
def core(session: nox.Session, torch: str) -> None:
    """Dispatch and kernels on one torch and its Triton: interpreted, and compiled for sm_80 to sm_121."""
    _install(session, f"torch{torch}")
    session.run(
        "python",
        "-m",
        "pytest",
        "-n",
        "2",
        "--dist",
        "worksteal",
        "-q",
        "-m",
        "not timing",
        *TORCH_TESTS,
        *session.posargs,
    )


@nox.session
@nox.parametrize("release", ["517", "524"], ids=["transformers517", "transformers524"])
def transformers(session: nox.Session, release: str) -> None:
    """The transformers integration against one release."""
    _install(session, f"transformers{release}")
    tests = sorted(map(str, Path("tests/integrations").glob("test_transformers*.py")))
    session.run("python", "-m", "pytest", "-n", "2", "-q", *tests, *session.posargs)


@nox.session
@nox.parametrize("release", ["0.20.2", "0.26.0", "0.33.0"])
def vllm(session: nox.Session, release: str) -> None:
    """The plugin against one vLLM's own classes, without a GPU and so without most of what vLLM depends on."""
    _install(session, "torch211")
    session.install("-r", str(PINS / "vllm.txt"))
    session.install("--no-deps", f"vllm=={release}")
    session.run("python", "-m", "pytest", "-q", "tests/integrations/test_vllm.py", *session.posargs)


@nox.session
def packaging(session: nox.Session) -> None:
    """The wheel, installed outside the repository with what pip resolves by itself, and README's first commands."""
    session.install("build")
    dist = Path(session.create_tmp()).resolve()
    session.run("python", "-m", "build", "--outdir", str(dist), ".")
    session.install("-c", str((PINS / "torch213.txt").resolve()), str(next(dist.glob("*.whl"))))
    session.chdir(dist)
    session.run("moe-dispatch", "doctor")
    session.run("moe-dispatch", "explain", "--machine", "h200", "--model", "deepseek-v3", "--dtype", "fp8")
