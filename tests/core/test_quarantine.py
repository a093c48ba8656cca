"""The quarantine: the last resort is never in it, one death is forgiven, nothing on disk breaks a call or is lost."""

import dataclasses
import datetime
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dispatch import Machine, MoEDispatchWarning, MoEProblem, moe_forward
from moe_dispatch.dispatch.process import get_dispatcher, reset_dispatchers
from moe_dispatch.dispatch.quarantine import OBEYED_FOR, SCHEMA, Quarantine, QuarantineEntry
from tests.core.test_dispatcher import FORKS, Call, make_call, ran
from tests.support.fakes import Honest, ranked
from tests.support.processes import exit_code, start_child

pytestmark = pytest.mark.usefixtures("fixed_policy", "no_grad")
MACHINE = Machine.load("h200")
CPU = Machine.inspect("cpu")
PROBLEM = MoEProblem(M=4, K=64, N=32, E=4, topk=2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file of a quarantine that holds one fatal entry."""
    Quarantine(MACHINE, tmp_path).bar("deep_gemm", PROBLEM, "crashed", fatal=True)
    (path,) = tmp_path.rglob("*.json")
    return path


def of_file(path: Path) -> Quarantine:
    """The quarantine of a later process."""
    return Quarantine(MACHINE, path.parents[1])


def cause(path: Path) -> str:
    """What a later process finds."""
    return of_file(path).cause("deep_gemm", PROBLEM)


def change(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    (entry,) = data["entries"]
    entry |= changes
    path.write_text(json.dumps(data))


def aged(days: float) -> str:
    return (datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days)).isoformat(timespec="seconds")


def test_the_last_resort_is_never_barred(call: Call, tmp_path: Path) -> None:
    quarantine = Quarantine(MACHINE, tmp_path)
    quarantine.bar("reference", PROBLEM, "too slow", fatal=True)
    assert not quarantine.cause("reference", PROBLEM)
    assert not quarantine.entries()


def test_an_entry_that_bars_the_last_resort_is_not_obeyed(call: Call) -> None:
    """As calibrations before this one wrote, which barred whatever exceeded their --timeout."""
    quarantine = get_dispatcher("cpu").quarantine
    problem = call[1].problem(6, 2, torch.float32, None)
    quarantine.bar("honest", problem, "too slow", fatal=True)
    (path,) = Path(os.environ["MOE_DISPATCH_CACHE_DIR"]).rglob("quarantine/*.json")
    change(path, backend="reference")
    reset_dispatchers()
    with ranked():
        moe_forward(*call)
        assert ran() == {"reference": 1}


def test_one_death_is_obeyed_for_a_day(path: Path) -> None:
    assert cause(path) == "crashed"
    day = OBEYED_FOR / datetime.timedelta(days=1)
    change(path, when=aged(0.9 * day))
    assert cause(path) == "crashed"
    change(path, when=aged(1.1 * day))
    assert not cause(path)


@pytest.mark.parametrize(
    "when", [aged(-1.1), aged(-3000), "9999-12-31T23:59:59+00:00"], ids=["a day", "years", "for ever"]
)
def test_a_clock_that_was_ahead_bars_no_backend_for_years(when: str, path: Path) -> None:
    """A machine that booted in the wrong year avoided what died there until that year came."""
    change(path, when=aged(-0.1))
    assert cause(path) == "crashed", "a clock may be corrected by less"
    change(path, when=when)
    assert not cause(path)


def test_two_deaths_are_obeyed_until_a_version_changes(path: Path) -> None:
    change(path, when=aged(30))
    of_file(path).bar("deep_gemm", PROBLEM, "crashed again", fatal=True)
    (entry,) = of_file(path).entries()
    assert entry.strikes == 2
    change(path, when=aged(300))
    assert cause(path) == "crashed again"


def test_another_version_ends_a_quarantine(path: Path) -> None:
    upgraded = MACHINE.model_copy(update={"triton": "99"})
    assert not Quarantine(upgraded, path.parents[1]).cause("deep_gemm", PROBLEM)


@pytest.mark.parametrize("when", ["yesterday", "", "2026-01-01T00:00:00"])
def test_a_time_that_tells_nothing_is_obeyed(when: str, path: Path) -> None:
    change(path, when=when)
    assert cause(path) == "crashed"


@pytest.mark.parametrize("fatal", [True, False])
def test_what_kills_eagerly_is_not_run_to_prepare_for_graphs(fatal: bool, tmp_path: Path) -> None:
    """And the other way round. What raises in a capture may run eagerly."""
    for problem in (PROBLEM, dataclasses.replace(PROBLEM, mode="graph")):
        other = dataclasses.replace(PROBLEM, mode="eager" if problem.mode == "graph" else "graph")
        quarantine = Quarantine(MACHINE, tmp_path / problem.mode)
        quarantine.bar("deep_gemm", problem, "crashed", fatal=fatal)
        for each in (quarantine, Quarantine(MACHINE, tmp_path / problem.mode)):
            assert bool(each.cause("deep_gemm", other)) == fatal
        assert quarantine.cause("deep_gemm", problem)


def test_a_survived_failure_does_not_replace_a_fatal_one(path: Path) -> None:
    of_file(path).bar("deep_gemm", PROBLEM, "raised", fatal=False)
    assert cause(path) == "crashed"


def test_a_quarantine_is_said_once(call: Call) -> None:
    problem = call[1].problem(6, 2, torch.float32, None)
    with ranked(Honest, "torch_grouped"):
        get_dispatcher("cpu").quarantine.bar("honest", problem, "crashed", fatal=True)
        reset_dispatchers()  # a later process
        with pytest.warns(MoEDispatchWarning, match="'honest' is avoided.*crashed.*--reset") as warned:
            moe_forward(*call)
        moe_forward(*call)
        moe_forward(*make_call(7))
        assert len(warned) == 1
        assert ran() == {"torch_grouped": 3}


@pytest.mark.parametrize("folder", [False, True])
def test_a_damaged_file_is_set_aside(folder: bool, path: Path) -> None:
    for number in (1, 2):
        path.write_text('{"schema_version": 1, "entr')
        if folder:
            path.unlink()
            path.mkdir()
        assert not cause(path)
        assert os.path.lexists(path.with_name(f"{path.name}.damaged-{number}"))
        assert not os.path.lexists(path)
        of_file(path).bar("deep_gemm", PROBLEM, "crashed", fatal=True)
        assert cause(path) == "crashed"


def test_a_newer_schema_is_left_as_it_is(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    newer = json.dumps({"schema_version": SCHEMA + 1, "entries": [], "more": 1})
    path.write_text(newer)
    quarantine = of_file(path)
    quarantine.bar("deep_gemm", PROBLEM, "crashed", fatal=True)
    assert quarantine.cause("deep_gemm", PROBLEM) == "crashed", "this process remembers by itself"
    assert path.read_text() == newer
    assert [entry.name for entry in path.parent.iterdir() if "damaged" in entry.name] == []
    assert "Use that one, or set MOE_DISPATCH_CACHE_DIR" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
def test_files_of_other_users_are_not_read(path: Path) -> None:
    os.chown(path, 12345, -1)
    assert not cause(path)
    marker = path.with_name(f"{path.stem}.1-1.running")
    entry = QuarantineEntry(
        backend="deep_gemm", problem=repr(PROBLEM.bucket), cause="planted", fatal=True, when=aged(0), versions={}
    )
    marker.write_text(entry.model_dump_json())
    os.chown(marker, 12345, -1)
    assert not cause(path)


def test_the_folder_is_this_users_alone(path: Path) -> None:
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.parent.chmod(0o755)  # as earlier versions left it
    of_file(path).bar("deep_gemm", PROBLEM, "crashed", fatal=True)
    assert path.parent.stat().st_mode & 0o777 == 0o700


@FORKS
def test_a_folder_that_may_not_be_searched_breaks_no_call(tmp_path: Path) -> None:
    """A container run as another user, whose home is another user's, of mode 0700."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o000)
    tmp_path.chmod(0o755)

    def call_as_another_user() -> None:
        os.environ["MOE_DISPATCH_CACHE_DIR"] = str(folder / "cache")
        if os.geteuid() == 0:
            os.setuid(12345)
        with ranked(Honest):
            moe_forward(*make_call(6))
            assert ran() == {"honest": 1}

    code = exit_code(start_child(call_as_another_user))
    folder.chmod(0o700)
    assert code == 0


@pytest.mark.parametrize("name", ["x" * 300, "file"])
def test_a_folder_that_cannot_exist_breaks_no_call(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    quarantine = Quarantine(MACHINE, tmp_path / name)
    with quarantine.first_run("deep_gemm", PROBLEM):
        pass
    quarantine.bar("deep_gemm", PROBLEM, "crashed", fatal=True)
    assert quarantine.cause("deep_gemm", PROBLEM) == "crashed"


def test_reset_lifts_what_it_can_read_and_sets_the_rest_aside(path: Path) -> None:
    assert of_file(path).reset() == 1
    path.write_text(json.dumps({"schema_version": SCHEMA + 1}))
    assert of_file(path).reset() == 0
    assert not cause(path)
    assert path.with_name(f"{path.name}.damaged-1").exists()


def test_a_marker_inside_another_has_a_name_of_its_own(tmp_path: Path) -> None:
    """A backend that runs another one; in one thread, or in the next one that gets its number."""
    quarantine = Quarantine(MACHINE, tmp_path)
    with quarantine.first_run("deep_gemm", PROBLEM), quarantine.first_run("honest", PROBLEM):
        assert len(list(tmp_path.rglob("*.running"))) == 2
    assert not list(tmp_path.rglob("*.running"))


def test_a_markers_name_that_is_taken_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a reboot, when process numbers start again."""
    monkeypatch.setattr("moe_dispatch.dispatch.quarantine._marker_numbers", iter([5, 6]))
    stale = tmp_path / "quarantine" / f"{MACHINE.fingerprint}.{os.getpid()}-5.running"
    stale.parent.mkdir()
    stale.write_text("of a dead process")
    with Quarantine(MACHINE, tmp_path).first_run("deep_gemm", PROBLEM):
        assert stale.read_text() == "of a dead process"


@pytest.mark.parametrize("content", [b"", b"{}", None], ids=repr)
def test_a_damaged_marker_is_set_aside(content: bytes | None, path: Path) -> None:
    marker = path.with_name(f"{path.stem}.1-1.running")
    if content is None:
        os.mkfifo(marker)
    else:
        marker.write_bytes(content)
    assert cause(path) == "crashed"
    assert not os.path.lexists(marker)
    assert os.path.lexists(f"{marker}.damaged-1") is (content != b"")


def test_a_marker_that_the_file_cannot_take_is_obeyed_and_stays(path: Path) -> None:
    entry = of_file(path).entries()[0]
    path.write_text(json.dumps({"schema_version": SCHEMA + 1}))
    marker = path.with_name(f"{path.stem}.1-1.running")
    marker.write_text(entry.model_dump_json())
    assert cause(path) == "crashed"
    assert marker.exists()


def die_in_a_first_run(machine: Machine, folder: Path) -> None:
    with Quarantine(machine, folder).first_run("deep_gemm", PROBLEM):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("machine", "said"), [(CPU, True), (MACHINE, False)], ids=["cpu", "h200"])
@FORKS
def test_a_death_in_a_fork_on_a_cpu_says_what_hangs_there(machine: Machine, said: bool, tmp_path: Path) -> None:
    """In torch, not in the backend: the threads that the parent computed with are not in its children."""
    assert exit_code(start_child(die_in_a_first_run, machine, tmp_path)) == -signal.SIGKILL
    (entry,) = Quarantine(machine, tmp_path).entries()
    assert ("torch.set_num_threads(1)" in entry.cause) is said
