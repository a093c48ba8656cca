"""Real worker processes, and backends of which most fail in them."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_dispatch.dispatch.quarantine import Quarantine
from moe_dispatch.machine import Machine
from moe_dispatch.policies.calibrated import CalibratedPolicy
from moe_dispatch.policies.calibration.calibrate import CalibrationReport, calibrate
from moe_dispatch.policies.calibration.worker_process import (
    BudgetSpentError,
    NotPreparedError,
    WorkerProcess,
    worker_environment,
)
from moe_dispatch.policies.measurements.schema import LayerShape
from moe_dispatch.workloads import workload
from tests.support import calibration_faults  # noqa: F401 - imported here, it is not tried in a process of its own
from tests.support.fakes import registered

TINY = "4,2,32,16"
TIMEOUT_S = 250.0  # generous for a first launch on a busy host
HANG_S = 3.0  # what hangs is given up after this
CPU = Machine.inspect("cpu")
PROBLEM = workload(TINY).problem(5, "fp32", CPU)


# Backends that fail, and what the report must say of each; those that take their process down.
FAULTS = {
    "wrong": ("WrongBackend", "relative error 0.5"),
    "nan": ("NanBackend", "relative error inf"),
    "unstable": ("UnstableBackend", "promised the same bits"),
    "raising": ("RaisingBackend", "no kernel image is available"),
    "hungry": ("HungryBackend", "out of memory"),
    "exiting": ("ExitingBackend", "exited with status 7"),
    "lost": ("LostContextBackend", "lost the CUDA context"),
}
FATAL = {"exiting", "lost"}


@dataclass(frozen=True)
class Ran:
    report: CalibrationReport
    directory: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    directory = tmp_path_factory.mktemp("cache")
    targets = {name: f"tests.support.calibration_faults:{target}" for name, (target, _) in FAULTS.items()}
    targets["unimportable"] = "tests.no_such_module:Nothing"
    with registered(**targets), pytest.MonkeyPatch.context() as patch:
        # Workers inherit it: threads that wait for each other take seconds where other processes hold the cores.
        patch.setenv("OMP_NUM_THREADS", "1")
        # On a busy host a first run may seem so long that its candidate is out before it is checked.
        patch.setattr("moe_dispatch.policies.calibration.successive_halving.HOPELESS", float("inf"))
        # Fallbacks are checked however slow they seem.
        patch.setattr("moe_dispatch.policies.calibration.successive_halving.FALLBACK", float("inf"))
        report = calibrate(
            [TINY], ["fp32"], tokens=[5], device="cpu", backends=["reference", "torch_grouped", *targets],
            timeout_s=TIMEOUT_S, directory=directory,
        )  # fmt: skip
        yield Ran(report, directory)


@pytest.mark.slow
def test_a_fault_costs_its_candidate_only(ran: Ran) -> None:
    reasons = {one.candidate.backend: one.disqualified or "" for one in ran.report.measured if one.score is None}
    assert set(reasons) == set(FAULTS)
    assert not {name: reason for name, reason in reasons.items() if FAULTS[name][1] not in reason}


@pytest.mark.slow
def test_healthy_backends_are_measured_and_right(ran: Ran) -> None:
    healthy = {one.candidate.backend: one for one in ran.report.measured if one.score}
    assert set(healthy) == {"reference", "torch_grouped"}
    assert all((one.error or 0) < 1e-3 for one in healthy.values())


@pytest.mark.slow
def test_a_backend_that_does_not_import_is_reported(ran: Ran) -> None:
    assert "No module named 'tests.no_such_module'" in ran.report.unavailable["unimportable"]


def test_what_hangs_or_exits_on_import_costs_itself_only(tmp_path: Path) -> None:
    """In this process its import would end or hang the calibration."""
    modules = {"hanging": "tests.support.hanging_module", "exiting": "tests.support.exiting_module"}
    with registered(**{name: f"{module}:Nothing" for name, module in modules.items()}):
        report = calibrate(
            [TINY], ["fp32"], tokens=[5], device="cpu", backends=["reference", *modules], timeout_s=HANG_S,
            budget_s=0.0, directory=tmp_path,
        )  # fmt: skip
    assert report.unavailable == {
        "hanging": f"the import of {modules['hanging']} did not end within {HANG_S:.0f} s",
        "exiting": f"the import of {modules['exiting']} ends its process with status 7",
    }


@pytest.mark.slow
def test_a_candidate_that_hangs_is_given_up(tmp_path: Path) -> None:
    with registered(hanging="tests.support.calibration_faults:HangingBackend"):
        report = calibrate(
            [TINY], ["fp32"], tokens=[5], device="cpu", backends=["hanging"], timeout_s=HANG_S, directory=tmp_path
        )
    (measured,) = report.measured
    assert f"too slow: no answer within {HANG_S:.0f} s" in (measured.disqualified or "")
    assert not Quarantine(CPU, tmp_path).entries()


@pytest.mark.slow
def test_only_a_fault_that_takes_the_process_down_is_quarantined(ran: Ran) -> None:
    quarantine = Quarantine(CPU, ran.directory)
    for name, (_, says) in FAULTS.items():
        cause = quarantine.cause(name, PROBLEM)
        assert (says in cause) if name in FATAL else not cause, name


@pytest.mark.slow
def test_the_policy_ranks_by_what_was_measured(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_DISPATCH_CACHE_DIR", str(ran.directory))
    choices = CalibratedPolicy(CPU).rank(PROBLEM)
    assert {choice.backend for choice in choices} == {"reference", "torch_grouped"}
    assert "at M=5 (eager)" in choices[0].reason
    assert choices[0].us is not None


@pytest.mark.slow
def test_the_report_says_where_the_time_went(ran: Ran) -> None:
    assert {"start", "layer", "point", "launch", "check", "time"} <= set(ran.report.spent)
    assert sum(ran.report.spent.values()) <= ran.report.seconds


@pytest.mark.slow
def test_a_calibration_leaves_no_process(ran: Ran) -> None:
    pids = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    if not pids.exists():
        pytest.skip("this system does not list a process's children")
    commands = [Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8") for pid in pids.read_text().split()]
    assert not [command for command in commands if "calibration.worker" in command]


def test_a_worker_that_cannot_start_says_so() -> None:
    with pytest.raises(NotPreparedError, match=r"could not start on cuda:99: InvalidInputError: device 'cuda:99'"):
        WorkerProcess("cuda:99", {}, TIMEOUT_S).layer(LayerShape.of(PROBLEM))


def test_a_module_in_the_working_directory_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executed = tmp_path / "executed"
    (tmp_path / "json.py").write_text(f"open({str(executed)!r}, 'w').close()\nfrom _json import *\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with contextlib.closing(WorkerProcess("cpu", {}, TIMEOUT_S)) as worker:
        worker.layer(LayerShape.of(PROBLEM))
    assert not executed.exists()


def test_a_worker_imports_what_its_parent_does_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a checkout, in which `python -c` has the working directory, and pytest's `pythonpath` a relative path."""
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", ["", "tests", *(path for path in sys.path if Path(path or ".").resolve() != root)])
    monkeypatch.setenv("TRITON_CACHE_DIR", "relative/cache")
    monkeypatch.setenv("MOE_DISPATCH_MACHINE", "h200")
    environment = worker_environment()
    paths = environment["PYTHONPATH"].split(os.pathsep)
    assert paths[0] == str(root / "tests")
    assert paths[-1] == str(root)  # after the standard library, which a checkout must not shadow
    assert environment["TRITON_CACHE_DIR"] == str(root / "relative/cache")
    assert environment["MOE_DISPATCH_MACHINE"] == "h200"
    monkeypatch.setenv("MOE_DISPATCH_MACHINE", "moe_dispatch/machines.json")
    assert worker_environment()["MOE_DISPATCH_MACHINE"] == str(root / "moe_dispatch/machines.json")


def test_the_budget_ends_a_worker_while_it_starts() -> None:
    worker = WorkerProcess("cpu", {}, TIMEOUT_S, deadline=time.monotonic())
    with pytest.raises(BudgetSpentError, match="into 'start'"):
        worker.layer(LayerShape.of(PROBLEM))


def test_weights_that_do_not_fit_are_not_allocated() -> None:
    """On a CPU the system would kill the process, or other ones, in the middle of it."""
    layer = LayerShape.of(workload("100000,8,7168,2048").problem(1, "bf16", CPU))
    with (
        contextlib.closing(WorkerProcess("cpu", {}, TIMEOUT_S)) as worker,
        pytest.raises(NotPreparedError, match=r"out of memory: MemoryError: the weights need \d+\.\d GiB, and"),
    ):
        worker.layer(layer)
