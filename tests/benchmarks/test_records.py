"""What is made of measurements for the repository: packed rows, tables to ship."""

import json
from pathlib import Path

import pytest

from moe_dispatch.benchmarks import packed, rows, ship
from moe_dispatch.benchmarks.reports import agreement
from moe_dispatch.benchmarks.rows import BenchRow
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.machine import Machine
from moe_dispatch.measure import H200_CEILINGS
from moe_dispatch.policies.measurements.merge import merge
from moe_dispatch.policies.measurements.schema import CalibrationFile, Candidate, LayerShape, Measurement
from moe_dispatch.problem import DType
from moe_dispatch.workloads import WORKLOADS

H200 = Machine.load(Path(__file__).parents[1] / "machines" / "h200.json")


def bench_row(backend: str, dtype: DType, M: int, us: float | None, **config: int) -> BenchRow:
    problem = WORKLOADS["qwen3-30b-a3b"].problem(M, dtype, H200)
    floor = H200_CEILINGS.roofline_us(problem)
    assert floor is not None
    return BenchRow(
        workload="qwen3-30b-a3b", E=problem.E, topk=problem.topk, K=problem.K, N=problem.N, dtype=dtype, M=M,
        backend=backend, config=dict(config), mode="graph", routing="uniform", us=us, us_q1=us, us_q3=us,
        samples=7 if us else 0, inputs=8, hit_experts=problem.expected_experts, roofline_us=floor,
        roofline_from="device",
        fraction=floor / us if us else None, error=4e-3, reason="" if us else "wrong result: by far",
        machine=H200.name, fingerprint=H200.fingerprint, versions={"torch": "2.11"}, commit="c0ffee",
        ceilings=H200_CEILINGS,
    )  # fmt: skip


def calibration(tokens: tuple[int, ...] = (1, 64)) -> CalibrationFile:
    """Three candidates at each token count: the winner, one far behind, and one that is wrong."""
    layer = LayerShape.of(WORKLOADS["deepseek-v3"].problem(1, "fp8", H200))
    found = []
    for M in tokens:
        for block, us in ((64, 100.0 * M), (128, 300.0 * M)):
            times = {"uniform": (us - 1, us, us + 1)} | ({"dirichlet-4": (us, us, us)} if block == 64 else {})
            candidate = Candidate(backend="triton_persistent", config={"block_m": block}, commit="c0ffee")
            found.append(Measurement(layer, M, "graph", candidate, us=times, score=us, error=1e-3))
        padded = Candidate(backend="deep_gemm", config={"layout": "psum"})
        times = {"uniform": (1.0, 1.0, 1.0)}
        found.append(Measurement(layer, M, "graph", padded, us=times, disqualified="wrong on uniform routing"))
    return merge(CalibrationFile(machine=H200), found, H200)


def test_packed_rows_are_the_rows(tmp_path: Path) -> None:
    written = [
        bench_row("triton_splitk", "bf16", 1, 31.9, block_n=64),
        bench_row("triton_splitk", "bf16", 1, None, block_n=128),
        bench_row("triton_splitk", "bf16", 64, 306.625, block_n=64),
        bench_row("vllm", "fp8", 64, 175.0),
    ]
    path = tmp_path / "packed.jsonl"
    path.write_text("\n".join(packed.pack(written)) + "\n", encoding="utf-8")
    assert len(path.read_text().splitlines()) == 1 + 3 + 3  # run, configurations, points
    read = rows.load([path])
    by_key = {row.key: row for row in read}
    assert set(by_key) == {row.key for row in written}
    for row in written:
        assert by_key[row.key].us == pytest.approx(row.us, rel=1e-4) if row.us else by_key[row.key].us is None
        assert by_key[row.key].model_dump(
            exclude={"us", "us_q1", "us_q3", "fraction", "roofline_us"}
        ) == row.model_dump(exclude={"us", "us_q1", "us_q3", "fraction", "roofline_us"})


def test_a_damaged_packed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "packed.jsonl"
    lines = list(packed.pack([bench_row("vllm", "fp8", 64, 175.0)]))
    for damage in (lines[-1][:-9], json.dumps({"point": {}, "rows": [[3]]}), lines[-1].replace('"M":64', '"M":0')):
        path.write_text("\n".join([*lines[:-1], damage]), encoding="utf-8")
        with pytest.raises(InvalidInputError, match="is damaged"):
            rows.load([path])


def test_a_calibration_becomes_rows(tmp_path: Path) -> None:
    source, out = tmp_path / "calibration.json", tmp_path / "sweep.jsonl"
    source.write_text(calibration().model_dump_json(), encoding="utf-8")
    packed.main([str(source), "--out", str(out)])
    read = rows.load([out])
    timed = {(row.M, row.config["block_m"], row.routing): row.us for row in read if row.us}
    assert timed == {
        (M, block, routing): us * M
        for M in (1, 64)
        for block, us, routing in ((64, 100.0, "uniform"), (64, 100.0, "dirichlet-4"), (128, 300.0, "uniform"))
    }
    assert {row.workload for row in read} == {"deepseek-v3"}
    assert {row.reason for row in read if not row.us} == {"wrong on uniform routing"}


def test_a_shipped_table_keeps_what_may_be_chosen(tmp_path: Path) -> None:
    made = ship.table([calibration((1, 4, 16, 64))])
    assert [(c.backend, c.config) for c in made.candidates] == [("triton_persistent", {"block_m": 64})]
    assert [point.measurements[0].score for point in made.points] == [100.0, 400.0, 1600.0, 6400.0]
    source, out = tmp_path / "calibration.json", tmp_path / "table.json"
    source.write_text(calibration((1, 4, 16, 64)).model_dump_json(), encoding="utf-8")
    ship.main([str(source), "--out", str(out)])
    assert CalibrationFile.model_validate_json(out.read_text()) == made


def test_a_layer_measured_at_few_token_counts_is_not_shipped() -> None:
    assert ship.table([calibration((1, 4, 16))]).points == []


def with_scores(scores: dict[int, dict[str, float]]) -> CalibrationFile:
    layer = LayerShape.of(WORKLOADS["deepseek-v3"].problem(1, "fp8", H200))
    found = [
        Measurement(layer, M, "graph", Candidate(backend=backend), score=us)
        for M, at in scores.items()
        for backend, us in at.items()
    ]
    return merge(CalibrationFile(machine=H200), found, H200)


def test_agreement_is_judged_by_the_later_measurements() -> None:
    first = with_scores({4: {"a": 10.0, "b": 12.0}, 64: {"a": 100.0, "b": 90.0}})
    again = with_scores({4: {"a": 10.1, "b": 12.0}, 64: {"a": 98.0, "b": 100.0}})
    between = with_scores({16: {"a": 33.0, "b": 30.0}})
    points = [point for later in (again, between) for point in agreement.compare(first, later)]
    found = agreement.summary(points)
    assert found["calibrated"]["points"] == 2
    assert found["calibrated"]["agree"] == 0.5
    assert found["calibrated"]["worst"] == found["calibrated"]["apart"] == pytest.approx(100 / 98 - 1)
    verdicts = {bar.what: (bar.verdict, bar.missing) for bar in agreement.bars(points, seconds=151.0)}
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
    assert found["between"]["mean"] == pytest.approx(0.1)


def test_a_choice_that_was_not_timed_leaves_its_bars_open() -> None:
    first = with_scores({4: {"a": 10.0}, 64: {"a": 90.0}})
    points = list(agreement.compare(first, with_scores({4: {"a": 10.1}, 16: {"b": 30.0}})))
    found = {bar.what: bar for bar in agreement.bars(points)}
    assert found["share of points with the same winner"].verdict == "pass"
    assert found["loss between them, mean"].missing == 1
    assert found["loss between them, worst point"].verdict == "open"


def test_between_leaves_out_what_the_first_measured() -> None:
    first = with_scores({4: {"a": 10.0}, 64: {"a": 90.0}})
    later = with_scores({4: {"a": 10.1}, 16: {"a": 30.0}})
    assert [point.calibrated for point in agreement.compare(first, later)] == [True, False]
    assert [point.calibrated for point in agreement.compare(first, later, between=True)] == [False]


def test_a_point_that_was_not_measured_again_is_no_evidence() -> None:
    first = with_scores({4: {"a": 10.0}, 64: {"a": 90.0}})
    points = list(agreement.compare(first, with_scores({4: {"a": 10.0}, 64: {"a": 91.0}})))
    assert [point.where.split()[-2] for point in points] == ["M=64"]
    share = next(bar for bar in agreement.bars(points, expected=2) if bar.what.startswith("share"))
    assert (share.value, share.missing, share.verdict) == (1.0, 1, "open")
