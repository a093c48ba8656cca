"""What a wheel must hold, and what an import must not pull in."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKS = ("backends", "policies", "benchmarks")
# Development tools, which stay in the checkout.
RECORD = ROOT / "benchmarks" / "record"


def test_the_folders_at_the_top_are_linked_into_the_package() -> None:
    for name in LINKS:
        link = ROOT / "moe_dispatch" / name
        assert link.is_symlink(), f"{link} must be a relative link, not a copy"
        assert link.readlink() == Path("..") / name


def shipped() -> set[str]:
    """Every file of ours that a user runs, by the name that it has in a wheel."""
    files: set[str] = {"moe_dispatch/py.typed"}
    for top in ("moe_dispatch", "backends", "policies", "benchmarks"):
        for pattern in ("*.py", "machines.json", "tables/*"):
            for path in (ROOT / top).rglob(pattern):
                if RECORD not in path.parents:
                    name = path.relative_to(ROOT).as_posix()
                    files.add(name if top == "moe_dispatch" else f"moe_dispatch/{name}")
    return files


def test_nothing_tells_to_install_this_package_by_name() -> None:
    """It is on no registry: pip would find nothing there, or another package of its name."""
    for name in shipped():
        if name.endswith(".py"):
            assert not re.search(r"pip install [^\n]*moe-dispatch", (ROOT / name).read_text(encoding="utf-8")), name


@pytest.mark.slow
def test_wheel_and_sdist_hold_every_module(tmp_path: Path) -> None:
    # `build` makes the sdist, and the wheel out of that.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    held = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    assert shipped() - held == set()
    stray = ("backends/", "policies/", "benchmarks/", "tests/", "moe_dispatch/benchmarks/record/")
    assert not [name for name in held if name.startswith(stray)]
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        packed = {name.partition("/")[2] for name in sdist.getnames()}
    assert shipped() - packed == set()


def test_a_script_in_the_checkouts_root_finds_every_backend(tmp_path: Path) -> None:
    """The checkout in the working directory shadows an installed package; it must not lose its backends."""
    code = (
        "import importlib.util as u, moe_dispatch as m\n"
        "print(u.find_spec('moe_dispatch.backends.reference').origin, m.__file__)"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert all(Path(path).is_relative_to(ROOT) for path in seen.stdout.split())


def test_importing_loads_no_backend_and_no_compiler() -> None:
    heavy = ("vllm", "deep_gemm", "triton", "transformers", "matplotlib", "torch._dynamo", "moe_dispatch.backends")
    code = f"import sys, moe_dispatch; print([name for name in sys.modules if name.startswith({heavy})])"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert seen.stdout.strip() == "[]"
