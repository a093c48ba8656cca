"""`moe-dispatch bench` and what stands behind it, on a CPU, with the real backends wherever nothing has to fail."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar
from unittest import mock

import pydantic
import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

from moe_dispatch.backend import Backend, BackendConfig, Requirements
from moe_dispatch.benchmarks import acceptance, claims, packed, rows, ship
from moe_dispatch.benchmarks.baselines import BASELINES
from moe_dispatch.benchmarks.reports import agreement, plots, regret, scoreboard
from moe_dispatch.benchmarks.rows import BenchRow
from moe_dispatch.benchmarks.sweep import Plan, Provenance, Sweep
from moe_dispatch.commands.bench import bench
from moe_dispatch.errors import InvalidInputError, MoEDispatchError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine, current_machine
from moe_dispatch.measure import H200_CEILINGS, Ceilings, LayerInputs, make_inputs, reference_outputs, time_interleaved
from moe_dispatch.problem import DType, Mode
from moe_dispatch.registry import BACKENDS
from moe_dispatch.workloads import ROUTINGS, WORKLOADS, Workload, make_experts

ROOT = Path(__file__).parents[2]
LAYER = Workload("4,2,64,32", E=4, topk=2, K=64, N=32)
SMALL = ("--model", "4,2,64,32", "--dtype", "fp32", "--mode", "eager")

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(bench)


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def right(hidden: Tensor, experts: ExpertWeights, weights: Tensor, ids: Tensor) -> Tensor:
    reference = BACKENDS.load("reference")(current_machine("cpu"))
    return reference.run(hidden, experts, weights, ids, reference.config_type())


class Faulty(Backend):
    """The reference, but for what a test makes of it."""

    name = "faulty"
    requirements: ClassVar = Requirements(dtypes={"fp32": (0, 0)}, act_dtypes=frozenset({"fp32"}), cpu=True)

    def __init__(self, fault: Callable[[Tensor], Tensor]) -> None:
        super().__init__(current_machine("cpu"))
        self.fault = fault
        self.calls = 0

    def run(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,
    ) -> Tensor:
        self.calls += 1
        return self.fault(right(hidden_states, experts, topk_weights, topk_ids))


def sweep(path: Path, *backends: Backend, tokens: Sequence[int] = (1, 3)) -> Sweep:
    machine = current_machine("cpu")
    plan = Plan(
        workloads=(LAYER,), dtypes=("fp32",), tokens=tuple(tokens), routings=(ROUTINGS["uniform"],), modes=("eager",),
        backends=backends, inputs=2, point_s=0.0,
    )  # fmt: skip
    provenance = Provenance(machine, rows.versions(machine), "", Ceilings(bandwidth=1e10, fp32_flops=1e11))
    return Sweep(plan, path, torch.device("cpu"), provenance)


def reference() -> Backend:
    return BACKENDS.load("reference")(current_machine("cpu"))


def test_rows_are_written_validate_and_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    output = run(*SMALL, "--tokens", "1,4", "--backend", "reference", "--backend", "naive_loop", "--out", path)
    found = [BenchRow.model_validate_json(line) for line in path.read_text().splitlines()]
    assert {(row.M, row.backend) for row in found} == {
        (M, name) for M in (1, 4) for name in ("reference", "naive_loop")
    }
    for row in found:
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


def test_a_wrong_result_gets_no_time(tmp_path: Path) -> None:
    wrong = Faulty(lambda out: out * 1.5)
    made = sweep(tmp_path / "rows.jsonl", wrong, reference())
    made.run()
    by_name = {row.backend: row for row in made.written if row.M == 1}
    assert by_name["faulty"].us is None
    assert by_name["faulty"].fraction is None
    assert by_name["faulty"].error == pytest.approx(0.5, rel=1e-3)
    assert by_name["faulty"].reason.startswith("wrong result: input 0 has relative error 0.5")
    assert by_name["reference"].us is not None
    assert wrong.calls == 2  # once per point to be judged, never to be timed


def test_nan_is_wrong_and_still_json(tmp_path: Path) -> None:
    made = sweep(tmp_path / "rows.jsonl", Faulty(lambda out: out * torch.nan), tokens=(1,))
    made.run()
    (row,) = rows.load([tmp_path / "rows.jsonl"])
    assert row.us is None
    assert row.error is None
    assert "relative error inf" in row.reason


def in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float) -> list[str]:
    """What a sweep over two dtypes at three token counts visits, in order, weights included."""
    monkeypatch.setattr("moe_dispatch.benchmarks.sweep.WEIGHTS_SHARE", share)
    made = sweep(tmp_path / "rows.jsonl", reference(), tokens=(1, 2, 3))
    made.plan = dataclasses.replace(made.plan, dtypes=("fp32", "bf16"))
    visited: list[str] = []
    made.advance = lambda what: visited.append(what.removeprefix("4,2,64,32 ")) if what else None
    made.run(dataclasses.replace(made.plan, tokens=(5,)))
    return [what.removesuffix(" eager") for what in visited]


def test_distributions_that_are_to_be_compared_are_timed_in_turns(tmp_path: Path) -> None:
    made = sweep(tmp_path / "rows.jsonl", reference(), tokens=(2,))
    made.plan = dataclasses.replace(made.plan, routings=(ROUTINGS["uniform"], ROUTINGS["dirichlet-4"]))
    with mock.patch("moe_dispatch.benchmarks.sweep.time_interleaved", wraps=time_interleaved) as timed:
        made.run()
    (call,) = timed.call_args_list
    candidates, inputs = call.args
    assert len(candidates) == 2
    assert not {id(given) for given in inputs[0]} & {id(given) for given in inputs[1]}
    assert sorted(row.routing for row in made.written if row.us) == ["dirichlet-4", "uniform"]


def test_layers_that_fit_in_memory_are_visited_in_turn_and_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert in_turn(tmp_path, monkeypatch, 0.4) == [
        "fp32: weights", "fp32 M=1", "bf16: weights", "bf16 M=1", "fp32 M=3", "bf16 M=3", "fp32 M=2", "bf16 M=2",
        "fp32 M=5", "bf16 M=5",
    ]  # fmt: skip


def test_layers_that_do_not_fit_together_are_visited_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert in_turn(tmp_path, monkeypatch, 0.0)[:8] == [
        "fp32: weights", "fp32 M=1", "fp32 M=3", "fp32 M=2", "bf16: weights", "bf16 M=1", "bf16 M=3", "bf16 M=2",
    ]  # fmt: skip


def test_the_acceptance_run_has_evidence_for_every_bar_early() -> None:
    planned = list(acceptance.plans([], [], scoreboard.MODELS, None))
    assert [plan.tokens for plan in planned[:3]] == [(1,), (16384,), (64,)]
    points = {(M, r.name, mode) for plan in planned for M in plan.tokens for r in plan.routings for mode in plan.modes}
    graphs = {(M, "uniform", "graph") for M in scoreboard.TOKENS}
    skewed = {(M, scoreboard.SKEWED, "graph") for M in scoreboard.TOKENS if M >= 1024}
    assert points == graphs | skewed | {(1, "uniform", "eager")}


def test_lack_of_memory_costs_its_own_row(tmp_path: Path) -> None:
    def greedy(out: Tensor) -> Tensor:
        if out.shape[0] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 900 GiB")
        return out

    made = sweep(tmp_path / "rows.jsonl", Faulty(greedy), reference())
    made.run()
    timed = {(row.M, row.backend): row.us is not None for row in made.written}
    assert timed == {(1, "faulty"): True, (1, "reference"): True, (3, "faulty"): False, (3, "reference"): True}
    (row,) = [row for row in made.written if row.us is None]
    assert row.reason.startswith("out of memory: ")


def test_weights_that_do_not_fit_are_skipped_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_dispatch.benchmarks import sweep as module

    def refuse(*_: object) -> ExpertWeights:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "make_experts", refuse)
    made = sweep(tmp_path / "rows.jsonl", reference())
    assert made.run() == []
    assert made.notes == ["4,2,64,32 fp32: the weights do not fit in memory (OutOfMemoryError: CUDA out of memory)"]


def test_a_lost_device_ends_the_run_with_its_rows_kept(tmp_path: Path) -> None:
    def lose(out: Tensor) -> Tensor:
        if out.shape[0] == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return out

    with pytest.raises(RuntimeError, match="illegal memory access"):
        sweep(tmp_path / "rows.jsonl", Faulty(lose)).run()
    assert [row.M for row in rows.load([tmp_path / "rows.jsonl"])] == [1]


def test_an_interrupted_run_keeps_its_rows_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"

    def interrupted(out: Tensor) -> Tensor:
        if out.shape[0] == 3:
            raise KeyboardInterrupt
        return out

    with pytest.raises(KeyboardInterrupt):
        sweep(path, Faulty(interrupted)).run()
    assert [row.M for row in rows.load([path])] == [1]

    mended = Faulty(lambda out: out)
    again = sweep(path, mended)
    again.done = {row.key for row in rows.load([path])}
    again.run()
    assert [row.M for row in again.written] == [3]
    assert [row.M for row in rows.load([path])] == [1, 3]


def test_resume_skips_what_is_there_and_an_old_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    call = (*SMALL, "--backend", "reference", "--out", path)
    run(*call, "--tokens", "1")
    with pytest.raises(InvalidInputError, match="exists already; --resume"):
        run(*call, "--tokens", "1")
    run(*call, "--tokens", "1,2", "--resume")
    assert [BenchRow.model_validate_json(line).M for line in path.read_text().splitlines()] == [1, 2]


def test_a_row_without_a_time_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    sweep(path, Faulty(lambda out: out * 2), tokens=(1,)).run()
    made = sweep(path, Faulty(lambda out: out), tokens=(1,))
    made.done = {row.key for row in rows.load([path]) if row.us is not None}
    made.run()
    (row,) = rows.load([path])
    assert row.us is not None


def test_a_half_written_line_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    sweep(path, reference(), tokens=(1,)).run()
    with path.open("a") as file:
        file.write('{"workload": "4,2')
    sweep(path, reference(), tokens=(3,)).run()
    assert [row.M for row in rows.load([path])] == [1, 3]


def test_a_foreign_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for line in ('{"workload": "x"}', "workload,M,us", '{"workload": "x",,'):
        path.write_text(f"{line}\n")
        with pytest.raises(InvalidInputError, match=r"rows.jsonl:1 is not a benchmark row"):
            rows.load([path])


@pytest.mark.parametrize(
    "module", [plots, scoreboard, packed, ship, regret, agreement], ids=lambda module: module.__name__
)
@pytest.mark.parametrize("content", [None, '{"rows": 3}\n', "<html>\n"], ids=["missing", "other JSON", "no JSON"])
def test_a_file_that_cannot_be_read_is_one_message(
    module: types.ModuleType, content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "given.json"
    if content is not None:
        given.write_text(content)
    options = ["--out", str(tmp_path / "out")] if module in {plots, packed, ship} else []
    options = [str(given)] if module is agreement else options
    with pytest.raises(SystemExit, match="2"):
        module.main([str(given), *options])
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "given.json" in said
    assert not (tmp_path / "out").exists()


def test_a_folder_of_records_is_read_whole() -> None:
    """As docs/calibration.md has it drawn: claims are kept beside the rows."""
    folder = ROOT / "benchmarks/results/nvidia_h200"
    assert list(folder.glob("claims*.jsonl"))
    single = [row for name in ("bench.jsonl", "sweep.jsonl") for row in rows.load([folder / name])]
    assert {row.key for row in rows.load([folder])} == {row.key for row in single}


def test_the_budget_stops_before_the_next_point(tmp_path: Path) -> None:
    output = run(
        *SMALL, "--tokens", "1,2,3", "--backend", "reference", "--budget", "0", "--out", tmp_path / "rows.jsonl"
    )
    assert not (tmp_path / "rows.jsonl").exists()
    assert "budget of 0 s is spent" in output


def test_json_prints_the_rows(tmp_path: Path) -> None:
    output = run(*SMALL, "--tokens", "1", "--backend", "reference", "--out", tmp_path / "rows.jsonl", "--json")
    printed = [line for line in output.splitlines() if line.startswith("{")]
    assert [BenchRow.model_validate_json(line).backend for line in printed] == ["reference"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "no-such-model"), "no workload is called"),
        (("--tokens", "1,x"), "--tokens must be positive numbers"),
        (("--tokens", "0"), "--tokens must be positive numbers"),
        (("--dtype", "int4"), "--dtype must be one of"),
        (("--backend", "cutlass"), "no backend or baseline is called"),
        (("--config", "some"), "--config must be"),
        (("--mode", "warp"), "--mode must be"),
        (("--routing", "skewed"), "no routing distribution is called"),
        (("--out", "/proc/nowhere/rows.jsonl"), "rows cannot be written to /proc/nowhere/rows.jsonl"),
    ],
)
def test_bad_options_say_what_is_allowed(arguments: tuple[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(MoEDispatchError, match=message):
        run(*SMALL, "--out", tmp_path / "rows.jsonl", *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can")
def test_graphs_need_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="needs a CUDA device"):
        run(*SMALL, "--mode", "both", "--out", tmp_path / "rows.jsonl")


def test_a_row_has_a_time_or_a_reason() -> None:
    good = row("vllm", "deepseek-v3", "bf16", 1, 2.0)
    for change in ({"us": None}, {"reason": "wrong"}):
        with pytest.raises(pydantic.ValidationError, match="a time or a reason"):
            BenchRow.model_validate(good.model_dump() | change)


@pytest.mark.parametrize("name", ["naive_loop", "transformers_grouped_mm", "transformers_batched_mm"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_peers_that_run_on_a_cpu_are_right(name: str, dtype: DType) -> None:
    if name.startswith("transformers"):
        pytest.importorskip("transformers")
    machine = current_machine("cpu")
    problem = LAYER.problem(5, dtype, machine)
    baseline = BASELINES[name](machine)
    assert baseline.unsupported_reasons(problem) == ()
    experts = make_experts(LAYER, dtype, "cpu", torch.Generator().manual_seed(1))
    (given,) = make_inputs(problem, ROUTINGS["uniform"], "cpu", count=1)
    (truth,) = reference_outputs(experts, (given,))
    out = baseline.prepare(experts, problem)(given).float()
    assert (out - truth).norm() / truth.norm() < baseline.tolerance[dtype]


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_every_peer_says_what_it_runs_and_refuses_what_it_cannot(name: str) -> None:
    baseline = BASELINES[name]
    assert baseline.__doc__
    assert baseline.name == name
    gpt_oss = WORKLOADS["gpt-oss-120b"].problem(4, "fp8", Machine.load(ROOT / "tests/machines/h200.json"), "graph")
    assert baseline(current_machine("cpu")).unsupported_reasons(gpt_oss)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(BASELINES))
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_peers_that_are_installed_are_right_on_a_gpu(name: str, dtype: DType) -> None:
    machine = current_machine("cuda")
    layer = Workload("small", E=8, topk=2, K=512, N=256)
    problem = layer.problem(33, dtype, machine)
    baseline = BASELINES[name](machine)
    if reasons := baseline.unsupported_reasons(problem):
        pytest.skip("; ".join(reasons))
    experts = make_experts(layer, dtype, "cuda", torch.Generator("cuda").manual_seed(1))
    (given,) = make_inputs(problem, ROUTINGS["uniform"], "cuda", count=1)
    (truth,) = reference_outputs(experts, (given,))
    out = baseline.prepare(experts, problem)(given).float()
    assert (out - truth).norm() / truth.norm() < baseline.tolerance[dtype]


def row(
    backend: str, model: str, dtype: DType, M: int, us: float, mode: Mode = "graph", routing: str = "uniform"
) -> BenchRow:
    machine = Machine.load(ROOT / "tests/machines/h200.json")
    problem = WORKLOADS[model].problem(M, dtype, machine)
    floor = H200_CEILINGS.roofline_us(problem)
    assert floor is not None
    return BenchRow(
        workload=model, E=problem.E, topk=problem.topk, K=problem.K, N=problem.N, dtype=dtype, M=M, backend=backend,
        config={}, mode=mode, routing=routing, us=us, us_q1=us, us_q3=us, samples=5, inputs=8,
        hit_experts=problem.expected_experts, roofline_us=floor, roofline_from="device",
        fraction=floor / us, error=4e-3,
        deterministic=True, machine="made up", fingerprint="made-up", versions={}, commit="", ceilings=H200_CEILINGS,
    )  # fmt: skip


def full_board(fraction: float, vllm: float, skew: float = 1.1) -> list[BenchRow]:
    """Rows at every point of the acceptance, ours at `fraction` of the floor and vLLM `vllm` times as slow."""
    made = []
    for dtype in ("bf16", "fp8"):
        for model in scoreboard.MODELS:
            for M in scoreboard.TOKENS:
                roofline = row("triton_splitk", model, dtype, M, 1.0).roofline_us
                assert roofline is not None
                us = roofline / fraction
                made.append(row("triton_splitk", model, dtype, M, us))
                made.append(row("reference", model, dtype, M, 10 * us))
                made.append(row("vllm", model, dtype, M, us * vllm))
                made.append(row("triton_splitk", model, dtype, M, us * skew, routing="dirichlet-4"))
            made += [row("triton_splitk", model, dtype, 1, 40.0, "eager"), row("vllm", model, dtype, 1, 200.0, "eager")]
    return made


def test_the_scoreboard_passes_only_on_complete_evidence() -> None:
    rows_ = full_board(fraction=0.95, vllm=1.4)
    assert {bar.verdict for bar in scoreboard.scoreboard(rows_)} == {"pass"}
    without_a_point = [r for r in rows_ if not (r.workload == "mixtral-8x7b" and r.M == 256)]
    verdicts = {bar.what: bar.verdict for bar in scoreboard.scoreboard(without_a_point)}
    assert verdicts["bf16 middle: fraction of the floor, geometric mean"] == "open"
    assert verdicts["bf16 decode: fraction of the floor, geometric mean"] == "pass"
    assert verdicts["fp8: best of ours against the best baseline, worst point"] == "open"
    assert {bar.verdict for bar in scoreboard.scoreboard([])} == {"open"}


def test_the_scoreboard_fails_what_misses_a_bar() -> None:
    bars = {bar.what: bar for bar in scoreboard.scoreboard(full_board(fraction=0.8, vllm=0.9, skew=1.3))}
    assert bars["bf16 decode: fraction of the floor, geometric mean"].verdict == "FAIL"
    assert bars["bf16 decode: fraction of the floor, geometric mean"].value == pytest.approx(0.8)
    assert bars["bf16 prefill: fraction of the floor, geometric mean"].verdict == "pass"
    assert bars["fp8: best of ours against the best baseline, worst point"].value == pytest.approx(0.9)
    assert bars["fp8: best of ours against the best baseline, worst point"].verdict == "FAIL"
    assert bars["fp8: time at dirichlet-4 over uniform, M ≥ 1024, worst point"].verdict == "FAIL"


def test_the_scoreboard_runs_as_a_script(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for made in full_board(fraction=0.95, vllm=1.4):
        rows.append(path, made)
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/reports/scoreboard.py", path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "| bf16 decode: fraction of the floor, geometric mean | 0.95 | ≥ 0.93 | pass |" in done.stdout


def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = plots.draw(full_board(fraction=0.9, vllm=1.2), tmp_path)
    assert {path.name for path in drawn} == {
        *(f"{model}-{dtype}.png" for model in scoreboard.MODELS for dtype in ("bf16", "fp8")),
        "winners-bf16.png",
        "winners-fp8.png",
    }
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert plots.draw([], tmp_path / "none") == []


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MoEDispatchError, match=r"pip install 'moe-dispatch\[plots\]'"):
        plots.draw(full_board(0.9, 1.2)[:4], tmp_path)


def test_padding_keeps_every_slot() -> None:
    ids = torch.tensor([[0, 2], [2, 3], [2, 0]], dtype=torch.int32)
    given = LayerInputs(torch.arange(6.0).view(3, 2), torch.arange(1.0, 7.0).view(3, 2), ids)
    free = claims.one_row_per_slot(given, E=4, padded=False)
    assert free.topk_ids.flatten().tolist() == [0, 0, 2, 2, 2, 3]
    assert free.topk_weights.flatten().tolist() == [1, 6, 2, 3, 5, 4]
    padded = claims.one_row_per_slot(given, E=4, padded=True)
    assert padded.topk_ids.flatten().tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert padded.topk_weights.flatten().tolist() == [1, 6, 0, 0, 0, 0, 2, 3, 5, 4, 0, 0]
    assert padded.hidden_states[6:9].tolist() == free.hidden_states[2:5].tolist()


def test_each_claim_says_what_it_compares_and_runs() -> None:
    made = claims.Bench(smoke=True)
    found = []
    for claim in claims.CLAIMS:
        assert claim.run.__doc__
        if claim.name in ("persistent", "fp8-rate"):  # the others take long in the interpreter
            found += list(claim.run(made, claim))
    table = claims.markdown(found, smoke=True)
    assert "| column-major | up to 4.4× over row-major | – " in table
    assert "not measured: needs a Hopper GPU" in table or torch.cuda.is_available()
    assert "reproduced" not in table


KERNEL = """
    import triton, triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    @triton.jit
    def product(a, b, c):
        offs = tl.arange(0, 64)
        tile = offs[:, None] * 64 + offs[None, :]
        tl.store(c + tile, tl.dot(tl.load(a + tile), tl.load(b + tile)))

    source = ASTSource(fn=product, signature={"a": "*bf16", "b": "*bf16", "c": "*fp32"}, constexprs={})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    ptx = made.asm["ptx"]
    print("wgmma" in ptx, "mma.sync" in ptx, ".target sm_90a" in ptx, len(made.asm["cubin"]) > 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("device", "wgmma"), [("a100", False), ("l40s", False), ("", True)])
def test_an_h200_told_that_it_is_older_gets_older_code_that_it_can_load(
    device: str, wgmma: bool, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    script = tmp_path / "kernel.py"
    script.write_text(textwrap.dedent(KERNEL))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path / "c")
    }
    wrapper = [str(ROOT / "tests/gpu/as_device.sh"), device] if device else []
    done = subprocess.run(
        [*wrapper, sys.executable, script], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.split() == [str(wgmma), str(not wgmma), "True", "True"], done.stderr


@pytest.mark.parametrize("name", ["a100", "l40s", "h200", "b200"])
def test_described_machines_are_machines(name: str) -> None:
    machine = Machine.load(ROOT / "tests/machines" / f"{name}.json")
    assert machine.capability == {"a100": (8, 0), "l40s": (8, 9), "h200": (9, 0), "b200": (10, 0)}[name]
    assert name in machine.slug
    assert json.loads(machine.model_dump_json())["device"] == "cuda"


def test_the_chosen_configuration_is_what_the_calibration_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_dispatch.policies.calibrated import calibration_path
    from moe_dispatch.policies.measurements.merge import save
    from moe_dispatch.policies.measurements.schema import Candidate, LayerShape, Measurement
    from moe_dispatch.policies.measurements.versions import relevant_versions

    monkeypatch.setenv("MOE_DISPATCH_CACHE_DIR", str(tmp_path))
    machine = current_machine("cpu")
    config: dict[str, int | bool | str] = {"compute_fp32": True, "quantize_activations": False}  # not the default
    candidate = Candidate(backend="reference", config=config, versions=relevant_versions(reference()))
    layer = LayerShape.of(LAYER.problem(1, "fp32", machine))
    save(calibration_path(machine), [Measurement(layer, 1, "eager", candidate, score=5.0)], machine)
    path = tmp_path / "rows.jsonl"
    run(*SMALL, "--tokens", "1", "--backend", "reference", "--config", "chosen", "--seconds", "0", "--out", path)
    (found,) = rows.load([path])
    assert found.config == config


def test_files_that_travelled_are_told_their_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_DISPATCH_COMMIT", raising=False)
    assert rows.commit(tmp_path) == ""
    monkeypatch.setenv("MOE_DISPATCH_COMMIT", "f99620b")
    # Even where there is a history: it may be an older one.
    assert rows.commit(tmp_path) == rows.commit(Path(__file__).parent) == "f99620b"
