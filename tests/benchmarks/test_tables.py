"""The tables and the picture that the documentation shows of recorded rows."""

from pathlib import Path

from moe_dispatch.benchmarks import row_files
from moe_dispatch.benchmarks.reports.scoreboard import Scores
from moe_dispatch.benchmarks.reports.speedups import speedup_chart
from moe_dispatch.benchmarks.reports.tables import tables
from moe_dispatch.benchmarks.rows import BenchRow
from moe_dispatch.benchmarks.suites import MODELS, TOKENS
from tests.benchmarks.helpers import RESULTS, ROOT, bench_row, full_board, run

TIMES = "Time in µs and fraction of the roofline, {}"
MEANS = "Geometric means of the fractions"


def cells(table: str, name: str) -> list[list[str]]:
    """The cells of the lines that begin with a name."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [line[1:] for line in lines if line[0] == name]


def other_baselines(factor: float) -> list[BenchRow]:
    """The baselines that `full_board` lacks, slower by a factor than the vLLM of `full_board(0.5, 1.2)`."""
    names = {"bf16": "vllm_triton_kernels", "fp8": "vllm_deep_gemm"}
    return [
        row.model_copy(update={"backend": names[row.dtype], "us": row.us * factor, "fraction": row.fraction / factor})
        for row in full_board(0.5, 1.2)
        if row.backend == "vllm" and row.us and row.fraction
    ]


def test_a_cell_is_the_fastest_of_its_side_with_its_fraction() -> None:
    (ours, *_) = cells(tables(full_board(0.5, 1.2))[TIMES.format("bf16")], "mixtral-8x7b")
    rooflines = [bench_row("vllm", "mixtral-8x7b", "bf16", M, 1.0).roofline_us or 0.0 for M in TOKENS]
    assert ours == [f"s {2 * us:.0f} (.50)" for us in rooflines]
    complete = tables([*full_board(0.5, 1.2), *other_baselines(0.5)])
    for dtype, letter in (("bf16", "T"), ("fp8", "D")):
        baselines = cells(complete[TIMES.format(dtype)], "– best baseline")
        assert len(baselines) == len(MODELS)
        assert all(cell.startswith(f"{letter} ") and cell.endswith(" (.83)") for line in baselines for cell in line)


def test_small_times_have_a_decimal_and_unknown_names_are_written_out() -> None:
    rows = [bench_row("triton_vector", "qwen3-30b-a3b", "fp8", M, us) for M, us in ((1, 12.94), (4, 99.96), (16, 1e5))]
    fractions = [
        row.model_copy(update={"fraction": fraction}) for row, fraction in zip(rows, (0.699, 1.0, 0.004), strict=True)
    ]
    own = bench_row("their_backend", "qwen3-30b-a3b", "fp8", 64, 150.4).model_copy(update={"fraction": None})
    ((*shown, absent),) = [line[:5] for line in cells(tables([*fractions, own])[TIMES.format("fp8")], "qwen3-30b-a3b")]
    assert shown == ["v 12.9 (.70)", "v 100 (1.00)", "v 100000 (.00)", "their_backend 150"]
    assert absent == "–"


def test_an_asterisk_marks_what_rests_on_fewer_baselines() -> None:
    rows = [*full_board(0.5, 1.2), *other_baselines(2.0)]
    assert "*" not in "".join(text.replace("**", "") for text in tables(rows).values())
    missing = ("deepseek-v3", "fp8", 64, "vllm_deep_gemm")
    fewer = [row for row in rows if (row.workload, row.dtype, row.M, row.backend) != missing]
    made = tables(fewer)
    marked = [cell for line in cells(made[TIMES.format("fp8")], "– best baseline") for cell in line if "*" in cell]
    roofline_us = bench_row("vllm", "deepseek-v3", "fp8", 64, 1.0).roofline_us or 0.0
    assert marked == [f"F {1.2 / 0.5 * roofline_us:.0f}* (.42)"]
    assert "*" not in made[TIMES.format("bf16")]
    assert cells(made[MEANS], "– best baseline") == [[".417"] * 3, [".417*", ".417", ".417"]]


def test_means_and_grids_are_of_the_sweep_where_it_is_given() -> None:
    assert not [title for title in tables(full_board(0.5, 1.2)) if "sweep" in title]
    made = tables(full_board(0.5, 1.2), [row for row in full_board(0.8, 1.2) if row.dtype == "bf16"])
    assert cells(made[MEANS], "BF16") == [[".500"] * 3]
    assert cells(made[MEANS], "– sweep") == [[".800"] * 3, ["–"] * 3]
    assert cells(made["The fastest in the sweep, bf16"], "deepseek-v3") == [["s .80"] * len(TOKENS)]
    assert "The fastest in the sweep, fp8" not in made


def test_the_command_prints_every_table_below_its_title(path: Path) -> None:
    rows = full_board(0.5, 1.2)
    path.write_text("".join(f"{row.model_dump_json()}\n" for row in rows), encoding="utf-8")
    expected = "\n\n".join(f"## {title}\n\n{table}" for title, table in tables(rows, rows).items())
    assert run("tables", path, "--sweep", path) == f"{expected}\n"


def test_the_documents_hold_what_is_printed_of_the_recorded_rows() -> None:
    made = tables(*(row_files.load([RESULTS / f"{name}.jsonl.xz"]) for name in ("bench", "sweep")))
    in_readme = {"deepseek-v3, fp8: µs by candidate"}
    assert in_readme < made.keys()
    for name, titles in (("docs/performance.md", made.keys() - in_readme), ("README.md", in_readme)):
        text = " ".join((ROOT / name).read_text(encoding="utf-8").split())
        for title in titles:
            assert " ".join(made[title].split()) in text, f"{name} must hold this ({title}):\n{made[title]}"


def test_readmes_picture_is_drawn_of_the_recorded_rows() -> None:
    drawn = speedup_chart(Scores(row_files.load([RESULTS / "bench.jsonl.xz"])))
    assert (ROOT / "docs/images/speedups.svg").read_text(encoding="utf-8") == drawn


def test_the_chart_holds_the_means_over_vllm_and_is_left_out_without_one_of_its_times() -> None:
    rows = full_board(0.5, 1.2)
    chart = speedup_chart(Scores(rows))
    assert chart is not None
    assert chart.count(">1.20×<") == 12
    assert speedup_chart(Scores(row for row in rows if not (row.backend == "vllm" and row.M == 64))) is None
    assert speedup_chart(Scores([])) is None
