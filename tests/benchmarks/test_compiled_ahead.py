"""What a benchmark compiles ahead. On a CPU there is nothing to compile, but plans, jobs and processes are the same."""

import math
import multiprocessing
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from moe_dispatch.backend import Backend
from moe_dispatch.benchmarks import compiled_ahead as module
from moe_dispatch.benchmarks.baselines import NaiveLoop, Vllm, VllmDeepGemm, VllmTritonKernels
from moe_dispatch.benchmarks.candidates import CandidateFactory
from moe_dispatch.benchmarks.compiled_ahead import COMPILING, compile_plans, jobs_of
from moe_dispatch.benchmarks.plan import BenchPlan
from moe_dispatch.benchmarks.row_files import load
from moe_dispatch.benchmarks.rows import RowKey, row_key
from moe_dispatch.benchmarks.stopwatch import Stopwatch
from moe_dispatch.benchmarks.sweep import Sweep
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine, current_machine
from moe_dispatch.measure import Call, make_inputs
from moe_dispatch.policies.calibration.compile_ahead import compiled_path
from moe_dispatch.problem import DType, MoEProblem
from moe_dispatch.registry import BACKENDS
from moe_dispatch.workloads import ROUTINGS, WORKLOADS, Workload, make_experts
from tests.benchmarks.helpers import H200, LAYER, plan, provenance, reference
from tests.support.fakes import registered

CPU = current_machine("cpu")
FULL = H200.model_copy(update={"libraries": {"vllm": "0.33.0", "deep_gemm": "2.8.1"}})
TOKENS = tuple(range(1, 17))  # as many as it takes for processes to be started


def backends_of(machine: Machine, *names: str) -> list[Backend]:
    return [BACKENDS.load(name)(machine) for name in names]


def factory(machine: Machine) -> CandidateFactory:
    return CandidateFactory(machine, lambda _: None, Stopwatch())


def planned(wanted: BenchPlan, done: frozenset[RowKey] = frozenset()) -> list[tuple[str, int]]:
    return [(job.candidate.backend, job.M) for job in jobs_of([wanted], factory(FULL), FULL, done)]


def test_what_reads_the_whole_layer_is_not_compiled_on_placeholders(compiling: None) -> None:
    workload = WORKLOADS["gpt-oss-120b"]
    jobs = planned(plan(*backends_of(FULL, "gluon_hopper"), workload=workload, dtypes=("mxfp4",), tokens=(1024, 65536)))
    assert jobs == [("gluon_hopper", 1024)]  # with more rows it copies the layer


def test_a_candidate_is_compiled_once_for_all_modes_and_distributions_without_a_row(compiling: None) -> None:
    wanted = plan(
        *backends_of(FULL, "triton_splitk", "torch_grouped"), workload=WORKLOADS["qwen3-30b-a3b"], dtypes=("fp8",),
        tokens=(1, 64), routings=("uniform", "dirichlet-4"), modes=("graph", "eager"),
        baselines=tuple(baseline(FULL) for baseline in (Vllm, VllmDeepGemm, VllmTritonKernels, NaiveLoop)),
    )  # fmt: skip
    names = ("triton_splitk", "vllm", "vllm_deep_gemm")
    assert sorted(planned(wanted)) == [(name, M) for name in names for M in (1, 64)]

    def keys(M: int, *routings: str) -> set[RowKey]:
        modes = ("graph", "eager")
        return {row_key("qwen3-30b-a3b", "fp8", M, "vllm", {}, mode, name) for mode in modes for name in routings}

    assert ("vllm", 1) in planned(wanted, frozenset(keys(1, "uniform")))
    assert ("vllm", 1) not in planned(wanted, frozenset(keys(1, "uniform", "dirichlet-4")))


@pytest.mark.parametrize("unused", [-1, 0])
def test_a_baseline_is_compiled_by_a_call_that_reads_one_expert_at_most(unused: int) -> None:
    class Compiling(module._CompilingBaseline):
        name = "naive_loop"
        baseline = NaiveLoop
        unused_id = unused

    problem = LAYER.problem(3, "fp32", CPU)
    experts = make_experts(problem, "fp32", "cpu")
    for tensor in (experts.gate_up, experts.down):
        tensor[1:] = torch.nan
    (inputs,) = make_inputs(problem, ROUTINGS["uniform"], "cpu", 1)
    nowhere = torch.full_like(inputs.topk_ids, -1)
    backend = Compiling(CPU)
    out = backend.run(inputs.hidden_states, experts, inputs.topk_weights, nowhere, backend.config_type())
    assert out.isfinite().all()
    assert out.any() == (unused == 0)


class Noted(NaiveLoop):
    """Loads a library of which the tests see that it was loaded."""

    prepared: ClassVar[list[str]] = []

    def prepare(self, experts: ExpertWeights, problem: MoEProblem) -> Call:
        self.prepared.append(self.name)
        raise RuntimeError("the library does not load")


@pytest.mark.slow
def test_workers_compile_while_this_process_loads_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    Noted.prepared.clear()
    monkeypatch.setitem(COMPILING, "naive_loop", COMPILING["vllm"])
    with registered(killed="tests.support.calibration_faults:KilledBackend"):
        wanted = plan(*backends_of(CPU, "reference", "killed"), tokens=TOKENS, baselines=(Noted(CPU),))
        failed = compile_plans([wanted], factory(CPU), CPU, torch.device("cpu"), set(), math.inf)
    assert Noted.prepared == ["naive_loop"]
    assert len([line for line in failed if line.startswith("killed at M=")]) == len(TOKENS)
    assert not [line for line in failed if line.startswith("reference")]
    jobs = jobs_of([plan(reference(), tokens=TOKENS)], factory(CPU), CPU, set())
    assert compiled_path(CPU).read_text().split() == sorted(job.digest for job in jobs)


@pytest.mark.parametrize(("tokens", "cores"), [(TOKENS[:-1], 4), (TOKENS, 1)], ids=["few jobs", "one core"])
def test_where_processes_gain_nothing_none_is_started(
    tokens: tuple[int, ...], cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "usable_cores", lambda: cores)
    wanted = plan(reference(), tokens=tokens)
    refused: Any = pytest.fail
    assert not compile_plans([wanted], factory(CPU), CPU, torch.device("cpu"), set(), math.inf, start_worker=refused)


def test_a_run_that_is_interrupted_while_it_compiles_measures_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds: list[float] = []

    def interrupted(*arguments: Any) -> list[str]:
        seconds.append(arguments[-1])
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_dispatch.benchmarks.sweep.compile_plans", interrupted)
    monkeypatch.setattr("moe_dispatch.benchmarks.sweep.present_device", lambda: torch.device("cuda:0"))
    monkeypatch.setattr("time.perf_counter", lambda: 100.0)
    sweep = Sweep(path, provenance(H200), deadline=130.0)
    with pytest.raises(KeyboardInterrupt):
        sweep.run([plan(*backends_of(H200, "triton_splitk"), dtypes=("bf16",))])
    assert seconds == [30.0]
    assert not path.exists()


def test_on_a_cpu_nothing_is_compiled_ahead(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_dispatch.benchmarks.sweep.compile_plans", pytest.fail)
    Sweep(path, provenance()).run([plan(reference(), tokens=(1,))])
    assert len(load([path])) == 1


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Triton's cache, empty."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("MOE_DISPATCH_CACHE_DIR", str(tmp_path / "moe_dispatch"))
    return tmp_path / "triton"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_what_was_compiled_ahead_is_what_runs(path: Path, caches: Path, dtype: DType) -> None:
    """The measuring process finds every kernel in Triton's cache: it adds none.

    It is a process of its own, as a user's is: what other tests replaced in kernels would change their keys here.
    """
    measuring = multiprocessing.get_context("spawn").Process(
        target=_measure_what_was_compiled, args=(path, caches, dtype)
    )
    measuring.start()
    measuring.join()
    assert measuring.exitcode == 0


def _measure_what_was_compiled(path: Path, caches: Path, dtype: DType) -> None:
    machine = Machine.inspect("cuda")
    names = [name for name in BACKENDS.names() if name.startswith(("triton", "gluon"))]
    layer = Workload("6,3,768,384", E=6, topk=3, K=768, N=384)
    wanted = plan(
        *backends_of(machine, *names), workload=layer, dtypes=(dtype,), tokens=(1, 17, 70, 300), modes=("graph",)
    )  # fmt: skip
    sweep = Sweep(path, provenance(machine))
    sweep._compile_ahead([wanted])
    assert not sweep.notes
    ahead = {each for each in caches.rglob("*") if each.suffix == ".cubin"}
    assert len(ahead) >= len(names)
    rows = sweep.run([wanted])
    assert rows and all(row.us for row in rows)  # noqa: PT018
    added = {each for each in caches.rglob("*") if each.suffix == ".cubin"} - ahead
    assert not added, sorted(each.name for each in added)
