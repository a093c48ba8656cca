"""What is made of rows: the scoreboard, plots, and the suites that measure for them."""

import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from moe_dispatch.benchmarks.baselines import BASELINES
from moe_dispatch.benchmarks.reports import plots
from moe_dispatch.benchmarks.reports.regret import by_routing
from moe_dispatch.benchmarks.reports.scoreboard import METRICS, SIDES, Scores, scoreboard
from moe_dispatch.benchmarks.reports.speedups import speedup_chart
from moe_dispatch.benchmarks.rows import BenchRow
from moe_dispatch.benchmarks.suites import MODELS, SKEWED, SUITES, TOKENS
from moe_dispatch.benchmarks.targets import SCOREBOARD
from moe_dispatch.errors import InvalidInputError, MoEDispatchError
from moe_dispatch.registry import BACKENDS
from moe_dispatch.workloads import ROUTINGS, WORKLOADS
from tests.benchmarks.helpers import bench_row, full_board


def test_the_scoreboard_passes_only_on_complete_evidence() -> None:
    rows = full_board(fraction=1.05, vllm=1.4)
    assert {result.verdict for result in scoreboard(rows)} == {"pass"}
    without_a_point = [row for row in rows if not (row.workload == "mixtral-8x7b" and row.M == 256)]
    verdicts = {result.target.what: result.verdict for result in scoreboard(without_a_point)}
    assert verdicts["bf16 middle: fraction of the roofline, geometric mean"] == "open"
    assert verdicts["bf16 decode: fraction of the roofline, geometric mean"] == "pass"
    assert verdicts["fp8: fastest backend against the fastest baseline, worst point"] == "open"
    assert {result.verdict for result in scoreboard([])} == {"open"}


def test_the_scoreboard_fails_what_misses_a_target() -> None:
    results = {result.target.what: result for result in scoreboard(full_board(fraction=0.85, vllm=0.9, skew=1.3))}
    assert results["bf16 decode: fraction of the roofline, geometric mean"].verdict == "FAIL"
    assert results["bf16 decode: fraction of the roofline, geometric mean"].value == pytest.approx(0.85)
    assert results["fp8 prefill: fraction of the roofline, geometric mean"].verdict == "pass"
    assert results["fp8: fastest backend against the fastest baseline, worst point"].value == pytest.approx(0.9)
    assert results["fp8: fastest backend against the fastest baseline, worst point"].verdict == "FAIL"
    assert results["fp8: time at dirichlet-4 over uniform, M ≥ 1024, worst point"].verdict == "FAIL"


def test_regret_by_routing_is_that_of_the_choice_for_the_two_that_a_calibration_measures() -> None:
    times = {
        "gluon_hopper": {"uniform": 100.0, "dirichlet-4": 110.0, "zipf": 126.0},
        "triton_persistent": {"uniform": 102.0, "dirichlet-4": 112.0, "zipf": 120.0},
        "triton_splitk": {"uniform": 90.0},  # left the halving early
    }
    rows = [
        bench_row(backend, "deepseek-v3", "bf16", 256, us, routing=routing)
        for backend, by_name in times.items()
        for routing, us in by_name.items()
    ]
    judged = by_routing([*rows, bench_row("gluon_hopper", "deepseek-v3", "bf16", 64, 9.0, routing="zipf")])
    assert {name: [choice.regret for choice in choices] for name, choices in judged.items()} == {
        "dirichlet-4": [0.0], "uniform": [0.0], "zipf": [pytest.approx(0.05)],
    }  # fmt: skip


def test_rows_of_two_machines_have_no_scoreboard() -> None:
    row = bench_row("vllm", "deepseek-v3", "bf16", 1, 200.0)
    with pytest.raises(InvalidInputError, match="one machine, got NVIDIA H20, NVIDIA H200"):
        scoreboard([row, row.model_copy(update={"machine": "NVIDIA H20"})])


def test_every_target_names_a_metric_and_sides_that_exist() -> None:
    for target in SCOREBOARD:
        assert target.metric in METRICS
        assert {target.ours, target.theirs} <= set(SIDES)
    assert len({target.what for target in SCOREBOARD}) == len(SCOREBOARD)


@pytest.mark.parametrize("name", sorted(SUITES))
def test_a_suite_names_what_exists(name: str) -> None:
    suite = SUITES[name]
    assert set(suite.models) <= set(WORKLOADS)
    assert set(suite.backends) <= set(BACKENDS.names())
    assert set(suite.baselines) <= set(BASELINES)
    assert {routing for step in suite.steps for routing in step.routings} <= set(ROUTINGS)


def test_the_scoreboard_suite_has_evidence_for_every_target_early() -> None:
    workloads = [WORKLOADS[name] for name in MODELS]
    plans = list(SUITES["scoreboard"].plans(workloads, ["bf16"], {}, {}))
    assert [plan.tokens for plan in plans[:3]] == [(1,), (16384,), (64,)]
    points = {(M, r.name, mode) for plan in plans for M in plan.tokens for r in plan.routings for mode in plan.modes}
    graphs = {(M, "uniform", "graph") for M in TOKENS}
    skewed = {(M, SKEWED, "graph") for M in TOKENS if M >= 1024}
    assert points == graphs | skewed | {(1, "uniform", "eager")}


def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    board = [row for row in full_board(fraction=0.9, vllm=1.2) if (row.workload, row.dtype) == (MODELS[0], "fp8")]
    (layer,) = plots.draw(board, tmp_path)
    assert layer.name == f"{MODELS[0]}-fp8.png"
    assert layer.read_bytes()[1:4] == b"PNG"
    with pytest.raises(InvalidInputError, match="none of the 0 rows has a time"):
        plots.draw([], tmp_path / "none")


def test_pictures_and_the_chart_are_drawn_of_one_reading_of_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    read: list[object] = []
    init = Scores.__init__

    def counted(self: Scores, rows: Iterable[BenchRow]) -> None:
        read.append(rows)
        init(self, rows)

    monkeypatch.setattr(Scores, "__init__", counted)
    monkeypatch.setattr(plots, "_draw_layer", lambda *arguments: b"")
    files = plots.draw(full_board(fraction=0.9, vllm=1.2), tmp_path)
    assert files[-1].read_text(encoding="utf-8") == speedup_chart(Scores(full_board(fraction=0.9, vllm=1.2)))
    assert len(read) == 2, "one of them is the test's own"


def test_rows_without_a_roofline_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    row = bench_row("vllm", "deepseek-v3", "bf16", 1, 200.0)
    assert len(plots.draw([row.model_copy(update={"roofline_us": None, "fraction": None})], tmp_path)) == 1


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MoEDispatchError, match="pip install matplotlib"):
        plots.draw(full_board(0.9, 1.2)[:4], tmp_path)
