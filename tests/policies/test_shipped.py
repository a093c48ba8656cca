"""Tables that ship with the package, made here for a machine that is described and not present."""

from importlib import resources
from pathlib import Path

import pytest

from moe_dispatch.errors import MoEDispatchWarning
from moe_dispatch.machine import Machine
from moe_dispatch.policies.measurements.merge import merge
from moe_dispatch.policies.measurements.schema import CalibrationFile, Candidate, LayerShape, Measurement
from moe_dispatch.policies.shipped import ShippedPolicy
from moe_dispatch.workloads import WORKLOADS

H200 = Machine.load(Path(__file__).parents[1] / "machines" / "h200.json")
LAYER = WORKLOADS["deepseek-v3"]


def table(machine: Machine) -> CalibrationFile:
    """torch_grouped ahead of the reference at 64 tokens, measured with an old torch."""
    layer = LayerShape.of(LAYER.problem(1, "bf16", machine))
    times = {"torch_grouped": 100.0, "reference": 900.0}
    configs: dict[str, dict[str, int | bool | str]] = {"torch_grouped": {}, "reference": {"compute_fp32": False}}
    rows = [
        Measurement(
            layer,
            64,
            "graph",
            Candidate(backend=backend, config=configs[backend], versions={"torch": "0.1"}),
            us={"uniform": (us, us, us)},
            score=us,
        )
        for backend, us in times.items()
    ]
    return merge(CalibrationFile(machine=machine), rows, machine)


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the package's own tables are looked up."""
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    (tmp_path / "tables").mkdir()
    return tmp_path / "tables"


def ranked(policy: ShippedPolicy, machine: Machine) -> list[str]:
    return [choice.backend for choice in policy.rank(LAYER.problem(64, "bf16", machine, "graph"))]


def test_it_serves_a_machine_of_that_name(tables: Path) -> None:
    (tables / "nvidia_h200.json").write_text(table(H200).model_dump_json(), encoding="utf-8")
    policy = ShippedPolicy(H200)
    # Measured with another torch, which retires a calibration and not a table.
    assert ranked(policy, H200) == ["torch_grouped", "reference"]
    assert policy.notes() == ()


def test_where_no_table_ships_it_knows_nothing(tables: Path) -> None:
    policy = ShippedPolicy(H200)
    assert ranked(policy, H200) == []
    assert policy.notes() == ()


@pytest.mark.parametrize("change", [{"name": "NVIDIA-H200"}, {"sms": 66}, {"capability": (9, 1)}], ids=str)
def test_another_device_under_the_same_file_name_is_refused(tables: Path, change: dict[str, object]) -> None:
    (tables / "nvidia_h200.json").write_text(table(H200).model_dump_json(), encoding="utf-8")
    other = H200.model_copy(update=change)
    with pytest.warns(MoEDispatchWarning, match="was measured on 'NVIDIA H200'"):
        policy = ShippedPolicy(other)
    assert ranked(policy, other) == []
    assert "calibrate here" in policy.notes()[0]


@pytest.mark.parametrize("change", [{"torch": "9.9.9"}, {"driver": "999.1"}], ids=str)
def test_other_versions_are_noted_and_it_still_serves(tables: Path, change: dict[str, str]) -> None:
    (tables / "nvidia_h200.json").write_text(table(H200).model_dump_json(), encoding="utf-8")
    other = H200.model_copy(update=change)
    policy = ShippedPolicy(other)
    assert ranked(policy, other) == ["torch_grouped", "reference"]
    assert next(iter(change.values())) in policy.notes()[0]
    assert H200.torch in policy.notes()[0]


def test_a_damaged_table_is_refused(tables: Path) -> None:
    (tables / "nvidia_h200.json").write_text(table(H200).model_dump_json()[:-30], encoding="utf-8")
    with pytest.warns(MoEDispatchWarning, match="is damaged"):
        policy = ShippedPolicy(H200)
    assert ranked(policy, H200) == []
