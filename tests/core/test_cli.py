"""The command line as a user meets it: real commands, on this machine and on described ones."""

import importlib.metadata
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import moe_dispatch
from moe_dispatch.commands import doctor_report
from moe_dispatch.commands.app import app
from moe_dispatch.dispatch.quarantine import Quarantine
from moe_dispatch.machine import Machine
from moe_dispatch.policies.calibrated import calibration_path
from moe_dispatch.policies.measurements.merge import save
from moe_dispatch.policies.measurements.schema import Candidate, LayerShape, Measurement
from moe_dispatch.policy import Choice, Policy
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import BACKENDS
from moe_dispatch.settings import VARIABLES, cache_dir, settings, variables_table
from tests.support.fakes import Honest, ranked, registered_policy
from tests.support.interpreter import leave_out_the_interpreter


def invoke(*words: str, columns: int | str = 80) -> Any:
    """The command line, in a terminal of some width."""
    return CliRunner().invoke(app, words, env={"COLUMNS": str(columns)})


@pytest.fixture
def cache() -> Path:
    return cache_dir()


def test_the_installed_command_lists_its_commands() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("moe-dispatch"), "--help"], capture_output=True, text=True, check=True
    )
    for command in ("demo", "doctor", "explain", "calibrate", "fit", "bench"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "arguments", [["--version"], ["-V"], ["--help"], ["-h"], ["explain", "-h"], ["no-such-command"]]
)
def test_what_needs_no_torch_does_not_import_it(arguments: list[str]) -> None:
    script = (
        "import sys; sys.argv[1:] = sys.argv[1:]; from moe_dispatch.cli import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'triton', 'vllm', 'deep_gemm', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'{heavy} imported' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("explain --model qwen3-3", "qwen3-30b-a3b"),
        ("explain --machine h2", "h200"),
        ("explain --dtype fp8_", "fp8_channel"),
        ("calibrate --backend triton_s", "triton_splitk"),
    ],
)
def test_the_shell_completes_names(words: str, completed: str) -> None:
    line = f"moe-dispatch {words}"
    variables = {"_MOE_DISPATCH_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": "3"}
    result = CliRunner().invoke(app, [], prog_name="moe-dispatch", env=variables)
    assert completed in result.output.split()


@pytest.mark.parametrize(
    "command", ["demo", "doctor", "explain", "calibrate", "fit", "bench", "calibration show"], ids=str
)
def test_every_command_that_reports_prints_json_on_request(command: str) -> None:
    assert "--json" in invoke(*command.split(), "--help", columns=100).output


@pytest.mark.parametrize(
    ("command", "said"),
    [("calibrate", "--model must be given. Without --dtype: bf16. Without --routing: uniform and dirichlet-4."),
     ("bench", ": deepseek-v3, qwen3-30b-a3b and mixtral-8x7b. Without --dtype: all. Without --routing: uniform.")],
)  # fmt: skip
def test_help_says_what_stands_for_a_list_that_is_left_out(command: str, said: str) -> None:
    assert said in invoke(command, "--help", columns=140).output


def test_the_version_is_that_of_the_distribution() -> None:
    assert moe_dispatch.__version__ == importlib.metadata.version("moe-dispatch")
    done = subprocess.run(
        [sys.executable, "-c", "from moe_dispatch.cli import app; app()", "--version"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"moe-dispatch {moe_dispatch.__version__}\n"


def test_every_public_name_is_there() -> None:
    assert set(moe_dispatch.__all__) <= set(dir(moe_dispatch))
    for name in moe_dispatch.__all__:
        assert getattr(moe_dispatch, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'forward'"):
        _ = moe_dispatch.forward  # type: ignore[attr-defined]  # that is the point


def _tables(text: str) -> list[str]:
    """Lines of tables: from a heading above a rule to the next line without columns."""
    lines = text.splitlines()
    rules = [number for number, each in enumerate(lines) if set(each) == {"─"}]
    return [each for rule in rules for each in itertools.takewhile(lambda row: "  " in row, lines[rule + 1 :])]


def test_doctor_names_every_backend_in_tables_of_80_columns() -> None:
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    tables = _tables(result.output)
    for name in BACKENDS.names():
        assert any(row.startswith(name) for row in tables)
    assert max(map(len, tables)) <= 80


@pytest.mark.parametrize("columns", ["9" * 5000, "²", "-1", "wide", ""])
def test_a_width_that_is_none_is_ignored(columns: str) -> None:
    for arguments in (["explain", "--machine", "h200"], ["no-such-command"], ["explain", "-h"]):
        result = invoke(*arguments, columns=columns)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == (2 if arguments == ["no-such-command"] else 0)


def test_doctor_says_for_each_library_what_works_and_how_to_get_it() -> None:
    report = json.loads(invoke("doctor", "--json").stdout)
    libraries = {library["library"]: library for library in report["libraries"]}
    assert {"torch", "triton", "vllm", "deep_gemm", "transformers"} <= set(libraries)
    assert libraries["torch"]["installed"] == report["machine"]["torch"]
    assert all(library["known"] for library in libraries.values())
    text = invoke("doctor", columns=250).output
    assert libraries["vllm"]["known"] in text


@pytest.mark.filterwarnings("ignore::moe_dispatch.MoEDispatchWarning")
@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("BACKEND", "deep_gemm", "every call that names no backend"),
        ("BACKEND", "deepgemm", "'deepgemm', which is no backend"),
        ("CACHE_DIR", "/" + "x" * 300, "cannot be written"),
        ("CACHE_DIR", "/proc/version/cache", "cannot be written"),
    ],
    ids=["backend that runs nothing here", "no such backend", "path that is too long", "cache below a file"],
)
def test_doctor_fails_where_calls_would_or_nothing_is_kept(
    variable: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"MOE_DISPATCH_{variable}", value)
    result = invoke("doctor")
    report = json.loads(invoke("doctor", "--json").stdout)
    assert result.exit_code == 1, result.output
    assert says in result.output
    assert any(says in problem for problem in report["problems"])


@pytest.mark.filterwarnings("always::moe_dispatch.MoEDispatchWarning")
def test_a_warning_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """It came with a line of typer's source."""
    monkeypatch.setenv("MOE_DISPATCH_DISABLE", "no_such")
    said = invoke("explain", "--model", "8,2,32,16", "--tokens", "1").stderr
    assert said.startswith("warning: MOE_DISPATCH_DISABLE names 'no_such', and no backend is called 'no_such'; known: ")
    assert said.count("\n") == 1


@pytest.mark.filterwarnings("ignore::moe_dispatch.MoEDispatchWarning")
def test_doctor_reports_a_damaged_calibration() -> None:
    path = calibration_path(Machine.inspect("cpu"))
    path.parent.mkdir(parents=True)
    path.write_text("[" * 1000)
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "a calibration is not used" in result.output


def test_doctor_names_what_the_search_path_leads_to_and_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_DISPATCH_CALIBRATION_PATH", "/nowhere/fleet.json:/nowhere/fleet")
    result = invoke("doctor", columns=250)
    assert result.exit_code == 0
    for path in ("/nowhere/fleet.json", f"/nowhere/fleet/{Machine.inspect('cpu').fingerprint}.json"):
        assert f"MOE_DISPATCH_CALIBRATION_PATH: there is no {path}" in result.output


@pytest.mark.parametrize(
    ("loaded", "cuda", "said"), [(True, None, True), (False, None, False), (True, "13.0", False)], ids=str
)
def test_doctor_names_a_torch_without_cuda_on_a_machine_with_a_gpu(
    loaded: bool, cuda: str | None, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every backend for GPUs says only that it needs one."""
    monkeypatch.setattr(doctor_report, "NVIDIA_DRIVER", tmp_path if loaded else tmp_path / "absent")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    output = invoke("doctor", "--device", "cpu", columns=200).output
    command = "pip install --force-reinstall --index-url https://pypi.org/simple 'torch==2.13.0'"
    assert (f"torch 2.13.0+cpu is built without CUDA: {command}" in output) is said


def test_doctor_names_a_variable_that_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_DISPATCH_BACKENDS", "reference")
    note = "MOE_DISPATCH_BACKENDS is no variable of moe_dispatch; did you mean MOE_DISPATCH_BACKEND?"
    assert note in invoke("doctor", columns=250).output
    monkeypatch.delenv("MOE_DISPATCH_BACKENDS")
    assert "is no variable" not in invoke("doctor", columns=250).output


def test_doctor_shows_what_was_calibrated() -> None:
    machine = Machine.inspect("cpu")
    layer = LayerShape(K=64, N=32, E=4, topk=2, dtype="fp32", act_dtype="fp32")
    versions = {"driver": "", "torch": machine.torch}
    candidate = Candidate(backend="torch_grouped", versions=versions, measured="2026-11-25T10:00:00+00:00")
    times = {"uniform": (1.0, 2.0, 3.0)}
    measured = [Measurement(layer, M, "eager", candidate, us=times, score=2.0) for M in (1, 64)]
    save(calibration_path(machine), measured, machine)
    text = invoke("doctor", columns=250).output
    (row,) = (each for each in _tables(text) if each.startswith("E=4 topk=2 K=64 N=32 fp32"))
    for shown in ("eager", "2 from 1 to 64", "uniform", "2026-11-25", f"torch {machine.torch}"):
        assert shown in row
    assert "driver" not in row  # a CPU has none


def test_doctors_machine_can_be_read_back(tmp_path: Path) -> None:
    report = json.loads(invoke("doctor", "--json").stdout)
    path = tmp_path / "here.json"
    for content in (report, report["machine"]):
        path.write_text(json.dumps(content), encoding="utf-8")
        assert Machine.load(path) == Machine.inspect()
    assert Machine.inspect().fingerprint == report["fingerprint"]
    by_name = {backend["name"]: backend for backend in report["backends"]}
    assert "fp8" in by_name["reference"]["dtypes"]


def test_doctor_probes_against_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_the_interpreter(monkeypatch)  # which takes a minute for the layers that the probe runs
    report = json.loads(invoke("doctor", "--json", "--probe").stdout)
    reference = next(backend for backend in report["backends"] if backend["name"] == "reference")
    assert set(reference["probe"]) == {"bf16", "fp16", "fp32", "fp8", "fp8_channel", "mxfp4"}
    assert all(text.startswith("ok, error") for text in reference["probe"].values()), reference["probe"]


@pytest.fixture
def quarantine(cache: Path) -> Quarantine:
    quarantine = Quarantine(Machine.inspect("cpu"), cache)
    problem = MoEProblem(M=4, K=64, N=64, E=4, topk=2, device="cpu", capability=None)
    quarantine.bar("torch_grouped", problem, "it fell over", fatal=True)
    return quarantine


def test_doctor_shows_and_lifts_the_quarantine(quarantine: Quarantine, cache: Path) -> None:
    assert "it fell over" in invoke("doctor", columns=200).output
    assert "lifted: 1 entry" in invoke("doctor", "--reset").output
    assert Quarantine(Machine.inspect("cpu"), cache).entries() == ()


def test_a_quarantine_that_cannot_be_lifted_is_one_message(quarantine: Quarantine, cache: Path) -> None:
    lock = next(cache.rglob("*.lock"))
    lock.unlink()
    lock.mkdir()  # which root cannot open either
    result = invoke("doctor", "--reset")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: the quarantine cannot be lifted")
    assert str(cache) in result.stderr


@pytest.mark.parametrize("us", [math.inf, math.nan])
def test_a_number_that_json_lacks_is_null(us: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed(Policy):
        name = "fixed"

        def rank(self, problem: MoEProblem) -> tuple[Choice, ...]:
            return (Choice("reference", "of another package", us=us),)

    monkeypatch.setenv("MOE_DISPATCH_POLICY", "fixed")
    settings.cache_clear()
    with registered_policy(Fixed):
        printed = invoke("explain", "--machine", "h200", "--tokens", "1", "--json").stdout
    (answer,) = json.loads(printed, parse_constant=pytest.fail)
    assert answer["chosen"]["choice"]["us"] is None


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_explain_answers_for_a_described_machine(dtype: str) -> None:
    asked = ["explain", "--model", "deepseek-v3", "--dtype", dtype, "--tokens", "1,64,4096", "--machine", "h200"]
    answers = json.loads(invoke(*asked, "--json").stdout)
    assert [answer["problem"]["M"] for answer in answers] == [1, 64, 4096]
    for answer in answers:
        assert answer["machine"]["name"] == "NVIDIA H200"
        assert answer["problem"]["capability"] == [9, 0]
        assert answer["chosen"]["choice"]["backend"] != "reference"
    text = invoke(*asked).output
    assert "NVIDIA H200" in text
    assert "means over the routings" in text, "a time that blends two routings says so"
    assert max(map(len, _tables(text))) <= 80


@pytest.mark.parametrize("name", ["a100-80gb", "b200", "h200", "rtx-5090"])
def test_explain_says_of_each_backend_either_a_time_or_why_not(name: str) -> None:
    tokens = ["1", "64", "4096"]
    options = ["--tokens", ",".join(tokens), "--machine", name]
    text = invoke("explain", *options).output
    rows = {row.split()[0]: row.split("  ")[1:] for row in _tables(text)}
    assert set(rows) == set(BACKENDS.names())
    cells = {backend: [cell.strip() for cell in row if cell.strip()] for backend, row in rows.items()}
    for column, _ in enumerate(tokens):
        assert sum(row[column].startswith("*") for row in cells.values()) == 1, "one backend runs each token count"
    refused = [each for each in text.partition("cannot run\n")[2].splitlines() if not each.startswith("note: ")]
    # A reason is one line, however wide the terminal is.
    assert all(each.startswith(BACKENDS.names()) for each in refused), refused
    for backend, row in cells.items():
        lines = [each for each in refused if each.startswith((f"{backend}:", f"{backend} at "))]
        assert bool(lines) == ("–" in row), f"{backend}: {row}, {lines}"


def test_a_backend_that_runs_is_not_listed_as_one_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where one of its configurations cannot be read, and another one runs."""
    ranking = Choice("honest", "measured", {"unknown": 1}), Choice("honest", "by default")
    monkeypatch.setenv("MOE_DISPATCH_POLICY", "fixed")
    settings.cache_clear()
    with ranked(Honest, ranking=ranking):
        text = invoke("explain", "--model", "4,2,64,32", "--dtype", "fp32", "--tokens", "1").output
    able, _, refused = text.partition("cannot run\n")
    assert "honest: by default" in able
    assert "honest" not in refused


def test_explain_full_prints_the_ranking() -> None:
    text = invoke("explain", "--tokens", "64", "--machine", "h200", "--full").output
    assert "-> " in text
    assert "MoEProblem(M=64" in text


def test_tensor_parallelism_and_the_mode_reach_the_problem() -> None:
    asked = ("explain", "--tokens", "1", "--mode", "graph", "--machine", "h200", "--json", "--tp", "4")
    (answer,) = json.loads(invoke(*asked).stdout)
    problem = {name: answer["problem"][name] for name in ("E", "topk", "K", "N", "mode")}
    assert problem == {"E": 128, "topk": 8, "K": 2048, "N": 192, "mode": "graph"}, "a share of the 768 columns"
    assert answer["chosen"]["choice"]["backend"] != "reference"  # which cannot be captured


def test_commands_run_where_nothing_is_set_up_and_stdout_takes_ascii_alone(tmp_path: Path) -> None:
    lines = [["explain", "--machine", "h200", "--tokens", "1"], ["doctor"], ["explain", "--model", "x\x1b[31m×"]]
    code = (
        "import contextlib, sys; from moe_dispatch.cli import app\n"
        f"for line in {lines}:\n"
        "    sys.argv[1:] = line\n"
        "    with contextlib.suppress(SystemExit): app()\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MOE_DISPATCH_")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False,
        env=environment | {"HOME": str(tmp_path), "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    printed = (done.stdout + done.stderr).decode("ascii")
    for word in ("NVIDIA H200", "torch_grouped", "no model is called"):
        assert word in printed
    assert "\x1b" not in printed


@pytest.mark.parametrize("command", [["explain", "--tokens", "1"], ["doctor"]], ids=str)
def test_what_a_library_prints_does_not_end_in_the_json(command: list[str], tmp_path: Path) -> None:
    """As vLLM prints its log."""
    (tmp_path / "talkative.py").write_text("print('INFO a library')\nraise ImportError('no GPU')\n")
    info = tmp_path / "talkative-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: talkative\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[moe_dispatch.backends]\ntalkative = talkative:Backend\n")
    done = subprocess.run(
        [sys.executable, "-m", "moe_dispatch.cli", *command, "--json"], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"},
    )  # fmt: skip
    assert "talkative" in json.dumps(json.loads(done.stdout))
    assert "INFO a library" in done.stderr


PRINTING = pytest.mark.parametrize(
    "options", [(), ("--json",), ("--full",), ("--help",), "--help", "--version", ""], ids=str
)


def run_into(stdout: int, options: tuple[str, ...] | str) -> tuple[int, str]:
    """Exit status and standard error of a command whose output goes there."""
    command = options.split() if isinstance(options, str) else ["explain", "--machine", "h200", "--tokens=1", *options]
    done = subprocess.run(
        [sys.executable, "-m", "moe_dispatch.cli", *command], stdout=stdout, stderr=subprocess.PIPE, check=False
    )
    os.close(stdout)
    return done.returncode, done.stderr.decode()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
@PRINTING
def test_a_full_disk_below_the_output_is_one_message(options: tuple[str, ...] | str) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    assert run_into(full, options) == (1, "error: the output cannot be written: No space left on device\n")


@PRINTING
def test_a_reader_that_has_left_ends_a_command_as_it_ends_other_programs(options: tuple[str, ...] | str) -> None:
    """Such as `head`: without a message, and with the status of SIGPIPE, which is neither success nor an error."""
    reading, writing = os.pipe()
    os.close(reading)
    assert run_into(writing, options) == (141, "")


def test_markup_and_escape_sequences_in_files_do_not_reach_the_terminal(tmp_path: Path) -> None:
    hostile = "[red]GPU[/red]\x1b]0;title\x07\u202e[link=http://x]:warning:\x9b31m"
    machine = Machine.load("h200").model_copy(
        update={"name": hostile, "torch": hostile, "libraries": {"vllm": hostile}}
    )
    path = tmp_path / "[bold]\x1b[2J.json"
    path.write_text(machine.model_dump_json(), encoding="utf-8")
    text = invoke("explain", "--machine", str(path), "--tokens", "1").output
    assert "[red]GPU[/red]" in text
    assert ":warning:" in text
    path.write_text("{", encoding="utf-8")
    broken = invoke("explain", "--machine", str(path))
    assert broken.exit_code == 2
    for shown in (text, broken.output):
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(shown)


CALIBRATE = ("calibrate", "--model", "8,2,64,32")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("explain", "--model", "no-such-model"), "no-such-model"),
        (("explain", "--tokens", "1,many"), "1,many"),
        (("explain", "--tokens", "0"), "positive numbers"),
        (("explain", "--tokens", str(1 << 36)), "up to 16777216"),
        (("explain", "--tokens", "²"), "positive numbers"),
        (("explain", "--tokens", "9" * 5000), "positive numbers"),
        (("explain", "--machine", "h100"), "did you mean h100-nvl or h100-pcie or h100-sxm?"),
        (("explain", "--model", "x" * 300), "no model is called"),
        (("explain", "--parallel", "2", "--mode", "graph"), "leave out --mode"),
        (("explain", "--parallel", "two"), "--parallel must be positive numbers"),
        (("explain", "--wire-fp8"), "give --parallel GPUS"),
        ((*CALIBRATE, "--timeout", "nan"), "--timeout must be a number"),
        ((*CALIBRATE, "--timeout", "0"), "--timeout must be a number"),
        ((*CALIBRATE, "--budget", "-1"), "--budget must be a number"),
        ((*CALIBRATE, "--routing", "skewed"), "routing distribution is called 'skewed'"),
        (("calibrate",), "needs --model"),
        ((*CALIBRATE, "--parallel"), "start them by `torchrun"),
        ((*CALIBRATE, "--parallel", "--quick"), "--parallel goes with"),
        (("bench", "--seconds", "nan"), "--seconds must be a number"),
        (("bench", "--budget", "-1"), "--budget must be a number"),
        (("bench", "--energy", "inf"), "--energy must be a number"),
        (("explain", "--tp", "5"), "must divide the 768 columns of qwen3-30b-a3b, got tp=5"),
        (("bench", "--suite", "scoreboard", "--tp", "2"), "--tp cannot be combined with --suite"),
        (("explain", "--dtype", "int4"), "int4"),
        (("explain", "--mode", "lazy"), "lazy"),
        (("explain", "--machine", "/no/such/file.json"), "/no/such/file.json"),
        ((*CALIBRATE, "--device", "gpu"), "cpu, cuda or cuda:N, got 'gpu'"),
        ((*CALIBRATE, "--device", "cuda:99"), "'cuda:99' was asked for"),
        ((*CALIBRATE, "--backend", "cutlass"), "no backend is called 'cutlass'"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_message_and_exit_2(arguments: tuple[str, ...], named: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "error:" in result.stderr
    assert named in result.stderr
    assert "Traceback" not in result.stderr


def test_a_calibration_without_candidates_fails_and_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_dispatch.system.libraries.library_version", lambda _: "")  # nothing is installed
    asked = ["calibrate", "--model", "4,2,64,32", "--device", "cpu", "--tokens", "1", "--backend", "vllm_fused_moe"]
    result = invoke(*asked, columns=200)
    assert result.exit_code == 1, result.output
    assert "cannot run: vllm_fused_moe: vllm is not installed" in result.output
    assert "no backend here can run it" in result.stderr
    assert not list(cache.glob("calibration/*.json"))


def test_a_described_machine_is_not_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_DISPATCH_MACHINE", "h200")
    result = invoke("calibrate", "--model", "4,2,64,32", "--device", "cpu", "--tokens", "1")
    assert result.exit_code == 2
    assert "describes a cuda machine" in result.stderr
    assert "--machine" in result.stderr


def test_the_table_of_variables_holds_every_variable_in_the_sources() -> None:
    package = Path(moe_dispatch.__file__).parent
    rooms = (package, *(package / name for name in ("backends", "policies", "benchmarks")))  # rglob follows no links
    sources = [source for room in rooms for source in room.rglob("*.py")]
    texts = {source.name: source.read_text(encoding="utf-8") for source in sources}
    named = {name for text in texts.values() for name in re.findall(r"MOE_DISPATCH_[A-Z_]*[A-Z]\b", text)}
    assert named == set(VARIABLES)
    readers = {name for name, text in texts.items() if re.search(r"environ.*MOE_DISPATCH_", text)}
    # The demo gives its calibration a folder of its own; the engine benchmark starts one engine with the plugin.
    assert readers == {"settings.py", "demo_run.py", "engine_vllm.py"}


def test_the_readme_holds_the_table_of_variables() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert variables_table() in readme, f"README.md must hold this table:\n{variables_table()}"
