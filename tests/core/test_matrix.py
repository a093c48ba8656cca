"""The matrix's files, the library's table of releases, the package's bounds and README agree."""

import tomllib
import types
from functools import partial
from pathlib import Path
from typing import cast

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from moe_dispatch.system.libraries import KNOWN_TO_WORK
from tests.conftest import thin_out
from tests.matrix import install
from tests.matrix.cells import CELLS, FOLDER, Outcome, keep, kind, outcomes, pins
from tests.matrix.table import BEGIN, END, README, ran_with_pins, with_table

ROOT = Path(__file__).parents[2]
FILES = sorted(set(CELLS.values()))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_file_of_pins_has_a_cell() -> None:
    beside = {"common", "vllm-imports"}  # what several cells install
    assert {path.stem for path in FOLDER.glob("*.txt")} - beside == set(FILES)


def test_every_recorded_outcome_is_of_a_cell() -> None:
    assert set(outcomes()) <= set(CELLS)


def test_readme_holds_the_table_of_today() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count(BEGIN) == 1
    assert text.count(END) == 1
    assert with_table(text) == text, "run `python -m tests.matrix.table`"


def bounds() -> dict[str, list[SpecifierSet]]:
    """What pyproject.toml allows of each library, in all places that name it."""
    requirements = [
        *PROJECT["dependencies"],
        *(text for extra in PROJECT["optional-dependencies"].values() for text in extra),
    ]
    allowed: dict[str, list[SpecifierSet]] = {}
    for requirement in map(Requirement, requirements):
        allowed.setdefault(requirement.name, []).append(requirement.specifier)
    return allowed


@pytest.mark.parametrize("file", FILES)
def test_pinned_versions_are_known_to_work_and_within_the_packages_bounds(file: str) -> None:
    pinned, allowed = pins(file), bounds()
    assert pinned["torch"]
    for library, version in pinned.items():
        if ranges := [releases for releases in KNOWN_TO_WORK if releases.library == library]:
            assert any(releases.covers(version) for releases in ranges), f"{library} {version}"
        for specifier in allowed.get(library, []):
            # An extra for one torch allows just that one.
            if library != "torch" or "==" not in str(specifier):
                assert specifier.contains(version), f"pyproject.toml has {library}{specifier}, {file}.txt {version}"


@pytest.mark.parametrize("library", ["torch", "triton", "vllm", "transformers"])
def test_both_ends_of_what_is_known_to_work_have_a_cell(library: str) -> None:
    run = {pins(file).get(library, "") for file in FILES}
    for releases in KNOWN_TO_WORK:
        if releases.library == library:
            for end in {releases.first, releases.last}:
                assert any(version == end or version.startswith(f"{end}.") for version in run), f"{library} {end}"


def test_every_python_that_is_announced_has_a_cell() -> None:
    announced = {text.rpartition(" ")[2] for text in PROJECT["classifiers"] if "Python :: 3." in text}
    assert {f"{file[6]}.{file[7:]}" for file in FILES if kind(file) == "python"} == announced


def test_the_locks_hold_the_pins_with_hashes() -> None:
    """After a change of constraints.txt or of the dependencies: python -m tests.matrix.lock."""
    locked: dict[str, set[str]] = {}
    for path in ROOT.glob("requirements*.lock"):
        for line in path.read_text(encoding="utf-8").splitlines()[1:]:
            requirement, *hashes = line.split(" --hash=sha256:")
            assert hashes
            assert all(len(digest) == 64 for digest in hashes), line
            name, _, version = requirement.partition(" ;")[0].partition("==")
            locked.setdefault(name, set()).add(version.partition("+")[0])
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, pinned, version = line.partition("==")
        assert not pinned or locked[name] == {version}, f"{name} {version}"
    for wanted in map(Requirement, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]):
        if wanted.name != PROJECT["name"]:
            assert locked[wanted.name], wanted
            assert all(map(wanted.specifier.contains, locked[wanted.name])), wanted


def test_a_file_with_another_hash_ends_the_install_and_a_missing_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an index that lacks torch's locked builds, and with one whose first file was replaced."""
    installed: list[str] = []
    monkeypatch.setattr(install, "LOCKED", True)

    def pip(*arguments: str, failing: str, failure: str) -> str:
        installed.append(arguments[-1])
        return failure if failing in arguments[-1] else ""

    monkeypatch.setattr(install, "pip", partial(pip, failing="-c", failure="No matching distribution"))
    install.main()
    assert installed == ["requirements.lock", "requirements-cpu.lock", "requirements-cuda.lock", ".[dev]"]
    monkeypatch.setattr(install, "pip", partial(pip, failing="requirements.lock", failure=install.MISMATCH))
    with pytest.raises(SystemExit, match=install.MISMATCH):
        install.main()
    assert installed[4:] == ["requirements.lock"]


def test_an_outcome_is_kept_and_counts_for_the_pins_that_it_ran_with(tmp_path: Path) -> None:
    path, versions = tmp_path / "record.json", pins("torch211")
    ran = Outcome(passed=True, seconds=7, cpu_seconds=5, date="2026-11-29", versions=versions | {"torch": "2.11.0+cpu"})
    other = Outcome(passed=True, seconds=7, cpu_seconds=5, date="2026-11-29", versions=versions | {"torch": "2.10.0"})
    keep("core-torch213", other, path)
    keep("core-torch211", other, path)
    keep("core-torch211", ran, path)
    assert outcomes(path) == {"core-torch211": ran, "core-torch213": other}
    assert ran_with_pins(ran, "torch211")
    assert not ran_with_pins(other, "torch211")


def test_a_thinned_run_keeps_a_share_of_each_long_list_and_all_of_a_short_one() -> None:
    short = [f"a.py::short[{case}]" for case in range(13)]
    names = [*(f"a.py::long[{case}]" for case in range(20)), *short, "a.py::plain"]
    items = cast("list[pytest.Item]", [types.SimpleNamespace(nodeid=name) for name in names])
    thin_out(items, 7)
    assert [item.nodeid for item in items] == [f"a.py::long[{case}]" for case in (0, 7, 14)] + [*short, "a.py::plain"]


def test_numpy_is_required() -> None:
    """Without it torch prints a warning of two lines before whatever a command prints."""
    assert "numpy" in {Requirement(text).name for text in PROJECT["dependencies"]}
