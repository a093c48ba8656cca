"""`moe-dispatch bench` and ``python -m moe_dispatch.benchmarks``, on a CPU."""

import json
import math
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moe_dispatch.benchmarks import row_files
from moe_dispatch.benchmarks.__main__ import app
from moe_dispatch.benchmarks.rows import BenchRow
from moe_dispatch.commands.app import app as main_app
from moe_dispatch.machine import current_machine
from tests.benchmarks.helpers import LAYER, RESULTS, ROOT, bench_row, calibration, full_board, reference, run

SMALL = ("--model", "4,2,64,32", "--dtype", "fp32", "--mode", "eager", "--seconds", "0")


def test_the_entry_point_lists_its_commands() -> None:
    command = [sys.executable, "-m", "moe_dispatch.benchmarks", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    for name in ("run", "score", "regret", "plot", "tables", "pack", "ship"):
        assert name in done.stdout


def test_run_and_bench_are_one_command() -> None:
    (run_command,) = [command.callback for command in app.registered_commands if command.name == "run"]
    assert run_command in [command.callback for command in main_app.registered_commands]


def test_rows_are_written_validate_and_are_shown(path: Path) -> None:
    output = run("run", *SMALL, "--tokens", "1,4", "--backend", "reference", "--backend", "naive_loop", "--out", path)
    rows = [BenchRow.model_validate_json(line) for line in path.read_text().splitlines()]
    assert {(row.M, row.backend) for row in rows} == {(M, name) for M in (1, 4) for name in ("reference", "naive_loop")}
    for row in rows:
        assert row.us is not None
        assert row.us_q1 is not None
        assert row.us_q3 is not None
        assert 0 < row.us_q1 <= row.us <= row.us_q3
        assert row.error == pytest.approx(0, abs=1e-5)
        assert row.inputs == 8
        assert row.roofline_us is not None
        assert row.fraction == pytest.approx(row.roofline_us / row.us)
        assert row.machine == current_machine("cpu").name
        assert row.roofline_from == "measured"
        assert {"torch", "triton", "moe_dispatch"} <= set(row.versions)
        assert (row.workload, row.dtype, row.mode, row.routing) == ("4,2,64,32", "fp32", "eager", "uniform")
    assert "naive_loop" in output
    assert "4,2,64,32 fp32 M=4 eager" in output  # progress, one line a point where there is no terminal


def test_energy_without_a_counter_is_a_note_and_an_empty_column(path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU has a counter")
    output = run("run", *SMALL, "--tokens", "1", "--backend", "reference", "--energy", "1", "--out", path)
    assert "energy is measured on NVIDIA GPUs only" in output
    assert [row.joules_per_token for row in row_files.load([path])] == [None]


def test_resume_skips_rows_and_an_old_file_is_not_overwritten(path: Path) -> None:
    call = ("run", *SMALL, "--backend", "reference", "--out", path)
    run(*call, "--tokens", "1")
    assert "exists already; --resume" in run(*call, "--tokens", "1", status=2)
    run(*call, "--tokens", "1,2", "--resume")
    rows = [BenchRow.model_validate_json(line) for line in path.read_text().splitlines()]
    assert [row.M for row in rows] == [1, 2]
    others = [row.model_copy(update={"fingerprint": "of another machine"}) for row in rows]
    path.write_text("".join(f"{row.model_dump_json()}\n" for row in others))
    run(*call, "--tokens", "1", "--resume")
    assert [row.M for row in row_files.load([path])] == [1, 2, 1]


def test_the_budget_stops_before_the_next_point(path: Path) -> None:
    output = run("run", *SMALL, "--tokens", "1,2,3", "--backend", "reference", "--budget", "0", "--out", path)
    assert not path.exists()
    assert "the budget is spent" in output


def test_json_prints_the_rows(path: Path) -> None:
    model = path.with_name("config.json")
    config = {"num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 64, "moe_intermediate_size": 32}
    model.write_text(json.dumps(config | {"_name_or_path": "modèle"}))
    options = [*SMALL, "--model", str(model), "--tokens", "1", "--backend", "reference", "--out", str(path), "--json"]
    output = CliRunner(charset="ascii").invoke(app, ["run", *options], catch_exceptions=False).stdout
    assert {BenchRow.model_validate_json(line).workload for line in output.splitlines()} == {"4,2,64,32", "modèle"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "no-such-model"), "no model is called"),
        (("--tokens", "1,x"), "--tokens must be positive numbers"),
        (("--tokens", "0"), "--tokens must be positive numbers"),
        (("--dtype", "int4"), "--dtype must be one of"),
        (("--backend", "cutlass"), "no backend or baseline is called"),
        (("--config", "some"), "--config must be"),
        (("--mode", "warp"), "--mode must be"),
        (("--routing", "skewed"), "no routing distribution is called"),
        (("--resume", "--out", "/proc"), "rows cannot be written to /proc ([Errno 22] it is not a regular file"),
        (("--out", "/proc/nowhere/rows.jsonl"), "rows cannot be written to /proc/nowhere/rows.jsonl"),
        (("--suite", "scoreboard"), "--mode cannot be combined with --suite scoreboard"),
    ],
)
def test_bad_options_say_what_is_allowed(arguments: tuple[str, ...], message: str, path: Path) -> None:
    assert message in run("run", *SMALL, "--out", path, *arguments, status=2)


def test_an_unknown_suite_is_named() -> None:
    assert "no suite is called 'speed'; known: scoreboard" in run("run", "--suite", "speed", status=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU captures graphs")
def test_graphs_need_a_gpu(path: Path) -> None:
    assert "needs a CUDA device" in run("run", *SMALL, "--mode", "both", "--out", path, status=2)
    assert "need a CUDA device" in run("run", "--suite", "scoreboard", "--out", path, status=2)


def test_the_chosen_configuration_is_what_the_calibration_found(path: Path) -> None:
    from moe_dispatch.policies.calibrated import calibration_path
    from moe_dispatch.policies.measurements.merge import save
    from moe_dispatch.policies.measurements.schema import Candidate, LayerShape, Measurement
    from moe_dispatch.policies.measurements.versions import relevant_versions

    machine = current_machine("cpu")
    config: dict[str, int | bool | str] = {"compute_fp32": True, "quantize_activations": False}  # not the default
    candidate = Candidate(backend="reference", config=config, versions=relevant_versions(reference()))
    layer = LayerShape.of(LAYER.problem(1, "fp32", machine))
    save(calibration_path(machine), [Measurement(layer, 1, "eager", candidate, score=5.0)], machine)
    run("run", *SMALL, "--tokens", "1", "--backend", "reference", "--config", "chosen", "--out", path)
    (row,) = row_files.load([path])
    assert row.config == config


def test_score_exits_by_the_verdicts(path: Path) -> None:
    recorded = RESULTS / "bench.jsonl.xz"
    rows = row_files.load([recorded])
    output = run("score", recorded, status=1)
    assert output.startswith(f"NVIDIA H200, {len(rows)} rows")
    assert "| ≥ 0.82 | FAIL | least" in output
    path.write_text(rows[0].model_dump_json())
    assert "| open |" in run("score", path, status=1)
    path.write_text("".join(f"{row.model_dump_json()}\n" for row in full_board(fraction=1.05, vllm=1.4)))
    assert "FAIL" not in run("score", path)


@pytest.mark.parametrize("command", ["plot", "score", "regret", "tables", "pack", "ship"])
@pytest.mark.parametrize("content", [None, '{"rows": 3}\n', "<html>\n"], ids=["missing", "other JSON", "no JSON"])
def test_a_file_that_cannot_be_read_is_one_message(command: str, content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "given.json"
    if content is not None:
        path.write_text(content)
    out = tmp_path / "out"
    options = ("--out", out) if command in ("plot", "pack", "ship") else ()
    output = run(command, path, *options, status=2)
    assert output.startswith("error: ")
    assert "given.json" in output
    assert not out.exists()


@pytest.mark.parametrize("command", ["pack", "ship", "plot"])
def test_a_file_that_cannot_be_written_is_one_message(command: str, tmp_path: Path) -> None:
    source = RESULTS / "bench.jsonl.xz"
    if command == "plot":
        pytest.importorskip("matplotlib")
    else:
        source = tmp_path / "calibration.json"
        source.write_text(calibration((1, 4, 16, 64)).model_dump_json(), encoding="utf-8")
    output = run(command, source, "--out", "/proc/nowhere/out", status=2)
    assert "cannot be written" in output
    assert "/proc/nowhere/out" in output


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("us", 5e-324), ("us", 1e308), ("us_q1", -1.0), ("us_q3", math.inf), ("roofline_us", math.nan),
        ("fraction", math.nan), ("fraction", 1e300), ("error", math.nan), ("joules_per_token", math.inf),
        ("M", 10**30), ("E", 0), ("K", -5), ("topk", 0), ("N", 10**18),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["score", "regret", "tables", "pack", "plot"])
def test_a_row_that_nothing_measured_is_one_message(command: str, field: str, value: float, tmp_path: Path) -> None:
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    row = bench_row("vllm", "deepseek-v3", "bf16", 1, 200.0).model_dump(mode="json")
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {field: value}) + "\n")
    output = run(command, path, *(("--out", out) if command in ("pack", "plot") else ()), status=2)
    assert output.startswith(f"error: {path}:2 is not a benchmark row: {field} ")
    assert not out.exists()


def test_names_that_matplotlib_or_a_folder_would_read_otherwise_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    names = ("$\\frac{$", "../模\u202e\x1b[31m", "y" * 400, "a/b", "a_b", "")
    row = bench_row("$\\sqrt{$", "deepseek-v3", "bf16", 1, 200.0)
    rows = [row.model_copy(update={"workload": name, "machine": "$$_{$"}) for name in names]
    path.write_text("".join(f"{row.model_dump_json()}\n" for row in rows), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("plot", path, "--out", out)
    pictures = list(out.iterdir())
    assert len(pictures) == len(names)
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_a_picture_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "rows.jsonl"
    path.write_text(bench_row("vllm", "deepseek-v3", "bf16", 1, 200.0).model_dump_json())
    run("plot", path, "--out", tmp_path)
    (picture,) = tmp_path.glob("*.png")
    picture.write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # the disk is full after so many bytes
    try:
        output = run("plot", path, "--out", tmp_path, status=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written" in output
    assert picture.read_bytes() == b"before"
    assert sorted(tmp_path.iterdir()) == sorted([path, picture])


X2 = RESULTS.with_name("nvidia_h200_x2")


@pytest.mark.parametrize(
    "content",
    ["[1]", "1", "[" * 100_000, "<html>", '{"mode": "graph", "routing": "uniform", "ranks": 2, "us": 1}',
     '{"mode": "graph", "routing": "uniform", "ranks": 2, "us": "x", "layer": "deepseek-v3", "M": "y"}'],
    ids=lambda c: c[:9],
)  # fmt: skip
def test_rows_of_something_else_have_no_projection(content: str, tmp_path: Path) -> None:
    path = tmp_path / "given.jsonl"
    path.write_text(content)
    output = run("project", max(X2.glob("calibration-*.json.xz")), path, status=2)
    assert output.startswith(f"error: {path}: no rows of record.expert_parallel (")
    assert output.count("\n") == 1


@pytest.mark.parametrize("command", ["ship", "pack", "project", "show", "merge", "import"])
@pytest.mark.parametrize("kind", ["folder", "cut off", "JSON"])
def test_no_file_that_the_user_names_is_to_be_deleted(command: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / {"folder": "a.json", "cut off": "a.json.xz", "JSON": "a.json"}[kind]
    path.mkdir() if kind == "folder" else path.write_bytes(b"[]")
    group = ("calibration",) if command in ("show", "merge", "import") else ()
    out = ("--out", str(tmp_path / "out")) if command in ("ship", "pack", "merge") else ()
    result = CliRunner().invoke(main_app if group else app, [*group, command, str(path), *out])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"error: {path} ")
    assert "; give a file" in result.stderr
    assert "delete" not in result.stderr


@pytest.mark.parametrize("out", ["", ".", "/", "folder"])
def test_a_model_is_not_written_over_a_folder(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    result = CliRunner().invoke(main_app, ["fit", str(RESULTS / "sweep.jsonl.xz"), "--machine", "h200", "--out", out])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: the model cannot be written to ")
