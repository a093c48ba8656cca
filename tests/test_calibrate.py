"""A real calibration on the CPU, among backends of which most fail."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_dispatch.machine import Machine
from moe_dispatch.policies.calibrate import CalibrationReport, calibrate, coarse_to_fine
from moe_dispatch.policies.calibrated import CalibratedPolicy
from moe_dispatch.policies.schema import read_calibration
from moe_dispatch.problem import MoEProblem
from moe_dispatch.quarantine import Quarantine
from moe_dispatch.registry import BACKENDS
from moe_dispatch.workloads import workload

TINY = "4,2,32,16"
TIMEOUT_S = 8.0


@dataclass(frozen=True)
class Fault:
    """A backend that fails, what the policy must record, and whether it kills."""

    name: str
    target: str
    says: str
    lethal: bool = False


FAULTS = (
    Fault("wrong", "WrongBackend", "relative error 0.5"),
    Fault("nan", "NanBackend", "relative error inf"),
    Fault("unstable", "UnstableBackend", "promised the same bits"),
    Fault("raising", "RaisingBackend", "no kernel image is available"),
    Fault("hungry", "HungryBackend", "out of memory"),
    Fault("hanging", "HangingBackend", "hung: no answer within 8 s", lethal=True),
    Fault("exiting", "ExitingBackend", "exited with status 7", lethal=True),
    Fault("killed", "KilledBackend", "killed by SIGKILL", lethal=True),
    Fault("lost", "LostContextBackend", "lost the CUDA context", lethal=True),
)


@dataclass(frozen=True)
class Ran:
    """The calibration that every test here looks at."""

    report: CalibrationReport
    directory: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    directory = tmp_path_factory.mktemp("cache")
    for fault in FAULTS:
        BACKENDS.register(fault.name, f"tests.calibration_faults:{fault.target}")
    BACKENDS.register("unimportable", "tests.no_such_module:Nothing")
    names = ["reference", "torch_grouped", "unimportable", *(fault.name for fault in FAULTS)]
    try:
        report = calibrate(
            [TINY], ["fp32"], tokens=[5], device="cpu", backends=names, timeout_s=TIMEOUT_S, directory=directory
        )
        yield Ran(report, directory)
    finally:
        for name in names[2:]:
            BACKENDS.unregister(name)


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
    assert set(healthy) == {"reference", "torch_grouped"}
    assert all(set(one.us) == {"uniform", "dirichlet-4"} and (one.error or 0) < 1e-3 for one in healthy.values())


@pytest.mark.slow
def test_what_does_not_import_is_reported(ran: Ran) -> None:
    assert "No module named 'tests.no_such_module'" in ran.report.unavailable["unimportable"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_only_what_kills_is_quarantined(ran: Ran, fault: Fault) -> None:
    cause = Quarantine(Machine.inspect("cpu"), ran.directory).cause(fault.name, problem())
    assert (fault.says in cause) if fault.lethal else not cause


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


def test_no_budget_measures_nothing_and_says_so(tmp_path: Path) -> None:
    report = calibrate(
        [TINY], ["fp32"], tokens=[1, 8], device="cpu", backends=["reference"], directory=tmp_path, budget_s=0.0
    )
    assert not report.measured
    assert "no time left for M of 1, 8" in report.skipped[0]


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
