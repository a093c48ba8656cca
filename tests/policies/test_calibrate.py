"""A real calibration on the CPU, among backends of which most fail."""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_dispatch.backend import BackendConfig
from moe_dispatch.dispatch.process import get_dispatcher, reset_dispatchers
from moe_dispatch.dispatch.quarantine import Quarantine
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine
from moe_dispatch.policies.calibrated import CalibratedPolicy
from moe_dispatch.policies.calibration import run as campaign
from moe_dispatch.policies.calibration import schedule as points
from moe_dispatch.policies.calibration import successive_halving as race
from moe_dispatch.policies.calibration.calibrate import CalibrationReport, calibrate
from moe_dispatch.policies.calibration.schedule import coarse_to_fine
from moe_dispatch.policies.calibration.worker import Worker
from moe_dispatch.policies.calibration.worker_process import NotPreparedError, WorkerProcess
from moe_dispatch.policies.measurements.schema import Layer, read_calibration
from moe_dispatch.problem import MoEProblem
from moe_dispatch.workloads import workload
from tests.support.calibration_faults import RightBackend
from tests.support.fakes import registered
from tests.support.simulated import H200, Device, Noise

TINY = "4,2,32,16"
TIMEOUT_S = 12.0  # a healthy first launch takes seconds where other tests share the cores


@dataclass(frozen=True)
class Fault:
    """A backend that fails, what the policy must record, and whether it kills."""

    name: str
    target: str
    says: str
    fatal: bool = False


FAULTS = (
    Fault("wrong", "WrongBackend", "relative error 0.5"),
    Fault("nan", "NanBackend", "relative error inf"),
    Fault("unstable", "UnstableBackend", "promised the same bits"),
    Fault("raising", "RaisingBackend", "no kernel image is available"),
    Fault("hungry", "HungryBackend", "out of memory"),
    Fault("hanging", "HangingBackend", f"hung: no answer within {TIMEOUT_S:.0f} s", fatal=True),
    Fault("exiting", "ExitingBackend", "exited with status 7", fatal=True),
    Fault("killed", "KilledBackend", "killed by SIGKILL", fatal=True),
    Fault("lost", "LostContextBackend", "lost the CUDA context", fatal=True),
)


# Long enough that what the call itself takes, on a host whose cores others hold, hardly counts.
UNIT_S = 0.002


class Timed(RightBackend):
    """Right, and takes the time that it is told to."""

    name = "timed"

    def seconds(self, M: int, config: BackendConfig) -> float:
        """Of one call."""
        raise NotImplementedError

    def run(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,
    ) -> Tensor:
        """See `Backend.run`."""
        end = time.perf_counter() + self.seconds(len(hidden_states), config)
        out = super().run(hidden_states, experts, topk_weights, topk_ids, config)
        time.sleep(max(0.0, end - time.perf_counter()))
        return out


class Steady(Timed):
    """One time for any number of tokens."""

    name = "steady"

    def seconds(self, M: int, config: BackendConfig) -> float:
        """See `Timed.seconds`."""
        return 6 * UNIT_S


class Growing(Timed):
    """Ahead of `Steady` below 8 tokens, behind it from there on."""

    name = "growing"

    def seconds(self, M: int, config: BackendConfig) -> float:
        """See `Timed.seconds`."""
        return UNIT_S * M


class Pace(BackendConfig):
    """How slow, in units of time; 0 is faster than any, and wrong."""

    pace: int = 1


class Tuned(Timed):
    """Twelve configurations, each slower than the one before, of which the fastest is wrong."""

    name = "tuned"
    config_type = Pace

    def configs(self, problem: MoEProblem) -> tuple[Pace, ...]:
        """See `Backend.configs`."""
        return tuple(Pace(pace=pace) for pace in range(12))

    def seconds(self, M: int, config: BackendConfig) -> float:
        """See `Timed.seconds`."""
        return UNIT_S * (1 + int(config.model_dump()["pace"]))

    def run(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,
    ) -> Tensor:
        """See `Backend.run`."""
        out = super().run(hidden_states, experts, topk_weights, topk_ids, config)
        return out if config.model_dump()["pace"] else out * 1.5


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Workers inherit it: threads that wait for each other take seconds where other processes hold the cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture
def timed() -> Iterator[None]:
    """Backends whose times are known."""
    with registered(RightBackend, Steady, Growing, Tuned):
        yield


@dataclass(frozen=True)
class Ran:
    """The calibration that every test here looks at."""

    report: CalibrationReport
    directory: Path


@pytest.fixture(scope="module")
def ran(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    directory = tmp_path_factory.mktemp("cache")
    targets = {fault.name: f"tests.support.calibration_faults:{fault.target}" for fault in FAULTS}
    targets["unimportable"] = "tests.no_such_module:Nothing"
    with registered(**targets):
        with pytest.MonkeyPatch.context() as patch:
            # On a busy host one first run may take so long that its candidate is out before it is looked at.
            patch.setattr(race, "LONG_US", math.inf)
            report = calibrate(
                [TINY], ["fp32"], tokens=[5], device="cpu", backends=["reference", "torch_grouped", *targets],
                timeout_s=TIMEOUT_S, directory=directory,
            )  # fmt: skip
        yield Ran(report, directory)


@pytest.fixture
def cache(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOE_DISPATCH_CACHE_DIR", str(ran.directory))
    return ran.directory


def problem(M: int = 5) -> MoEProblem:
    return workload(TINY).problem(M, "fp32", Machine.inspect("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_costs_its_candidate_only(ran: Ran, fault: Fault) -> None:
    one = next(one for one in ran.report.measured if one.candidate.backend == fault.name)
    assert one.measurement.score is None
    assert fault.says in (one.measurement.disqualified or "")


@pytest.mark.slow
def test_the_healthy_are_measured_and_right(ran: Ran) -> None:
    healthy = {one.candidate.backend: one.measurement for one in ran.report.measured if one.measurement.score}
    assert set(healthy) == {"reference", "torch_grouped"}, [
        (one.candidate.backend, one.measurement.disqualified) for one in ran.report.disqualified()
    ]
    assert all(set(one.us) == {"uniform", "dirichlet-4"} and (one.error or 0) < 1e-3 for one in healthy.values())


@pytest.mark.slow
def test_what_does_not_import_is_reported(ran: Ran) -> None:
    assert "No module named 'tests.no_such_module'" in ran.report.unavailable["unimportable"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_only_what_kills_is_quarantined(ran: Ran, fault: Fault) -> None:
    cause = Quarantine(Machine.inspect("cpu"), ran.directory).cause(fault.name, problem())
    assert (fault.says in cause) if fault.fatal else not cause


@pytest.mark.slow
def test_the_policy_ranks_by_what_was_measured(ran: Ran, cache: Path) -> None:
    choices = CalibratedPolicy(Machine.inspect("cpu")).rank(problem())
    assert {choice.backend for choice in choices} == {"reference", "torch_grouped"}
    assert "at M=5 (eager)" in choices[0].reason
    assert choices[0].us is not None


@pytest.mark.slow
def test_resume_measures_nothing_again(tmp_path: Path) -> None:
    arguments = {"tokens": [2], "device": "cpu", "backends": ["reference"], "directory": tmp_path}
    first = calibrate([TINY], ["fp32"], **arguments)
    again = calibrate([TINY], ["fp32"], resume=True, **arguments)
    assert len(first.measured) == 1
    assert not again.measured


@pytest.mark.slow
@pytest.mark.usefixtures("timed")
def test_a_resumed_calibration_knows_who_was_far_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A busy host may make the winners at 1 and 4 differ, and the boundary between them is 2.
    monkeypatch.setattr(points, "DISAGREE", math.inf)
    arguments = {"device": "cpu", "backends": ["tuned"], "routings": ["uniform"], "directory": tmp_path}
    calibrate([TINY], ["fp32"], tokens=[1, 4], **arguments)
    resumed = calibrate([TINY], ["fp32"], tokens=[1, 2, 4], resume=True, **arguments)
    assert {one.M for one in resumed.measured} == {2}
    assert {one.candidate.config["pace"] for one in resumed.measured} <= {1, 2}


@pytest.mark.slow
@pytest.mark.usefixtures("timed")
def test_the_winner_of_the_calibration_before_is_remembered(tmp_path: Path) -> None:
    arguments = {"tokens": [2], "device": "cpu", "backends": ["tuned"], "routings": ["uniform"], "directory": tmp_path}
    first = calibrate([TINY], ["fp32"], **arguments)
    again = calibrate([TINY], ["fp32"], **arguments)
    assert not [one for one in first.measured if one.measurement.incumbent]
    (incumbent,) = [one for one in again.measured if one.measurement.incumbent]
    assert incumbent.candidate.config == {"pace": 1}


@pytest.mark.slow
@pytest.mark.usefixtures("timed")
def test_where_a_run_is_long_the_hopeless_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "LONG_US", 100.0)
    report = calibrate([TINY], ["fp32"], tokens=[1], device="cpu", backends=["tuned"], directory=tmp_path)
    tuned = {one.candidate.config["pace"]: one.measurement for one in report.measured}
    for pace in range(5, 12):  # 1 takes two units and 5 takes 6
        (q1, us, q3) = tuned[pace].us["uniform"]
        assert q1 == us == q3
        assert (tuned[pace].score or 0.0) > 2 * (tuned[1].score or 0.0)
    assert "relative error 0.5" in (tuned[0].disqualified or "")


def test_a_worker_that_cannot_start_says_so() -> None:
    """It was the layer's weights that 'could not be made', for want of an assertion's words."""
    layer = Layer.of(workload(TINY).problem(1, "fp32", Machine.inspect("cpu")))
    with pytest.raises(NotPreparedError, match=r"could not start on cuda:99: InvalidInputError: device 'cuda:99'"):
        WorkerProcess("cuda:99", {}, TIMEOUT_S).layer(layer)


@pytest.mark.slow
def test_interruption_keeps_what_is_measured(tmp_path: Path) -> None:
    def stop_at_the_second(progress: object) -> None:
        if getattr(progress, "done", 0) == 1 and getattr(progress, "what", "") != "done":
            raise KeyboardInterrupt

    machine = Machine.inspect("cpu")
    report = calibrate(
        [TINY], ["fp32"], tokens=[1, 8], device="cpu", backends=["reference"], directory=tmp_path,
        on_progress=stop_at_the_second,
    )  # fmt: skip
    assert report.interrupted
    assert [point.M for point in read_calibration(report.path, machine).points] == [1]


@pytest.mark.slow
@pytest.mark.usefixtures("timed")
def test_where_the_winner_changes_the_tokens_between_are_measured(tmp_path: Path) -> None:
    report = calibrate(
        [TINY], ["fp32"], tokens=[1, 16], device="cpu", backends=["steady", "growing"], directory=tmp_path
    )
    (winners,) = report.winners().values()
    assert winners[1][0][0] == winners[4][0][0] == "growing"
    assert winners[16][0][0] == "steady"
    # 4 is the middle of 1 and 16; then the middle of 4 and 16 is asked, and what still differs is near.
    assert 8 in winners
    last = max(M for M, (winner, _) in winners.items() if winner[0] == "growing")
    first = min(M for M, (winner, _) in winners.items() if winner[0] == "steady")
    assert last < first <= 1.5 * last


@pytest.mark.slow
@pytest.mark.usefixtures("timed")
def test_halving_times_the_best_for_long_and_lets_nobody_win_unchecked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "LONG_US", 1e6)
    report = calibrate([TINY], ["fp32"], tokens=[1], device="cpu", backends=["tuned", "reference"], directory=tmp_path)
    tuned = {
        one.candidate.config["pace"]: one.measurement for one in report.measured if one.candidate.backend == "tuned"
    }
    assert set(tuned) == set(range(12))
    assert "relative error 0.5" in (tuned[0].disqualified or "")
    finalists = {pace for pace, one in tuned.items() if len(one.us) == 2}
    assert {1, 2} <= finalists <= set(range(1, 9))
    # The last were dropped after the first round: timed for a moment on one distribution, scored by it, not checked.
    for pace in (10, 11):
        assert set(tuned[pace].us) == {"uniform"}
        assert tuned[pace].error is None
        assert (tuned[pace].score or 0) > (tuned[1].score or 0)
    (winners,) = report.winners().values()
    checked = {one.candidate.identity: one.measurement.error for one in report.measured}
    assert checked[winners[1][0]] is not None
    # Every backend has a candidate that was found right, for the fallback.
    assert any(one.candidate.backend == "reference" and one.measurement.error is not None for one in report.measured)


@pytest.mark.slow
@pytest.mark.usefixtures("timed")
def test_between_near_neighbours_only_the_close_start_again(tmp_path: Path) -> None:
    report = calibrate(
        [TINY], ["fp32"], tokens=[1, 2, 4], device="cpu", backends=["tuned"], routings=["uniform"], directory=tmp_path
    )
    raced = {M: {one.candidate.config["pace"] for one in report.measured if one.M == M} for M in (1, 2, 4)}
    assert raced[1] == raced[4] == set(range(12))
    assert {1} <= raced[2] <= {1, 2}  # 2 takes one and a half times as long, and 0 is wrong


@pytest.mark.slow
@pytest.mark.usefixtures("timed")
def test_inputs_that_do_not_fit_skip_the_point_and_blame_nobody(tmp_path: Path) -> None:
    too_many = 1 << 38  # of 4096 columns in fp32: more bytes than an address space has
    report = calibrate(
        ["4,2,4096,16", "4,2,4096,32"], ["fp32"], tokens=[1, too_many], device="cpu", backends=["right"],
        directory=tmp_path,
    )  # fmt: skip
    assert [(one.layer.N, one.M, one.measurement.disqualified) for one in report.measured] == [
        (16, 1, None),
        (32, 1, None),
    ]
    assert len(report.skipped) == 2
    assert all(f"M={too_many} (eager): its inputs could not be made: out of memory" in one for one in report.skipped)


@pytest.mark.usefixtures("timed")
def test_a_backend_that_cannot_be_made_does_not_end_the_calibration(tmp_path: Path) -> None:
    class Unmakeable(RightBackend):
        name = "unmakeable"

        def __init__(self, machine: Machine) -> None:
            raise RuntimeError(f"its licence does not cover a {machine.device}")

    with registered(Unmakeable):
        report = calibrate(
            [TINY], ["fp32"], tokens=[1], device="cpu", backends=["unmakeable", "right"], directory=tmp_path, budget_s=0
        )
    assert list(report.unavailable) == ["unmakeable"]
    assert "its licence does not cover a cpu" in report.unavailable["unmakeable"]


@pytest.mark.slow
def test_a_process_goes_on_by_its_own_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_DISPATCH_CACHE_DIR", str(tmp_path))
    reset_dispatchers()

    def policy() -> str:
        choice = get_dispatcher("cpu").planner.explain(problem()).chosen
        assert choice is not None
        return choice.choice.policy

    arguments = {"tokens": [5], "device": "cpu", "backends": ["reference"], "routings": ["uniform"]}
    assert policy() == "rules"
    calibrate([TINY], ["fp32"], directory=tmp_path / "elsewhere", **arguments)
    assert policy() == "rules"
    calibrate([TINY], ["fp32"], budget_s=0.0, **arguments)
    assert policy() == "rules"
    calibrate([TINY], ["fp32"], **arguments)
    assert policy() == "calibrated"
    reset_dispatchers()


def test_a_described_machine_of_another_kind_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("the described machine is of the kind that is here")
    monkeypatch.setenv("MOE_DISPATCH_MACHINE", str(Path(__file__).parents[1] / "machines" / "h200.json"))
    with pytest.raises(InvalidInputError, match=r"describes a cuda machine, and what runs here is on cpu"):
        calibrate([TINY], ["bf16"], tokens=[1], directory=tmp_path)


def test_the_current_gpu_is_the_one_that_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is another process, whose current GPU is the first."""
    asked: list[str] = []

    def worker(device: str, *_: object) -> Device:
        asked.append(device)
        return Device(Noise(), 1)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(Machine, "inspect", lambda _device=None: H200)
    monkeypatch.setattr(campaign, "compile_ahead", lambda *_, **__: [])
    monkeypatch.setattr(campaign, "WorkerProcess", worker)
    for device in (None, "cuda", "cuda:0"):
        calibrate(["mixtral-8x7b"], tokens=[1], directory=tmp_path, device=device, budget_s=0.0)
    assert asked == ["cuda:1", "cuda:1", "cuda:0"]


def test_the_workers_gpu_is_its_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(Machine, "inspect", lambda _device=None: H200)
    assert Worker().start("cuda:1", {}) == {}
    assert current == [torch.device("cuda:1")]


def test_no_budget_measures_nothing_and_says_so(tmp_path: Path) -> None:
    report = calibrate(
        [TINY], ["fp32"], tokens=[1, 8], device="cpu", backends=["reference"], directory=tmp_path, budget_s=0.0
    )
    assert not report.measured
    assert "no time left for M of 1, 8" in report.skipped[0]


@pytest.mark.slow
@pytest.mark.usefixtures("timed")
def test_every_layer_is_measured_coarsely_before_any_is_finely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "COARSE", 2)
    visited: list[str] = []
    calibrate(
        [TINY, "4,2,32,32"], ["fp32"], tokens=[1, 2, 4], device="cpu", backends=["right"], directory=tmp_path,
        on_progress=lambda progress: visited.append(progress.what),
    )  # fmt: skip
    order = [(what.split()[3], what.split()[-1]) for what in visited if "M=" in what]
    assert order == [(f"N={N}", f"M={M}") for counts in ((1, 4), (2,)) for N in (16, 32) for M in counts]


@pytest.mark.slow
@pytest.mark.usefixtures("timed")
def test_what_is_chosen_between_takes_part_where_it_is_not_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"device": "cpu", "backends": ["tuned"], "routings": ["uniform"], "directory": tmp_path}
    calibrate([TINY], ["fp32"], tokens=[1, 4], **arguments)
    monkeypatch.setattr(Tuned, "configs", lambda *_: (Pace(pace=3), Pace(pace=4)))
    between = calibrate([TINY], ["fp32"], tokens=[2], **arguments)
    assert {one.candidate.config["pace"] for one in between.measured} == {1, 3, 4}


@pytest.mark.slow
@pytest.mark.usefixtures("timed")
def test_a_backend_that_is_no_fallback_is_neither_checked_nor_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "FALLBACK", 1.5)
    report = calibrate([TINY], ["fp32"], tokens=[1], device="cpu", backends=["steady", "growing"], directory=tmp_path)
    assert {one.candidate.backend for one in report.measured} == {"growing"}  # one unit, and steady takes 6


@pytest.mark.slow
def test_the_report_says_where_the_time_went(ran: Ran) -> None:
    assert {"start", "layer", "point", "launch", "check", "time"} <= set(ran.report.spent)
    assert sum(ran.report.spent.values()) <= ran.report.seconds


def test_coarse_to_fine_spans_the_range_first() -> None:
    order = coarse_to_fine([1, 2, 4, 8, 16])
    assert order[:3] == [1, 16, 4]
    assert sorted(order) == [1, 2, 4, 8, 16]


def test_the_worker_leaves_no_process(ran: Ran) -> None:
    pids = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    if not pids.exists():
        pytest.skip("this system does not list a process's children")
    commands = [Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8") for pid in pids.read_text().split()]
    assert not [command for command in commands if "policies.worker" in command]
