"""What the repository records: packed calibrations and tables to ship."""

import dataclasses
from pathlib import Path

from moe_dispatch.benchmarks import row_files
from moe_dispatch.benchmarks.record import ship
from moe_dispatch.benchmarks.record.calibration_rows import calibration_rows
from moe_dispatch.policies.measurements.merge import merge
from moe_dispatch.policies.measurements.schema import CalibrationFile, Candidate, Measurement
from tests.benchmarks.helpers import H200, bench_row, calibration, run


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


def test_rows_of_another_machine_replace_none(tmp_path: Path) -> None:
    row, paths = bench_row("vllm", "qwen3-30b-a3b", "fp8", 64, 175.0), [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, machine in zip(paths, ("NVIDIA H200", "NVIDIA H20"), strict=True):
        row_files.append(path, row.model_copy(update={"machine": machine, "fingerprint": machine}))
    run("pack", *paths, "--out", tmp_path / "both.jsonl")
    assert {row.machine for row in row_files.load([tmp_path / "both.jsonl"])} == {"NVIDIA H200", "NVIDIA H20"}


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


def test_candidates_that_are_level_keep_their_order() -> None:
    scores = ((2, 1.0), (0, 1.0), (1, 2.0))
    stored = ship._by_candidate([{"candidate": index, "score": score} for index, score in scores])
    assert stored == [(2, 1.0), (1, 2.0), (0, 1.0)]
    assert tuple(sorted(stored, key=lambda pair: pair[1])) == scores


def test_a_later_calibration_of_some_backends_keeps_the_libraries_of_the_others() -> None:
    first, later = calibration((1, 4, 16, 64)), calibration((1,))
    first = first.model_copy(update={"machine": H200.model_copy(update={"libraries": {"vllm": "0.20.2", "a": "1"}})})
    later = later.model_copy(update={"machine": H200.model_copy(update={"libraries": {"a": "2"}})})
    assert ship.table([first, later]).machine.libraries == {"vllm": "0.20.2", "a": "2"}


def test_a_layer_measured_at_few_token_counts_is_not_shipped(tmp_path: Path) -> None:
    source, out = tmp_path / "calibration.json", tmp_path / "table.json"
    source.write_text(calibration((1, 4, 16)).model_dump_json(), encoding="utf-8")
    assert "no layer has a time at 4 token counts" in run("ship", source, "--out", out, status=2)
    assert not out.exists()


def test_a_point_that_was_measured_without_what_is_faster_at_more_tokens_is_not_shipped() -> None:
    file = calibration((1, 4, 16, 64, 256))
    layer = next(file.measurements()).layer
    grouped = Candidate(backend="torch_grouped", config={})

    def kept(*added: Measurement) -> list[int]:
        return [point.M for point in ship.table([merge(file, added, H200)]).points]

    faster = Measurement(layer, 64, "graph", grouped, us={"uniform": (1500.0,) * 3}, score=1500.0, error=1e-3)
    assert kept(faster) == [1, 4, 64, 256]  # 16 tokens took 1600 µs without it
    assert kept(dataclasses.replace(faster, score=1700.0)) == [1, 4, 16, 64, 256]
    wrong = dataclasses.replace(faster, M=16, score=None, error=None, disqualified="wrong on uniform routing")
    assert kept(faster, wrong) == [1, 4, 16, 64, 256]
