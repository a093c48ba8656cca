"""Sweeps on a CPU, with the real backends wherever nothing has to fail."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from moe_dispatch.backend import Backend
from moe_dispatch.benchmarks import row_files
from moe_dispatch.benchmarks.rows import BenchRow
from moe_dispatch.benchmarks.sweep import Sweep
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.measure import H200_CEILINGS, time_interleaved
from moe_dispatch.measure.provenance import commit
from moe_dispatch.workloads import Workload
from tests.benchmarks.helpers import H200, MEASURED, Faulty, out_of_memory_at, plan, provenance, reference


def run(path: Path, *backends: Backend, tokens: tuple[int, ...] = (1, 3)) -> list[BenchRow]:
    return Sweep(path, provenance()).run([plan(*backends, tokens=tokens)])


def test_a_wrong_result_gets_no_time(path: Path) -> None:
    wrong = Faulty(lambda out: out * 1.5)
    rows = run(path, wrong, reference())
    by_name = {row.backend: row for row in rows if row.M == 1}
    assert by_name["faulty"].us is None
    assert by_name["faulty"].fraction is None
    assert by_name["faulty"].error == pytest.approx(0.5, rel=1e-3)
    assert by_name["faulty"].reason.startswith("wrong result: input 0 has relative error 0.5")
    assert by_name["reference"].us is not None
    assert wrong.calls == 2  # checked once per point, and never timed


def test_nan_is_wrong_and_still_json(path: Path) -> None:
    run(path, Faulty(lambda out: out * torch.nan), tokens=(1,))
    (row,) = row_files.load([path])
    assert row.us is None
    assert row.error is None
    assert "relative error inf" in row.reason


def test_the_roofline_is_by_the_ceilings_of_a_known_device_else_by_measured_ones() -> None:
    assert provenance(H200).roofline == (H200_CEILINGS, "device")
    other = H200.model_copy(update={"name": "NVIDIA H20"})
    assert provenance(other).roofline == (MEASURED, "measured")


def test_distributions_that_are_compared_are_timed_in_turns(path: Path) -> None:
    made = Sweep(path, provenance())
    with mock.patch("moe_dispatch.benchmarks.point.time_interleaved", wraps=time_interleaved) as timed:
        made.run([plan(reference(), tokens=(2,), routings=("uniform", "dirichlet-4"))])
    (call,) = timed.call_args_list
    candidates, inputs = call.args
    assert len(candidates) == 2
    assert not {id(layer_inputs) for layer_inputs in inputs[0]} & {id(layer_inputs) for layer_inputs in inputs[1]}
    assert sorted(row.routing for row in made.written if row.us) == ["dirichlet-4", "uniform"]


@pytest.mark.parametrize(
    ("share", "visits"),
    [
        (0.4, "fp32: weights, fp32 M=1, bf16: weights, bf16 M=1, fp32 M=3, bf16 M=3, fp32 M=2, bf16 M=2, fp32 M=5, "
              "bf16 M=5"),
        (0.0, "fp32: weights, fp32 M=1, fp32 M=3, fp32 M=2, bf16: weights, bf16 M=1, bf16 M=3, bf16 M=2, "
              "fp32: weights, fp32 M=5, bf16: weights, bf16 M=5"),
    ],
    ids=["they fit: in turn, made once", "they do not fit together: one after another"],
)  # fmt: skip
def test_layers_of_two_dtypes_are_visited(
    share: float, visits: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At three token counts, then at one more."""
    monkeypatch.setattr("moe_dispatch.benchmarks.sweep.WEIGHTS_SHARE", share)
    visited: list[str | None] = []
    made = Sweep(path, provenance(), advance=visited.append)
    made.run([plan(reference(), tokens=tokens, dtypes=("fp32", "bf16")) for tokens in ((1, 2, 3), (5,))])
    shown = [what.removeprefix("4,2,64,32 ").removesuffix(" eager") for what in visited if what]
    assert ", ".join(shown) == visits


def test_lack_of_memory_costs_its_own_row(path: Path) -> None:
    rows = run(path, Faulty(out_of_memory_at(3)), reference())
    timed = {(row.M, row.backend): row.us is not None for row in rows}
    assert timed == {(1, "faulty"): True, (1, "reference"): True, (3, "faulty"): False, (3, "reference"): True}
    (row,) = [row for row in rows if row.us is None]
    assert row.reason.startswith("out of memory: ")


def test_weights_that_do_not_fit_are_skipped_with_the_reason(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> ExpertWeights:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("moe_dispatch.benchmarks.sweep.make_experts", refuse)
    made = Sweep(path, provenance())
    assert made.run([plan(reference())]) == []
    assert made.notes == ["4,2,64,32 fp32: the weights do not fit in memory (OutOfMemoryError: CUDA out of memory)"]


def test_a_layer_that_has_no_weights_of_a_dtype_is_skipped_with_the_reason(path: Path) -> None:
    made = Sweep(path, provenance())
    narrow = Workload("4,2,64,24", E=4, topk=2, K=64, N=24)
    rows = made.run([plan(reference(), workload=narrow, tokens=(1,), dtypes=("mxfp4", "fp32"))])
    assert [row.dtype for row in rows] == ["fp32"]
    assert made.notes == [
        "4,2,64,24 mxfp4: has no such weights (MXFP4 has one scale for every 32 columns, and down has 24; keep BF16)"
    ]


@pytest.mark.parametrize(("free", "what"), [(100_000, "fp32: the weights"), (1 << 20, "fp32 M=3000 eager: inputs")])
def test_what_does_not_fit_is_not_allocated(
    free: int, what: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # a CPU's memory is not refused: the system ends the process that uses it
    monkeypatch.setattr("moe_dispatch.policies.calibration.memory.free_bytes", lambda _: free)
    made = Sweep(path, provenance())
    assert made.run([plan(reference(), tokens=(3000,))]) == []
    (note,) = made.notes
    assert what in note
    assert note.endswith(f"GiB, and {free / 2**30:.1f} GiB are free)")


def test_a_lost_device_ends_the_run_with_its_rows_kept(path: Path) -> None:
    def lose(out: torch.Tensor) -> torch.Tensor:
        if out.shape[0] == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return out

    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(path, Faulty(lose))
    assert [row.M for row in row_files.load([path])] == [1]


def test_an_interrupted_run_keeps_its_rows_and_goes_on(path: Path) -> None:

    def interrupt(out: torch.Tensor) -> torch.Tensor:
        if out.shape[0] == 3:
            raise KeyboardInterrupt
        return out

    with pytest.raises(KeyboardInterrupt):
        run(path, Faulty(interrupt))
    assert [row.M for row in row_files.load([path])] == [1]

    again = Sweep(path, provenance(), row_files.timed_keys(path, provenance().machine.fingerprint))
    assert [row.M for row in again.run([plan(Faulty(lambda out: out))])] == [3]
    assert [row.M for row in row_files.load([path])] == [1, 3]


def test_a_row_without_a_time_is_tried_again(path: Path) -> None:
    run(path, Faulty(lambda out: out * 2), tokens=(1,))
    Sweep(path, provenance(), row_files.timed_keys(path, provenance().machine.fingerprint)).run(
        [plan(Faulty(lambda out: out), tokens=(1,))]
    )
    (row,) = row_files.load([path])
    assert row.us is not None


def test_files_without_their_history_are_told_their_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_DISPATCH_COMMIT", raising=False)
    assert commit(tmp_path) == ""
    monkeypatch.setenv("MOE_DISPATCH_COMMIT", "f99620b")
    # The variable wins over a history, which may be an older one.
    assert commit(tmp_path) == commit(Path(__file__).parent) == "f99620b"
