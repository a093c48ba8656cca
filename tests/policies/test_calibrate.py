"""What a calibration decides, on a simulated clock: which candidates start, which win, and what is kept."""

import functools
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moe_dispatch.backend import BackendConfig
from moe_dispatch.commands.app import app
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.dispatch.quarantine import Quarantine
from moe_dispatch.errors import InvalidInputError, PolicyFileError
from moe_dispatch.machine import Machine
from moe_dispatch.policies.calibration import calibrate as calibrate_module
from moe_dispatch.policies.calibration import run as run_module
from moe_dispatch.policies.calibration import schedule as schedule_module
from moe_dispatch.policies.calibration import successive_halving
from moe_dispatch.policies.calibration import worker as worker_module
from moe_dispatch.policies.calibration.calibrate import calibrate
from moe_dispatch.policies.calibration.compile_ahead import Job
from moe_dispatch.policies.calibration.report import CalibrationReport, Progress
from moe_dispatch.policies.calibration.request import CalibrationRequest
from moe_dispatch.policies.calibration.run import CalibrationRun
from moe_dispatch.policies.calibration.schedule import coarse_to_fine
from moe_dispatch.policies.calibration.worker import WorkerServer
from moe_dispatch.policies.calibration.worker_process import CandidateFailedError, Worker, WorkerDiedError
from moe_dispatch.policies.measurements.schema import LayerShape, read_calibration
from moe_dispatch.problem import MoEProblem
from moe_dispatch.workloads import workload
from tests.support.calibration_faults import RightBackend
from tests.support.fakes import Honest, registered
from tests.support.simulated import H200, Run, SimulatedWorker

TINY = "4,2,32,16"
CPU = Machine.inspect("cpu")
UNIT_US = 100.0


class Constant(RightBackend):
    """One time for any number of tokens."""

    name = "constant"


class Growing(RightBackend):
    """Ahead of `Constant` below 6 tokens, behind it from there on."""

    name = "growing"


class Pace(BackendConfig):
    """Time in units; the configuration with pace 0 is the fastest, and wrong."""

    pace: int = 1


class Tuned(RightBackend):
    """Twelve configurations, each slower than the one before, of which the fastest is wrong."""

    name = "tuned"
    config_type = Pace

    def configs(self, problem: MoEProblem) -> tuple[Pace, ...]:
        return tuple(Pace(pace=pace) for pace in range(12))


def time_of(run: Run) -> float:
    units = {"constant": 6.0, "growing": float(run.M), "tuned": 1.0 + pace_of(run.config)}
    return UNIT_US * units.get(run.backend, 3.0)


def pace_of(config: Any) -> int:
    return int(config.get("pace", 0))


def error_of(run: Run) -> float:
    return 0.5 if run.backend == "tuned" and not pace_of(run.config) else 1e-6


@pytest.fixture(autouse=True)
def backends() -> Iterator[None]:
    with registered(RightBackend, Constant, Growing, Tuned):
        yield


def layer(N: int = 16) -> LayerShape:
    return LayerShape.of(workload(f"4,2,32,{N}").problem(1, "fp32", CPU))


def request(**changes: Any) -> CalibrationRequest:
    return CalibrationRequest(**{"machine": CPU, "device": torch.device("cpu"), "layers": (layer(),), **changes})


def worker() -> SimulatedWorker:
    return SimulatedWorker(time_of, error_of=error_of)


@dataclass
class Calibrating:
    """Runs calibrations of one layer in one directory.

    Attributes:
        directory: Of the calibration file.
        worker: Measures in the next run.
        seen: Progress that was reported.
    """

    directory: Path
    worker: SimulatedWorker
    seen: list[Progress]

    def __call__(self, tokens: tuple[int, ...], *backends: str, **changes: Any) -> CalibrationReport:
        wanted = request(tokens=tokens, backends=backends, directory=self.directory, **changes)
        simulated = self.worker

        def start(_device: str, _backends: dict[str, str], timeout_s: float, deadline: float) -> Worker:
            simulated.timeout_s, simulated.deadline = timeout_s, deadline
            return simulated

        return CalibrationRun(wanted, self.seen.append, start_worker=start, clock=simulated.clock).measure()


@pytest.fixture
def simulate(tmp_path: Path) -> Calibrating:
    return Calibrating(tmp_path, worker(), [])


def paces(report: CalibrationReport, M: int | None = None) -> set[int]:
    """Configurations of `Tuned` that were measured."""
    return {pace_of(one.candidate.config) for one in report.measured if M in (None, one.M)}


def test_a_resumed_calibration_measures_the_backends_that_an_earlier_one_left_out(simulate: Calibrating) -> None:
    assert len(simulate((2,), "right").measured) == 1
    resumed = simulate((2,), "right", "reference", resume=True)
    assert {one.candidate.backend for one in resumed.measured} == {"right", "reference"}
    assert not simulate((2,), "right", resume=True).measured
    simulate.worker.joules_of = lambda _run: 2.0
    assert [one.joules for one in simulate((2,), "right", resume=True, energy_s=1.0).measured] == [2.0]
    assert not simulate((2,), "right", resume=True, energy_s=1.0).measured


def test_a_resumed_calibration_knows_which_candidates_were_far_behind(simulate: Calibrating) -> None:
    simulate((1, 4), "tuned")
    resumed = simulate((1, 2, 4), "tuned", resume=True)
    assert {one.M for one in resumed.measured} == {2}
    assert paces(resumed) <= {1, 2}


def test_the_winner_of_the_calibration_before_is_the_incumbent(simulate: Calibrating) -> None:
    assert not [one for one in simulate((2,), "tuned").measured if one.incumbent]
    (incumbent,) = [one for one in simulate((2,), "tuned").measured if one.incumbent]
    assert incumbent.candidate.config == {"pace": 1}


def test_where_a_run_is_long_hopeless_candidates_run_twice_only(
    simulate: Calibrating, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(successive_halving, "LONG_US", UNIT_US)
    report = simulate((1,), "tuned")
    tuned = {pace_of(one.candidate.config): one for one in report.measured}
    for pace in range(5, 12):  # pace 1 takes two units, and pace 5 takes six
        (q1, us, q3) = tuned[pace].us["uniform"]
        assert q1 == us == q3
        assert (tuned[pace].score or 0.0) > 2 * (tuned[1].score or 0.0)
    assert "relative error 0.5" in (tuned[0].disqualified or "")


def test_an_interruption_keeps_what_is_measured(tmp_path: Path) -> None:
    def stop_at_the_second(progress: Progress) -> None:
        if progress.done == 1 and progress.what != "done":
            raise KeyboardInterrupt

    wanted = request(tokens=(1, 8), backends=("right",), directory=tmp_path)
    report = CalibrationRun(wanted, stop_at_the_second, start_worker=lambda *_: worker()).measure()
    assert report.interrupted
    assert [point.M for point in read_calibration(report.path, CPU).points] == [1]


def test_where_the_winner_changes_the_tokens_between_are_measured(simulate: Calibrating) -> None:
    (winners,) = simulate((1, 16), "constant", "growing").winners().values()
    ahead = {M: winner[0] for M, (winner, _) in winners.items()}
    assert ahead == {1: "growing", 4: "growing", 6: "growing", 8: "constant", 16: "constant"}


def test_no_candidate_wins_unchecked_and_the_best_are_timed_for_longest(simulate: Calibrating) -> None:
    report = simulate((1,), "tuned", "right")
    tuned = {pace_of(one.candidate.config): one for one in report.measured if one.candidate.backend == "tuned"}
    assert set(tuned) == set(range(12))
    assert "relative error 0.5" in (tuned[0].disqualified or "")
    finalists = {pace for pace, one in tuned.items() if len(one.us) == 2}
    assert {1, 2} <= finalists <= set(range(1, 9))
    # Eliminated after the first round: timed for a moment on one distribution, scored by it, not checked.
    for pace in (10, 11):
        assert set(tuned[pace].us) == {"uniform"}
        assert tuned[pace].error is None
        assert (tuned[pace].score or 0) > (tuned[1].score or 0)
    (winners,) = report.winners().values()
    checked = {one.candidate.identity: one.error for one in report.measured}
    assert checked[winners[1][0]] is not None
    # Every backend has a candidate that was found right, as a fallback.
    assert any(one.candidate.backend == "right" and one.error is not None for one in report.measured)


def test_between_near_neighbours_only_close_candidates_start_again(simulate: Calibrating) -> None:
    report = simulate((1, 2, 4), "tuned")
    assert paces(report, 1) == paces(report, 4) == set(range(12))
    assert {1} <= paces(report, 2) <= {1, 2}  # pace 2 takes one and a half times as long, and pace 0 is wrong


def test_inputs_that_do_not_fit_skip_the_point_and_disqualify_no_candidate(simulate: Calibrating) -> None:
    simulate.worker.memory_tokens = 4
    report = simulate((1, 8), "right", layers=(layer(16), layer(32)))
    assert [(one.layer.N, one.M, one.disqualified) for one in report.measured] == [(16, 1, None), (32, 1, None)]
    assert len(report.skipped) == 2
    assert all("M=8 (eager): its inputs could not be made: out of memory" in line for line in report.skipped)


def test_a_backend_that_cannot_be_made_does_not_end_the_calibration(simulate: Calibrating) -> None:
    class Unmakeable(RightBackend):
        name = "unmakeable"

        def __init__(self, machine: Machine) -> None:
            raise RuntimeError(f"its licence does not cover a {machine.device}")

    with registered(Unmakeable):
        report = simulate((1,), "unmakeable", "right")
    assert list(report.unavailable) == ["unmakeable"]
    assert "its licence does not cover a cpu" in report.unavailable["unmakeable"]
    assert [one.candidate.backend for one in report.measured] == ["right"]


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """`calibrate` measures on a simulated worker."""
    run = functools.partial(CalibrationRun, start_worker=lambda *_: worker())
    monkeypatch.setattr(calibrate_module, "CalibrationRun", run)


def test_a_process_chooses_by_its_own_calibration_from_then_on(tmp_path: Path, simulated: None) -> None:
    def policy() -> str:
        chosen = get_dispatcher("cpu").planner.explain(workload(TINY).problem(5, "fp32", CPU)).chosen
        assert chosen is not None
        return chosen.choice.policy

    def measure(directory: Path | None = None) -> None:
        calibrate([TINY], ["fp32"], tokens=[5], device="cpu", backends=["reference"], directory=directory)

    assert policy() == "rules"
    measure(directory=tmp_path / "elsewhere")
    assert policy() == "rules"
    measure()
    assert policy() == "calibrated"


@pytest.fixture
def two_gpus(compiling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this process the second is the current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(Machine, "inspect", lambda _device=None: H200)


def test_the_current_gpu_is_the_one_that_is_measured(
    tmp_path: Path, two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker is another process, whose current GPU is the first."""
    devices: list[str] = []

    def start(device: str, *_: object) -> Worker:
        devices.append(device)
        return worker()

    monkeypatch.setattr(run_module, "compile_ahead", lambda *_, **__: [])
    monkeypatch.setattr(calibrate_module, "CalibrationRun", functools.partial(CalibrationRun, start_worker=start))
    for device in (None, "cuda", "cuda:0"):
        calibrate(["mixtral-8x7b"], tokens=[1], directory=tmp_path, device=device, budget_s=0.0)
    assert devices == ["cuda:1", "cuda:1", "cuda:0"]


def test_what_reads_the_whole_layer_is_not_compiled_on_placeholders(
    tmp_path: Path, two_gpus: None, simulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[tuple[str, int]] = []

    def noted(ahead: Iterable[Job], *_: object, **__: object) -> list[str]:
        jobs.extend((job.candidate.backend, job.M) for job in ahead)
        return []

    monkeypatch.setattr(run_module, "compile_ahead", noted)
    calibrate(["gpt-oss-120b"], ["mxfp4"], tokens=[1024, 65536], directory=tmp_path, budget_s=0.0)
    assert {M for name, M in jobs if name == "triton_persistent"} == {1024, 65536}
    assert {M for name, M in jobs if name == "gluon_hopper"} == {1024}  # with more rows it copies the layer
    assert not [M for name, M in jobs if name == "torch_grouped"]


def test_the_workers_gpu_is_its_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(Machine, "inspect", lambda _device=None: H200)
    assert WorkerServer().start("cuda:1", {}) == {}
    assert current == [torch.device("cuda:1")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
def test_in_fp8_a_candidate_is_compared_with_the_activations_that_its_backend_multiplies() -> None:
    server = WorkerServer()
    server.start("cpu", {})
    server.layer({"K": 64, "N": 32, "E": 2, "topk": 2, "dtype": "fp8", "act_dtype": "fp16"})
    quantizing, other = ("reference", {"compute_fp32": True}), ("triton_vector", {"rows": 32, "down_rows": 32})
    server.point(2, "eager", ["uniform"], [quantizing, other])
    for candidate in (0, 1):
        assert server.check(candidate, 2e-3, briefly=True)["error"] <= 2e-3


def test_every_layer_is_measured_coarsely_before_any_is_finely(
    simulate: Calibrating, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule_module, "COARSE", 2)
    simulate((1, 2, 4), "right", layers=(layer(16), layer(32)))
    order = [(shape.N, setup.M) for shape, setup in simulate.worker.points]
    assert order == [(N, M) for counts in ((1, 4), (2,)) for N in (16, 32) for M in counts]
    named = [progress.what for progress in simulate.seen if progress.what != "done"]
    assert named == [f"E=4 topk=2 K=32 N={N} fp32 M={M}" for N, M in order]
    assert [progress.done for progress in simulate.seen] == list(range(7))
    assert {progress.total for progress in simulate.seen} == {6}


def test_the_choice_between_measured_token_counts_takes_part_where_it_is_not_offered(
    simulate: Calibrating, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate((1, 4), "tuned")
    monkeypatch.setattr(Tuned, "configs", lambda *_: (Pace(pace=3), Pace(pace=4)))
    assert paces(simulate((2,), "tuned")) == {1, 3, 4}


def test_a_backend_that_is_no_fallback_is_neither_checked_nor_kept(
    simulate: Calibrating, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []

    def record(run: Run) -> float:
        checked.append(run.backend)
        return 1e-6

    monkeypatch.setattr(successive_halving, "FALLBACK", 1.5)
    monkeypatch.setattr(successive_halving, "FINALISTS", 1)
    simulate.worker.error_of = record
    report = simulate((1,), "constant", "growing")  # one unit, and constant takes six
    assert {one.candidate.backend for one in report.measured} == set(checked) == {"growing"}


def test_candidates_are_sent_once_per_point_and_named_by_their_index(simulate: Calibrating) -> None:
    simulate((1,), "tuned")
    ((_, setup),) = simulate.worker.points
    assert [candidate.config for candidate in setup.candidates] == [{"pace": pace} for pace in range(12)]


def test_the_budget_ends_a_point_that_takes_longer(simulate: Calibrating) -> None:
    simulate.worker.prepare_s = 3.0  # of a layer, and of each point
    report = simulate((1, 2, 4), "right", budget_s=10.0)
    assert simulate.worker.clock.now == 10.0
    assert [one.M for one in report.measured] == [1, 4]
    assert report.skipped == [f"{layer()}: no time left for M of 2; --resume measures them"]
    assert not report.failure()


def test_a_budget_spent_before_anything_is_measured_is_a_failure(simulate: Calibrating) -> None:
    simulate.worker.prepare_s = 300.0
    report = simulate((1, 2), "right", budget_s=40.0)
    assert not report.measured
    assert "no time left for M of 1, 2" in report.skipped[0]
    assert "larger --budget" in report.failure()


def test_a_layer_beyond_the_memory_is_skipped_before_a_worker_starts(simulate: Calibrating) -> None:
    large = LayerShape.of(workload("100000,8,7168,2048").problem(1, "bf16", CPU))
    report = simulate((1,), "right", layers=(large,))
    assert not simulate.worker.points
    assert "its weights need" in report.skipped[0]
    assert "where memory is short" in report.failure()


def test_a_calibration_in_which_every_candidate_is_disqualified_is_a_failure(simulate: Calibrating) -> None:
    simulate.worker.error_of = lambda _: 0.5
    report = simulate((1,), "right", "constant")
    assert len(report.disqualified()) == 2
    assert "every candidate was disqualified" in report.failure()


def test_a_resumed_calibration_with_nothing_left_is_no_failure(simulate: Calibrating) -> None:
    simulate((1,), "right")
    report = simulate((1,), "right", resume=True)
    assert (report.known, report.failure()) == (1, "")


def test_the_last_resort_is_never_barred_and_a_bar_on_it_is_not_obeyed(simulate: Calibrating) -> None:
    problem = layer().problem(1, CPU)
    Quarantine(CPU, simulate.directory).bar("reference", problem, "an older version did this", fatal=True)
    simulate.worker.dies = lambda run: WorkerDiedError("killed by SIGKILL") if run.M == 2 else None
    report = simulate((1, 2), "reference", "right")
    assert {(one.M, one.candidate.backend) for one in report.measured if one.score} == {(1, "reference"), (1, "right")}
    quarantine = Quarantine(CPU, simulate.directory)
    assert {entry.backend for entry in quarantine.entries() if "SIGKILL" in entry.cause} == {"right"}


@pytest.mark.parametrize(("machine", "barred"), [(CPU, False), (H200, True)], ids=("on a CPU", "on a device"))
def test_slow_is_not_fatal_on_a_cpu(tmp_path: Path, machine: Machine, *, barred: bool) -> None:
    device = torch.device("cuda:0" if machine is H200 else "cpu")
    shape = LayerShape.of(workload(TINY).problem(1, "bf16", machine))
    wanted = request(
        machine=machine, device=device, layers=(shape,), tokens=(1,), backends=("slow",), directory=tmp_path
    )

    class Slow(Honest):
        name = "slow"

    slow = SimulatedWorker(time_of, dies=lambda _: WorkerDiedError("no answer within 60 s", timed_out=True))
    with registered(Slow):
        report = CalibrationRun(wanted, start_worker=lambda *_: slow).measure()
        assert [one.disqualified for one in report.measured] == ["no answer within 60 s"]
        assert bool(Quarantine(machine, tmp_path).entries()) == barred


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_measured(simulate: Calibrating) -> None:
    simulate.directory = Path("/proc/moe_dispatch")
    with pytest.raises(PolicyFileError, match=r"cannot be written to /proc/.*MOE_DISPATCH_CACHE_DIR"):
        simulate((1,), "right")
    assert not simulate.worker.points


@pytest.mark.parametrize("failure", [CandidateFailedError("raised NVMLError"), WorkerDiedError("killed by SIGKILL")])
def test_a_finalist_without_an_energy_costs_no_other_its_own(
    simulate: Calibrating, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def joules(run: Run) -> float:
        if run.backend == "growing":
            raise failure
        return 2.0 if run.backend == "right" else 8.0 * pace_of(run.config)

    simulate.worker.joules_of = joules
    report = simulate((2,), "growing", "right", "tuned", energy_s=1.0)
    measured = {(one.candidate.backend, pace_of(one.candidate.config)): one for one in report.measured}
    assert [measured[each].joules for each in (("growing", 0), ("right", 0), ("tuned", 1))] == [None, 2.0, 8.0]
    died = isinstance(failure, WorkerDiedError)
    assert (measured["growing", 0].score is None) == died
    assert ("no energy of growing at M=2" in caplog.text) != died
    assert {one.joules for one in read_calibration(report.path, CPU).measurements()} == {None, 2.0, 8.0, 16.0}


def test_a_worker_measures_energy_by_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "energy_meter", lambda _device: itertools.count(1.0).__next__)
    server = WorkerServer()
    server.start("cpu", {})
    server.layer(layer().model_dump())
    server.point(2, "eager", ["uniform", "dirichlet-4"], [("reference", {})])
    assert 0 < server.energy(0, 1e-3)["joules"] <= 1 / 4  # a tick per reading; two inputs of each distribution a pass


def test_coarse_to_fine_spans_the_range_first() -> None:
    order = coarse_to_fine([1, 2, 4, 8, 16])
    assert order[:3] == [1, 16, 4]
    assert sorted(order) == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens": ()}, "at least one of its tokens"),
        ({"tokens": (0, 1)}, "tokens must be at least 1, got 0"),
        ({"routings": ("round-robin",)}, "routings must be among uniform.*got round-robin"),
        ({"modes": ("graph",)}, "modes must be among eager here, got graph; a graph needs CUDA"),
        ({"most_configs": 0}, "most_configs must be at least 1, got 0"),
        *(
            ({"timeout_s": seconds}, "timeout_s must be a positive number of seconds")
            for seconds in (0.0, -1.0, math.nan, math.inf)
        ),
        *(
            ({name: seconds}, f"{name} must be a number of seconds, at least 0")
            for name in ("budget_s", "energy_s")
            for seconds in (-1.0, math.nan, math.inf)
        ),
    ],
    ids=str,
)
def test_a_request_is_checked_once(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        request(**change)


def command(*options: str, status: int = 0) -> Any:
    result = CliRunner().invoke(app, ["calibrate", "--model", TINY, "--dtype", "fp32", "--device", "cpu", *options])
    assert result.exit_code == status, result.output
    return result


def test_the_command_fails_where_nothing_is_measured() -> None:
    result = command("--budget", "0.001", status=1)
    assert "give a larger --budget" in " ".join(result.stderr.split())
    assert "calibrated:" not in result.stdout


def test_the_layer_of_one_gpu_is_calibrated_under_tensor_parallelism(simulated: None) -> None:
    result = command("--tp", "2", "--tokens", "4", "--backend", "right", "--json")
    (winner,) = json.loads(result.stdout)["winners"]
    assert "N=8" in winner["layer"]  # of 16


def test_the_command_prints_lines_of_progress_where_no_terminal_is(simulated: None) -> None:
    result = command("--tokens", "1,4", "--backend", "right")
    assert "0/2 E=4 topk=2 K=32 N=16 fp32 M=1" in " ".join(result.stderr.split())
    assert "calibrated: 2 measurements at 2 points" in " ".join(result.stdout.split())


def test_the_command_prints_energies_where_a_counter_is(simulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = ("--tokens", "4", "--backend", "right", "--energy", "1")
    assert "energy is measured on NVIDIA GPUs only" in " ".join(command(*measure, status=2).stderr.split())
    monkeypatch.setattr(calibrate_module, "energy_meter", lambda _: lambda: 0.0)
    assert re.search(r"energy per token.* 250 mJ", command(*measure).stdout, re.DOTALL)
