"""What a wheel must hold, and what an import must not pull in."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKS = ("backends", "policies", "benchmarks")
# What ships in the wheel is what users run; these are development tools and stay in the checkout.


def test_the_folders_at_the_top_are_linked_into_the_package() -> None:
    for name in LINKS:
        link = ROOT / "moe_dispatch" / name
        assert link.is_symlink(), f"{link} must be a relative link, not a copy"
        assert link.readlink() == Path("..") / name


@pytest.mark.slow
def test_the_wheel_holds_every_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    held = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for top in ("moe_dispatch", "backends", "policies", "benchmarks"):
        for module in (ROOT / top).rglob("*.py"):
            path = module.relative_to(ROOT).as_posix()
            assert (path if top == "moe_dispatch" else f"moe_dispatch/{path}") in held
    assert "moe_dispatch/py.typed" in held
    assert not [name for name in held if name.startswith(("backends/", "policies/", "benchmarks/", "tests/"))]


def test_importing_loads_no_backend_and_no_compiler() -> None:
    heavy = ["vllm", "deep_gemm", "triton", "transformers", "matplotlib", "torch._dynamo"]
    code = f"import sys, moe_dispatch; print([name for name in {heavy} if name in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert seen.stdout.strip() == "[]"
    code = "import sys, moe_dispatch; print([m for m in sys.modules if m.startswith('moe_dispatch.backends')])"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert seen.stdout.strip() == "[]"


def test_nothing_is_imported_under_two_names() -> None:
    wrong = re.compile(r"^\s*(?:from|import) (?:backends|policies|benchmarks)\b", re.MULTILINE)
    for top in ("moe_dispatch", "backends", "policies", "benchmarks", "tests"):
        for module in (ROOT / top).rglob("*.py"):
            assert not wrong.search(module.read_text()), module
