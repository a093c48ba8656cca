"""The documentation's pages: all of them in the navigation, links that lead somewhere, and what the code fills in."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_dispatch.machine import Machine
from moe_dispatch.problem import DTYPES
from moe_dispatch.registry import BACKENDS
from moe_dispatch.settings import VARIABLES
from moe_dispatch.workloads import Workload

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
HOOKS = runpy.run_path(str(DOCS / "site" / "hooks.py"))


def built(name: str, markdown: str | None = None) -> str:
    """A page's text as the site has it."""
    page = SimpleNamespace(file=SimpleNamespace(src_uri=name))
    text: str = HOOKS["on_page_markdown"](markdown or (DOCS / name).read_text(encoding="utf-8"), page=page)
    return text


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    assert sorted(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)) == PAGES


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", built(name)):
        assert (DOCS / name).parent.joinpath(target).exists(), target


def test_links_into_the_repository_become_paths_and_must_exist() -> None:
    assert built("faq.md", "[rows](../benchmarks/rows.py) [rows.py](../benchmarks/rows.py)") == (
        "rows (`benchmarks/rows.py`) `benchmarks/rows.py`"
    )
    with pytest.raises(FileNotFoundError, match=r"faq\.md links to \.\./absent\.py"):
        built("faq.md", "[x](../absent.py)")


def test_all_that_is_derived_from_weights_and_kept_is_listed() -> None:
    """A copy can go stale; every module that keeps one holds weak references, or has an attribute of these names."""
    text = (DOCS / "reliability.md").read_text(encoding="utf-8")
    rooms = ("backends", "moe_dispatch/dispatch", "moe_dispatch/integrations", "moe_dispatch/modules")
    sources = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    keeping = [
        path for path in sources if re.search(r"weakref\.|_kept\b.*= \{\}|_held = ", path.read_text(encoding="utf-8"))
    ]
    assert len(keeping) >= 4
    for path in keeping:
        assert f"`{path.relative_to(ROOT).as_posix().partition('/')[2]}`" in text, path


def test_commands_and_variables_are_those_of_the_code() -> None:
    commands = built("reference/commands.md")
    for text in ("`moe-dispatch calibration merge`", "`moe-dispatch doctor`", "`--machine`"):
        assert text in commands
    variables = built("reference/environment.md")
    assert all(f"`{name}`" in variables for name in VARIABLES)


DEVICES = {
    "CPU": Machine(device="cpu", name="described", sms=100, memory_bytes=80 << 30, torch="2.11.0", triton="3.6.0"),
    "A100 (sm_80)": Machine.load("a100-80gb"),
    "L40S (sm_89)": Machine.load("l40s"),
    "H100, H200 (sm_90)": Machine.load("h200"),
    "B200 (sm_100)": Machine.load("b200"),
}
# A decode layer that no backend refuses for its shape.
LAYER = Workload("aligned", E=8, topk=2, K=1024, N=512)


def support_matrix() -> list[str]:
    """The README's table, from what the backends declare."""
    lines = ["| | " + " | ".join(DEVICES) + " |", "|---|" + "---|" * len(DEVICES)]
    for name in BACKENDS.names():
        cells = []
        for machine in DEVICES.values():
            backend = BACKENDS.load(name)(machine)
            taken = [dtype for dtype in DTYPES if not backend.unsupported_reasons(LAYER.problem(8, dtype, machine))]
            cells.append(", ".join(taken) or "–")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return lines


def test_the_support_matrix_is_what_the_backends_declare() -> None:
    # In a process of its own: in Triton's interpreter, where this one may be, the kernels take a CPU too.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = "from tests.core.test_docs import support_matrix; print(*support_matrix(), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    table = done.stdout.strip()
    assert table in (ROOT / "README.md").read_text(encoding="utf-8"), f"README.md must hold this table:\n{table}"
