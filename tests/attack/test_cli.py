"""Hostile command lines and variables: a result, or one line that says what is wrong; never a traceback."""

import itertools
import json
import os
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command
from typer.testing import CliRunner

from moe_dispatch.commands.app import app
from moe_dispatch.dispatch.process import reset_dispatchers
from moe_dispatch.machine import current_machine
from moe_dispatch.settings import VARIABLES, settings
from tests.attack.harness import FIGURES, assert_complete, attack, watched

AREA = "command line"
RUNNER = CliRunner()
USAGE_ERROR = 2

JUNK = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.sampled_from([
        "", " ", "-", "--", "-1", "0", "1e9", "nan", "inf", "-inf", "²", "1,", ",", "1,,2", "0x10", "1_000",
        "99999999999", "9" * 5000, "a" * 300, "a" * 70_000, "[bold]x[/bold]", "[/red]", "\x1b[31mred", "../..", "/",
        "/dev/zero", "/dev/null", "/proc/self/environ", "~", "$HOME", "%s%n", "'; rm -rf", "a\nb", "é", "日本",
        "\u202e", "None",
        "true", "no such/x.json",
    ]),
)  # fmt: skip
MODELS = st.sampled_from(["qwen3-30b-a3b", "deepseek-v3", "Qwen/Qwen3-30B-A3B", "8,2,64,32", "gpt-oss-120b"])
# Valid values of options; others get junk alone.
VALUES_OF: dict[str, st.SearchStrategy[str]] = {
    "--model": MODELS, "--dtype": st.sampled_from(["bf16", "FP8", "fp32"]),
    "--tokens": st.sampled_from(["1", "1,64", "16777216"]), "--mode": st.sampled_from(["eager", "graph"]),
    "--machine": st.sampled_from(["h200", "NVIDIA H200", "l40s", "mi300x"]),
    "--device": st.sampled_from(["cpu", "cuda", "cuda:7", "mps"]),
}  # fmt: skip
# Every option of every command, and whether it takes a value; --probe would run every backend.
OPTIONS: dict[str, dict[str, bool]] = {
    name: {
        param.opts[0]: not param.is_flag
        for param in command.params
        if param.param_type_name == "option" and param.opts[0] != "--probe"
    }
    for name, command in cast("Any", get_command(app)).commands.items()
    if name != "calibration"  # a group
}
# Options that make a command fail before it measures anything.
INVALID = {
    "calibrate": ["--device", "cuda:99"], "bench": ["--suite", "none"], "demo": ["--device", "cuda:99"],
}  # fmt: skip


@st.composite
def command_lines(draw: st.DrawFn, names: tuple[str, ...] = (*OPTIONS, "explain", "explain", "doctor")) -> list[str]:
    """A command with options of its own, some with junk for a value, and perhaps junk between them."""
    name = draw(st.sampled_from(names))
    line = [name]
    for option in draw(st.lists(st.sampled_from(sorted(OPTIONS[name])), max_size=4)):
        line.append(option)
        if OPTIONS[name][option]:
            line.append(draw(st.one_of(*[VALUES_OF.get(option, JUNK)] * 4, JUNK)))
    if draw(st.integers(0, 7)) == 0:
        line.insert(draw(st.integers(1, len(line))), draw(JUNK))
    return line + INVALID.get(name, [])


def run(arguments: list[str]) -> None:
    """Run a command line and judge what it prints and how it ends."""
    result = RUNNER.invoke(app, arguments)
    error = result.exception
    assert error is None or isinstance(error, SystemExit), f"{type(error).__name__}: {error}"
    assert result.exit_code in (0, 1, USAGE_ERROR), result.output
    assert "Traceback" not in result.output
    assert "\x1b[31mred" not in result.output, "an escape sequence reached the terminal"
    if result.exit_code == USAGE_ERROR:
        FIGURES.refused[AREA] = FIGURES.refused.get(AREA, 0) + 1
        message = result.stderr or result.output
        if message.startswith("error:"):  # the others are typer's, which repeat what was typed
            assert_complete(message)
    elif "--json" in arguments and "-h" not in arguments and "--help" not in arguments:
        data = json.loads(result.stdout)
        if arguments[0] == "explain":
            assert_explained(arguments, data)


def assert_explained(arguments: list[str], data: list[dict[str, object]]) -> None:
    """JSON answers for the token counts that were asked about, in their order, each with a backend or its reasons."""
    tokens = [value for option, value in itertools.pairwise(arguments) if option == "--tokens"]
    if tokens and tokens[-1].replace(",", "").isdecimal():
        counts = dict.fromkeys(int(count) for count in tokens[-1].split(","))
        assert [each["problem"]["M"] for each in data] == list(counts)  # type: ignore[index]
    for each in data:
        assert each["chosen"] or all(candidate["against"] for candidate in each["candidates"])  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a file of rows may be made


@attack(1600)
@given(arguments=command_lines())
def test_command_lines(arguments: list[str]) -> None:
    with watched(AREA):
        run(arguments)


@attack(300)
@given(
    arguments=st.lists(
        st.sampled_from([*OPTIONS, "-h", "--help", "-V", "--version", "--json", "--model"]) | JUNK, max_size=5
    )
)
def test_any_words(arguments: list[str]) -> None:
    measuring = [name for name in INVALID if name in arguments]
    with watched(AREA):
        run(arguments + INVALID[measuring[0]] if measuring else arguments)


# No folder at the top of the disk or at home: one that is named for the cache may be made.
VALUES = JUNK.filter(lambda text: "\0" not in text and not text.strip().startswith(("/", "~"))) | st.sampled_from(
    ["reference", "rules", "x,rules", "h200", "debug", "/proc/x", "/dev/null", "~no-user/x", "a/b"]
)


@attack(700)
@given(
    variables=st.dictionaries(
        st.sampled_from([*VARIABLES, "COLUMNS", "XDG_CACHE_HOME", "HOME"]),
        VALUES,
        max_size=3,
    ),
    arguments=command_lines(("explain", "doctor")),
)  # fmt: skip
def test_variables(variables: dict[str, str], arguments: list[str]) -> None:
    before = dict(os.environ)
    with watched(AREA):
        try:
            os.environ.update(variables)
            settings.cache_clear()
            reset_dispatchers()
            current_machine.cache_clear()
            run(arguments)
        finally:
            os.environ.clear()
            os.environ.update(before)
            settings.cache_clear()
            reset_dispatchers()
            current_machine.cache_clear()
