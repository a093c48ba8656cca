"""Which hazards count as the tool's own, on logs in racecheck's words."""

from pathlib import Path

import pytest

from moe_dispatch.benchmarks.racecheck_kinds import kinds, main

SOURCE = """@gluon.jit
def _moe_some_kernel(out_ptr):
    gl.warp_specialize([(_take, (slot,)), (_give, (slot,))], [1], [40])
    slot.index(0).store(number)
    number = gl.max(slot.index(0).load(ONE), 0)
    buf.store(values)
"""
SUMMARY = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
HANDED_OVER = [("Write", 4), ("Read", 5)]
SPECIALISED = [("Read", 2), ("Write", 3)]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    for folder in ("backends", "benchmarks"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"of_{folder}.py").write_text(SOURCE)
    return tmp_path


def log(path: Path, file: str, *hazards: list[tuple[str, int]]) -> Path:
    lines = ["========= COMPUTE-SANITIZER"]
    for (access, line), *others in hazards:
        lines.append(f"========= Error: Race reported between {access} access at _k+0x2b0 in {file}:{line}")
        lines += [f"=========     and {also} access at _k+0x780 in {file}:{at} [60 hazards]" for also, at in others]
    path.write_text("\n".join(lines) + f"\n{SUMMARY}")
    return path


def verdict(sources: Path, ours: list[list[tuple[str, int]]], control: list[list[tuple[str, int]]]) -> int:
    first = log(sources / "ours.log", "of_backends.py", *ours)
    second = log(sources / "control.log", "of_benchmarks.py", *control)
    code: int = main([str(first), str(second), "--sources", str(sources)])
    return code


def test_what_the_control_shows_too_is_the_tools(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both_ways = [HANDED_OVER, HANDED_OVER[::-1], SPECIALISED]
    assert verdict(sources, both_ways, [SPECIALISED, HANDED_OVER]) == 0
    assert "the tool: 2 × read of a slot that mbarriers guard and write of" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more", [HANDED_OVER, [("Write", 4), ("Write", 4)], [("Write", 6), ("Read", 5)], [("Write", 99), ("Read", 5)]]
)
def test_whatever_else_is_ours(sources: Path, more: list[tuple[str, int]]) -> None:
    if more[0][1] == 99:
        (sources / "backends" / "of_backends.py").write_text(SOURCE + "\n" * 99)
    assert verdict(sources, [SPECIALISED, more], [SPECIALISED]) == 1


def test_nothing_reported_is_fine(sources: Path) -> None:
    assert verdict(sources, [], []) == 0


def test_of_several_writes_each_is_looked_at(sources: Path) -> None:
    ours = log(sources / "ours.log", "of_backends.py", [*HANDED_OVER, ("Write", 6)])
    assert len(set(kinds(ours.read_text(), sources))) == 2


def test_a_log_that_was_cut_is_refused(sources: Path) -> None:
    with pytest.raises(ValueError, match="did not reach its end"):
        list(kinds("========= COMPUTE-SANITIZER\n", sources))
