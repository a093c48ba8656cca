"""The documentation's pages: all of them in the navigation, links that lead somewhere, and what the code fills in."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_dispatch.settings import VARIABLES

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
