"""Compiling ahead, on a CPU, where there is nothing to compile but the processes are the same."""

import contextlib
import dataclasses
import threading
import time
from pathlib import Path

import pytest
import torch

from moe_dispatch.experts import TENSORS
from moe_dispatch.machine import Machine
from moe_dispatch.policies.calibration import compile_ahead as module
from moe_dispatch.policies.calibration.compile_ahead import Job, Jobs, compile_ahead, in_order
from moe_dispatch.policies.calibration.placeholder_weights import placeholder_weights
from moe_dispatch.policies.calibration.worker_process import WorkerDiedError, WorkerProcess
from moe_dispatch.policies.measurements.schema import Candidate, LayerShape
from moe_dispatch.problem import DType
from moe_dispatch.registry import BACKENDS as REGISTERED
from moe_dispatch.workloads import make_experts, workload

CPU = Machine.inspect("cpu")
LAYER = LayerShape.of(workload("4,2,32,16").problem(1, "fp32", CPU))
BACKENDS = {
    "reference": "moe_dispatch.backends.reference:ReferenceBackend",
    "killed": "tests.support.calibration_faults:KilledBackend",
    "raising": "tests.support.calibration_faults:RaisingBackend",
}


def jobs(*names: str, tokens: tuple[int, ...] = (1, 4)) -> list[Job]:
    return [Job(LAYER, M, Candidate(backend=name, versions={"torch": "1"})) for name in names for M in tokens]


def start() -> WorkerProcess:
    return WorkerProcess("cpu", BACKENDS, 20.0)


def test_one_token_count_of_each_candidate_comes_first() -> None:
    order = [(job.candidate.backend, job.M) for job in in_order(jobs("a", "b", tokens=(1, 2, 4)))]
    assert order == [("a", 1), ("b", 1), ("a", 2), ("b", 2), ("a", 4), ("b", 4)]


def taken(queue: Jobs, loaded: set[str], *, every_library: bool = False) -> list[str]:
    """The backends of the jobs that one process gets, alone."""
    names = []
    while (job := queue.take(loaded, every_library=every_library)) is not None:
        names.append(job.candidate.backend)
    return names


def test_the_measuring_worker_begins_with_a_job_of_every_library() -> None:
    queue = Jobs(jobs("ours", "lib", "other_lib"), libraries={"lib": "lib", "other_lib": "other_lib"})
    order = taken(queue, set(), every_library=True)
    assert set(order[:2]) == {"lib", "other_lib"}
    assert sorted(order) == sorted(["ours", "lib", "other_lib"] * 2)


def test_few_processes_load_a_library_and_the_others_leave_its_jobs_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIBRARY_PROCESSES", 1)
    queue = Jobs(jobs("ours", "lib", tokens=(1, 2, 4)), libraries={"lib": "lib"})
    one, other = set[str](), set[str]()
    first = queue.take(one, every_library=False)
    assert first is not None and first.candidate.backend == "lib"  # noqa: PT018
    assert taken(queue, other) == ["ours"] * 3
    assert taken(queue, one) == ["lib"] * 2
    assert not len(queue)


def test_a_process_goes_on_with_the_library_that_it_has_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the library's backends it loaded it for; the next process loads another library first."""
    monkeypatch.setattr(module, "LIBRARY_PROCESSES", 1)
    libraries = {"one": "lib", "two": "lib", "three": "other_lib"}
    queue = Jobs(jobs("one", "two", "three", "ours", tokens=(1, 2)), libraries)
    loaded = [set[str](), set[str]()]
    first = [queue.take(each, every_library=False) for each in loaded]
    assert {job.candidate.backend for job in first if job} == {"one", "three"}
    assert taken(queue, loaded[1]) == ["three", "ours", "ours"]
    assert sorted(taken(queue, loaded[0])) == ["one", "two", "two"]


@pytest.mark.slow
def test_what_takes_processes_down_is_not_tried_for_ever(tmp_path: Path) -> None:
    wanted = jobs("killed", tokens=(1, 2, 4, 8)) + jobs("reference")
    failed = compile_ahead(wanted, start, tmp_path / "machine.txt")
    assert ["SIGKILL" in line for line in failed] == [True, True, False, False]
    assert all(line.endswith("not tried after that") for line in failed[2:])
    assert (tmp_path / "machine.txt").read_text().split() == sorted(job.digest for job in jobs("reference"))


@pytest.mark.slow
@pytest.mark.parametrize("started", [True, False], ids=["while a worker compiles", "before its process is there"])
def test_an_interruption_ends_the_workers_at_once(tmp_path: Path, started: bool) -> None:
    ends: list[str] = []

    class Watched(WorkerProcess):
        compiling = threading.Event()

        def compile(self, layer: LayerShape, M: int, candidate: Candidate) -> None:
            self.compiling.set()
            if not started:
                interrupted.wait()
            try:
                super().compile(layer, M, candidate)
            except WorkerDiedError as error:
                ends.append(str(error))
                raise

        def kill(self) -> None:
            super().kill()
            interrupted.set()

    def interrupt() -> None:
        Watched.compiling.wait()
        if started:
            while not worker.restarts:
                time.sleep(0.01)
        raise KeyboardInterrupt

    interrupted = threading.Event()
    worker = Watched("cpu", BACKENDS | {"hanging": "tests.support.calibration_faults:HangingBackend"}, 120.0)
    with pytest.raises(KeyboardInterrupt):
        compile_ahead(jobs("hanging"), lambda: worker, tmp_path / "machine.txt", meanwhile=interrupt)
    (end,) = ends
    assert "killed" in end  # and not given up after its time


@pytest.mark.parametrize(
    ("limit", "cores"), [("400000 100000", 4), ("150000 100000", 1), ("50000 100000", 1), ("max 100000", 8), (None, 8)]
)
def test_no_more_processes_than_a_container_has_cores(
    limit: str | None, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system lists the cores of the whole host, on which that many processes would only wait for each other."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(module, "_CORES_OF_GROUP", tmp_path / "cpu.max")
    if limit:
        (tmp_path / "cpu.max").write_text(f"{limit}\n")
    assert module.usable_cores() == cores


def test_without_jobs_nothing_is_done_meanwhile(tmp_path: Path) -> None:
    assert not compile_ahead([], start, tmp_path / "machine.txt", meanwhile=pytest.fail)


@pytest.mark.slow
def test_what_was_compiled_is_remembered_and_failures_cost_themselves(tmp_path: Path) -> None:
    remembered = tmp_path / "compiled" / "machine.txt"
    told: list[tuple[int, int]] = []
    wanted = jobs("killed", "raising", tokens=(1,)) + jobs("reference")
    failed = compile_ahead(wanted, start, remembered, on_progress=lambda done, total: told.append((done, total)))
    assert len(failed) == 2
    assert any("raising at M=1" in one and "no kernel image" in one for one in failed)
    assert max(told) == (4, 4)
    assert set(remembered.read_text().split()) == {job.digest for job in jobs("reference")}
    told.clear()
    compile_ahead(wanted[1:], start, remembered, on_progress=lambda done, total: told.append((done, total)))
    assert max(told) == (1, 1)  # a job that failed, perhaps for lack of memory, is tried again


@pytest.mark.slow
def test_the_measuring_worker_outlives_the_compilation(tmp_path: Path) -> None:
    # Linux kills a worker when the thread that started it ends, not only when the process does.
    with contextlib.closing(start()) as measuring:
        assert not compile_ahead(jobs("reference"), start, tmp_path / "machine.txt", measuring_worker=measuring)
        measuring.layer(LAYER)
        assert measuring.restarts == 1


def test_another_version_is_another_job() -> None:
    (one,) = jobs("reference", tokens=(1,))
    assert Job(LAYER, 1, Candidate(backend="reference", versions={"torch": "2"})).digest != one.digest


def test_past_the_deadline_nothing_starts(tmp_path: Path) -> None:
    compile_ahead(jobs("reference"), start, tmp_path / "machine.txt", deadline=time.monotonic() - 1)
    assert not (tmp_path / "machine.txt").read_text()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8", "fp8_channel", "mxfp4"])
@pytest.mark.parametrize("layer", ["4,2,192,160", "4,2,256,128"])
@pytest.mark.parametrize("gpt_oss", [False, True])
def test_placeholder_weights_are_to_a_kernel_what_the_layer_is(layer: str, dtype: DType, gpt_oss: bool) -> None:
    """Else another kernel is compiled than the one that is run: the types of pointers and strides are part of it."""
    shape = workload(layer)
    if gpt_oss:
        shape = dataclasses.replace(shape, activation="swiglu_oai", bias=True, interleaved=True)
    problem = shape.problem(1, dtype, CPU)
    made, real = placeholder_weights(problem, torch.device("cpu")), make_experts(problem, dtype, "cpu")
    assert made.spec == real.spec
    for name in TENSORS:
        mine, other = getattr(made, name), getattr(real, name)
        assert (mine is None) == (other is None), name
        if mine is not None:
            assert (mine.shape, mine.stride(), mine.dtype) == (other.shape, other.stride(), other.dtype), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_placeholder_weights_of_a_layer_beyond_the_memory_run_where_every_id_is_minus_one(dtype: DType) -> None:
    machine = Machine.inspect("cuda")
    experts = placeholder_weights(workload("4096,8,7168,2048").problem(1, dtype, machine), torch.device("cuda"))
    assert experts.gate_up.nbytes > machine.memory_bytes / 2
    backend = REGISTERED.load("triton_persistent")(machine)
    problem = experts.problem(3, 8, torch.bfloat16, machine.capability)
    hidden = torch.ones(3, 7168, dtype=torch.bfloat16, device="cuda")
    ids = torch.full((3, 8), -1, dtype=torch.int32, device="cuda")
    out = backend.run(hidden, experts, torch.ones(3, 8, device="cuda"), ids, backend.default_config(problem))
    assert not out.any()
