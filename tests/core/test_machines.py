"""The machines that ship with the package: found by name, and explained for every model without an exception."""

import json
from pathlib import Path

import pytest

from moe_dispatch import explain
from moe_dispatch.dispatch.dispatcher import Dispatcher
from moe_dispatch.errors import InvalidInputError, UnknownNameError
from moe_dispatch.machine import SHIPPED, Machine, shipped_machines
from moe_dispatch.problem import DTYPES, Mode
from moe_dispatch.workloads import WORKLOADS

MODES: tuple[Mode, ...] = ("eager", "graph")
EXPECTED = (
    "a100-40gb", "a100-80gb", "b200", "gb10", "gh200", "h100-nvl", "h100-pcie", "h100-sxm", "h20", "h200", "h200-nvl",
    "l40s", "mi300x", "rtx-5090", "rtx-pro-6000",
)  # fmt: skip


def test_the_shipped_machines_are_these() -> None:
    assert shipped_machines() == EXPECTED


@pytest.mark.parametrize("name", EXPECTED)
def test_a_shipped_machine_is_found_by_its_short_name_and_by_torchs(name: str) -> None:
    machine = Machine.load(name)
    for spelling in (name.upper(), name.replace("-", " "), name.replace("-", "_"), machine.name):
        assert Machine.load(spelling) == machine
    source = json.loads(SHIPPED.read_bytes())["machines"][name]["source"]
    assert len(source) > 20, "every description says where its figures are from"


def test_no_two_shipped_machines_are_the_same_hardware() -> None:
    fingerprints = {Machine.load(name).fingerprint for name in EXPECTED}
    assert len(fingerprints) == len(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_explain_answers_for_every_model_dtype_and_mode(name: str) -> None:
    machine = Machine.load(name)
    planner = Dispatcher(machine, live=False).planner
    for layer in WORKLOADS.values():
        for dtype in DTYPES:
            for mode in MODES:
                for M in (1, 64, 4096):
                    explanation = planner.explain(layer.problem(M, dtype, machine, mode))
                    # The naive loop cannot be captured, so without a GPU backend nothing runs in a graph.
                    assert explanation.chosen or mode == "graph", str(explanation)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("h300", r"no machine is called 'h300' \(did you mean"),
        ("h100", r"did you mean h100-nvl or h100-pcie or h100-sxm\?"),
        ("NVIDIA B20", r"no machine is called 'NVIDIA B20'"),
        ("", "no machine is called ''"),
        ("x" * 5000, "no machine is called"),
    ],
)
def test_an_unknown_name_is_refused_with_suggestions(name: str, says: str) -> None:
    with pytest.raises(UnknownNameError, match=says) as caught:
        Machine.load(name)
    assert len(str(caught.value)) < 1000


def test_a_file_of_the_working_directory_does_not_replace_a_shipped_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h200").write_text(Machine.load("b200").model_dump_json())
    assert Machine.load("h200").name == "NVIDIA H200"
    assert Machine.load("./h200").name == Machine.load(Path("h200")).name == "NVIDIA B200"


@pytest.mark.parametrize(
    "content",
    ["[]", '{"device": "tpu"}', '{"device": "cuda", "name": "x"}', '{"machine": ' * 100_000,
     '{"device": "cuda", "name": "' + "x" * 100_000 + '"}'],
    ids=lambda content: f"{content[:30]}… of {len(content)}",
)  # fmt: skip
def test_what_describes_no_machine_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(content)
    with pytest.raises(InvalidInputError, match=r"not a machine description.*doctor --json") as caught:
        Machine.load(path)
    assert len(str(caught.value)) < 1000


def test_numbers_that_nothing_can_print_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    text = Machine.load("h200").model_dump_json()
    path.write_text(text.replace("150121545728", "1" + "0" * 400))
    with pytest.raises(InvalidInputError, match="memory_bytes"):
        Machine.load(path)


@pytest.mark.parametrize("M", [1 << 36, 1 << 60])
def test_explain_takes_no_longer_for_more_tokens(M: int) -> None:
    """The learned policy counts tiles by an integral, and not one by one."""
    for dtype in ("bf16", "fp8"):
        problem = WORKLOADS["deepseek-v3"].problem(M, dtype, Machine.load("h200"))
        assert explain(problem, machine=Machine.load("h200")).chosen is not None
