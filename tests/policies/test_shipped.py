"""Tables that ship with the package, made here for a machine that is described and not present."""

import sys
from importlib import resources
from pathlib import Path

import pytest

from moe_dispatch.dispatch.dispatcher import Dispatcher
from moe_dispatch.errors import MoEDispatchWarning
from moe_dispatch.machine import Machine
from moe_dispatch.policies.learned.policy import LearnedPolicy
from moe_dispatch.policies.measurements.merge import merge
from moe_dispatch.policies.measurements.schema import CalibrationFile, Candidate, LayerShape, Measurement
from moe_dispatch.policies.nearest import TABLE, nearest
from moe_dispatch.policies.shipped import ShippedPolicy
from moe_dispatch.system.compression import compressed
from moe_dispatch.workloads import WORKLOADS
from tests.support.simulated import H200

LAYER = WORKLOADS["deepseek-v3"]


def table(machine: Machine, M: int = 64) -> CalibrationFile:
    """torch_grouped ahead of the reference at one token count, measured with an old torch."""
    layer = LayerShape.of(LAYER.problem(1, "bf16", machine))
    times = {"torch_grouped": 100.0, "reference": 900.0}
    configs: dict[str, dict[str, int | bool | str]] = {"torch_grouped": {}, "reference": {"compute_fp32": False}}
    rows = []
    for backend, us in times.items():
        candidate = Candidate(backend=backend, config=configs[backend], versions={"torch": "0.1"})
        rows.append(Measurement(layer, M, "graph", candidate, us={"uniform": (us, us, us)}, score=us))
    return merge(CalibrationFile(machine=machine), rows, machine)


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the package's own tables are looked up."""
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    (tmp_path / "tables").mkdir()
    return tmp_path / "tables"


@pytest.fixture
def of_h200(tables: Path) -> Path:
    """The H200's table among them."""
    path = tables / "nvidia_h200.json.xz"
    path.write_bytes(compressed(table(H200).model_dump_json()))
    return path


def ranked(policy: ShippedPolicy, machine: Machine) -> list[str]:
    return [choice.backend for choice in policy.rank(LAYER.problem(64, "bf16", machine, "graph"))]


def test_it_serves_a_machine_of_that_name(of_h200: Path) -> None:
    policy = ShippedPolicy(H200)
    # Measured with another torch, which retires a calibration and not a table.
    assert ranked(policy, H200) == ["torch_grouped", "reference"]
    assert policy.notes() == ()


def test_where_no_table_ships_it_knows_nothing(tables: Path) -> None:
    policy = ShippedPolicy(H200)
    assert ranked(policy, H200) == []
    assert policy.notes() == ()


@pytest.mark.parametrize("change", [{"name": "NVIDIA-H200"}, {"sms": 66}, {"capability": (9, 1)}], ids=str)
def test_another_device_under_the_same_file_name_is_refused(of_h200: Path, change: dict[str, object]) -> None:
    other = H200.model_copy(update=change)
    with pytest.warns(MoEDispatchWarning, match="was measured on 'NVIDIA H200'"):
        policy = ShippedPolicy(other)
    assert ranked(policy, other) == []
    assert "calibrate here" in policy.notes()[0]


@pytest.mark.parametrize("change", [{"torch": "9.9.9"}, {"driver": "999.1"}, {"triton": "3.9.0"}], ids=str)
def test_other_versions_are_noted_and_it_still_serves(of_h200: Path, change: dict[str, str]) -> None:
    other = H200.model_copy(update=change)
    policy = ShippedPolicy(other)
    assert ranked(policy, other) == ["torch_grouped", "reference"]
    ((library, version),) = change.items()
    assert f"{library} {getattr(H200, library)} -> {version}" in policy.notes()[0]


@pytest.mark.parametrize(
    "content",
    [compressed(table(H200).model_dump_json()[:-30]), compressed(table(H200).model_dump_json())[:-30], b"{}"],
    ids=["cut off", "cut off after compression", "not compressed"],
)
def test_a_damaged_table_is_refused(of_h200: Path, content: bytes) -> None:
    of_h200.write_bytes(content)
    with pytest.warns(MoEDispatchWarning, match="is damaged"):
        policy = ShippedPolicy(H200)
    assert ranked(policy, H200) == []


def test_a_python_without_lzma_goes_without_the_table(of_h200: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lzma", None)
    with pytest.warns(MoEDispatchWarning, match="built without lzma"):
        policy = ShippedPolicy(H200)
    assert ranked(policy, H200) == []


H100 = H200.model_copy(update={"name": "NVIDIA H100 80GB HBM3"})


def test_a_device_without_a_table_uses_the_nearest_one_scaled_and_says_so(of_h200: Path) -> None:
    policy = ShippedPolicy(H100)
    assert ranked(policy, H100) == ["torch_grouped", "reference"]
    choice = policy.rank(LAYER.problem(64, "bf16", H100, "graph"))[0]
    # 64 tokens read weights: the layer takes as much longer as the memory is slower.
    assert choice.us == pytest.approx(100.0 * 4.8 / 3.35)
    assert choice.reason.startswith("about 143 µs here: 100.0 µs at M=64 (graph)")
    assert choice.reason.endswith("on NVIDIA H200")
    (note,) = policy.notes()
    assert "that of NVIDIA H200 serves it, scaled by 0.70 in bandwidth and 1.00 in matrix rate" in note


def test_a_device_without_a_data_sheet_is_scaled_by_its_multiprocessors(of_h200: Path) -> None:
    of_h200.write_bytes(compressed(table(H200, 16384).model_dump_json()))
    other = H200.model_copy(update={"name": "NVIDIA H3000", "sms": 99})
    policy = ShippedPolicy(other)
    assert "scaled by 1.00 in bandwidth and 0.75 in matrix rate (99 multiprocessors against 132" in policy.notes()[0]
    # 16384 tokens are bound by products.
    (choice, _) = policy.rank(LAYER.problem(16384, "bf16", other, "graph"))
    assert choice.us == pytest.approx(100.0 / 0.75)


@pytest.mark.parametrize("change", [{"sms": 16}, {"capability": (10, 0)}, {"capability": (8, 9)}], ids=str)
def test_a_slice_of_a_device_and_other_capabilities_are_left_to_the_rules(
    of_h200: Path, change: dict[str, object]
) -> None:
    other = H100.model_copy(update=change)
    policy = ShippedPolicy(other)
    assert (ranked(policy, other), policy.notes()) == ([], ())


@pytest.mark.parametrize(
    ("name", "sms", "source"),
    [("NVIDIA H200 NVL", 132, "NVIDIA H200"), ("NVIDIA H100 PCIe", 114, "NVIDIA H200"), ("unknown", 80, "NVIDIA H20")],
)
def test_the_nearest_of_several_tables_serves(tables: Path, name: str, sms: int, source: str) -> None:
    for slug in ("nvidia_h200", "nvidia_h20"):
        (tables / f"{slug}{TABLE}").write_text("{}", encoding="utf-8")
    serves = nearest(H200.model_copy(update={"name": name, "sms": sms}), TABLE)
    assert serves is not None
    assert serves.name == source


@pytest.mark.parametrize("machine", [H100, H200], ids=["scaled", "its own"])
def test_no_tokens_are_ranked_by_the_rules_without_a_complaint(machine: Machine) -> None:
    explained = Dispatcher(machine, live=False).planner.explain(LAYER.problem(0, "bf16", machine))
    assert {candidate.choice.policy for candidate in explained.candidates} == {"rules"}
    against = [reason for candidate in explained.candidates for reason in candidate.against]
    assert not [reason for reason in against if "raised" in reason]
    assert not [note for note in explained.notes if "passed over" in note]


@pytest.mark.parametrize(("M", "slower"), [(16, 4.8 / 3.35), (16384, 1.0)])
def test_the_learned_model_of_the_nearest_device_is_scaled_by_what_bounds_a_call(M: int, slower: float) -> None:
    policy = LearnedPolicy(H100)
    assert "no learned model ships for this device; that of NVIDIA H200 serves it" in policy.notes()[0]
    problem = WORKLOADS["deepseek-v3"].problem(M, "fp8", H100, "graph")
    here, there = (LearnedPolicy(machine).rank(problem)[0] for machine in (H100, H200))
    assert here.backend == there.backend
    assert here.us == pytest.approx(slower * (there.us or 0.0), rel=0.1)  # launches and the moving of rows aside
    assert here.reason.endswith("on NVIDIA H200, with this device's rates")


def test_a_device_whose_rates_differ_unlike_is_left_to_the_learned_model(tables: Path) -> None:
    """An H20 has nearly an H200's bandwidth and a seventh of its matrix rate."""
    for suffix in (TABLE, ".model.json"):
        (tables / f"nvidia_h200{suffix}").write_text("{}", encoding="utf-8")
    h20 = H200.model_copy(update={"name": "NVIDIA H20", "sms": 78})
    assert nearest(h20, TABLE) is None
    assert nearest(h20, ".model.json") is not None


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("M", [1, 64, 1024, 16384])
def test_what_a_backend_refuses_under_the_versions_at_hand_is_not_promised(M: int) -> None:
    newer = H200.model_copy(update={"triton": "4.7.0"})
    explained = Dispatcher(newer, live=False).planner.explain(LAYER.problem(M, "bf16", newer, "graph"))
    gluon = [candidate for candidate in explained.candidates if candidate.choice.backend == "gluon_hopper"]
    assert all("needs Triton" in reason for candidate in gluon for reason in candidate.against)
    assert all(candidate.against for candidate in gluon)
    assert explained.chosen is not None
    assert explained.chosen.choice.backend != "gluon_hopper"
    assert any("triton 3.6.0 -> 4.7.0" in note for note in explained.notes)
