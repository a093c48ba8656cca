"""What the repository records: packed calibrations, tables to ship, the agreement of calibrations."""

from pathlib import Path

import pytest

from moe_dispatch.benchmarks import row_files
from moe_dispatch.benchmarks.record import agreement, ship
from moe_dispatch.benchmarks.record.calibration_rows import calibration_rows
from moe_dispatch.policies.measurements.merge import merge
from moe_dispatch.policies.measurements.schema import CalibrationFile, Candidate, LayerShape, Measurement
from moe_dispatch.workloads import WORKLOADS
from tests.benchmarks.helpers import H200, calibration, run


def test_a_calibration_becomes_rows(tmp_path: Path) -> None:
    source, out = tmp_path / "calibration.json", tmp_path / "sweep.jsonl"
    source.write_text(calibration().model_dump_json(), encoding="utf-8")
    run("pack", source, "--out", out)
    read = row_files.load([out])
    timed = {(row.M, row.config["block_m"], row.routing): row.us for row in read if row.us}
    assert timed == {
        (M, block, routing): us * M
        for M in (1, 64)
        for block, us, routing in ((64, 100.0, "uniform"), (64, 100.0, "dirichlet-4"), (128, 300.0, "uniform"))
    }
    assert {row.workload for row in read} == {"deepseek-v3"}
    assert {row.reason for row in read if not row.us} == {"wrong on uniform routing"}
    assert {row.roofline_from for row in read} == {"device"}


def test_a_later_calibration_replaces_its_backends_rows_at_its_points(tmp_path: Path) -> None:
    paths = [tmp_path / "rows.jsonl", tmp_path / "later.json"]
    paths[1].write_text(calibration((1, 64)).model_dump_json(), encoding="utf-8")
    run("pack", paths[1], "--out", paths[0])
    later = calibration((64,))
    later.candidates[0] = later.candidates[0].model_copy(update={"config": {"block_m": 32}})
    paths[1].write_text(later.model_dump_json(), encoding="utf-8")
    run("pack", *paths, "--out", tmp_path / "both.jsonl.xz")
    before, after = row_files.load(paths[:1]), row_files.load([tmp_path / "both.jsonl.xz"])
    assert {row.key for row in after if row.M == 1} == {row.key for row in before if row.M == 1}
    assert {row.key for row in after if row.M == 64} == {row.key for row in calibration_rows(later)}


def test_a_calibration_of_a_device_without_known_ceilings_has_no_fractions() -> None:
    h20 = H200.model_copy(update={"name": "NVIDIA H20"})
    rows = list(calibration_rows(calibration().model_copy(update={"machine": h20})))
    assert rows
    assert {(row.roofline_us, row.roofline_from, row.fraction) for row in rows} == {(None, None, None)}


def test_a_shipped_table_keeps_what_may_be_chosen(tmp_path: Path) -> None:
    made = ship.table([calibration((1, 4, 16, 64))])
    assert [(c.backend, c.config) for c in made.candidates] == [("triton_persistent", {"block_m": 64})]
    assert [point.measurements[0].score for point in made.points] == [100.0, 400.0, 1600.0, 6400.0]
    source, out = tmp_path / "calibration.json", tmp_path / "table.json"
    source.write_text(calibration((1, 4, 16, 64)).model_dump_json(), encoding="utf-8")
    run("ship", source, "--out", out)
    assert CalibrationFile.model_validate_json(out.read_text()) == made


def test_a_later_calibration_of_some_backends_keeps_the_libraries_of_the_others() -> None:
    first, later = calibration((1, 4, 16, 64)), calibration((1,))
    first = first.model_copy(update={"machine": H200.model_copy(update={"libraries": {"vllm": "0.20.2", "a": "1"}})})
    later = later.model_copy(update={"machine": H200.model_copy(update={"libraries": {"a": "2"}})})
    assert ship.table([first, later]).machine.libraries == {"vllm": "0.20.2", "a": "2"}


def test_a_layer_measured_at_few_token_counts_is_not_shipped() -> None:
    assert ship.table([calibration((1, 4, 16))]).points == []


def with_scores(scores: dict[int, dict[str, float]]) -> CalibrationFile:
    layer = LayerShape.of(WORKLOADS["deepseek-v3"].problem(1, "fp8", H200))
    measurements = [
        Measurement(layer, M, "graph", Candidate(backend=backend), score=us)
        for M, times in scores.items()
        for backend, us in times.items()
    ]
    return merge(CalibrationFile(machine=H200), measurements, H200)


def test_agreement_is_judged_by_the_later_measurements() -> None:
    first = with_scores({4: {"a": 10.0, "b": 12.0}, 64: {"a": 100.0, "b": 90.0}})
    again = with_scores({4: {"a": 10.1, "b": 12.0}, 64: {"a": 98.0, "b": 100.0}})
    between = with_scores({16: {"a": 33.0, "b": 30.0}})
    points = [point for later in (again, between) for point in agreement.compare(first, later)]
    summary = agreement.summary(points)
    assert summary["calibrated"]["points"] == 2
    assert summary["calibrated"]["agree"] == 0.5
    assert summary["calibrated"]["worst"] == summary["calibrated"]["apart"] == pytest.approx(100 / 98 - 1)
    results = agreement.results(points, seconds=151.0)
    verdicts = {result.target.what: (result.verdict, result.missing) for result in results}
    assert verdicts == {
        "seconds of the calibration": ("FAIL", 0),
        "share of points with the same winner": ("FAIL", 0),
        "how far apart the winners are where they differ": ("pass", 0),
        "loss at calibrated token counts, worst point": ("FAIL", 0),
        "loss between them, mean": ("FAIL", 0),
        "loss between them, worst point": ("FAIL", 0),
        "time over the rules' choice less 1, worst point": ("open", 0),
    }
    # At 16, half way, a is expected at 31.6 and b at 32.9: a is chosen, and was 10 % slower.
    assert summary["between"]["mean"] == pytest.approx(0.1)


def test_a_choice_that_was_not_timed_leaves_its_targets_open() -> None:
    first = with_scores({4: {"a": 10.0}, 64: {"a": 90.0}})
    points = list(agreement.compare(first, with_scores({4: {"a": 10.1}, 16: {"b": 30.0}})))
    results = {result.target.what: result for result in agreement.results(points)}
    assert results["share of points with the same winner"].verdict == "pass"
    assert results["loss between them, mean"].missing == 1
    assert results["loss between them, worst point"].verdict == "open"


def test_between_leaves_out_what_the_first_measured() -> None:
    first = with_scores({4: {"a": 10.0}, 64: {"a": 90.0}})
    later = with_scores({4: {"a": 10.1}, 16: {"a": 30.0}})
    assert [point.calibrated for point in agreement.compare(first, later)] == [True, False]
    assert [point.calibrated for point in agreement.compare(first, later, between=True)] == [False]


def test_a_point_that_was_not_measured_again_is_no_evidence() -> None:
    first = with_scores({4: {"a": 10.0}, 64: {"a": 90.0}})
    points = list(agreement.compare(first, with_scores({4: {"a": 10.0}, 64: {"a": 91.0}})))
    assert [point.where.split()[-2] for point in points] == ["M=64"]
    (share,) = [result for result in agreement.results(points, expected=2) if result.target is agreement.AGREEMENT]
    assert (share.value, share.missing, share.verdict) == (1.0, 1, "open")
