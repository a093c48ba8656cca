"""The command line as a user meets it: real commands, on this machine and on described ones."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_dispatch.cli import app
from moe_dispatch.dispatch.process import reset_dispatchers
from moe_dispatch.dispatch.quarantine import Quarantine
from moe_dispatch.machine import Machine
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import BACKENDS
from moe_dispatch.settings import VARIABLES, variables_table

RUNNER = CliRunner()
H200 = Machine(
    device="cuda",
    name="NVIDIA H200",
    capability=(9, 0),
    sms=132,
    memory_bytes=150_000_000_000,
    l2_bytes=62_914_560,
    shared_memory_per_block=232_448,
    driver="580.1",
    cuda="13.0",
    torch="2.11.0+cu130",
    triton="3.6.0",
    libraries={"vllm": "0.20.2", "deep_gemm": "2.5.0"},
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOE_DISPATCH_CACHE_DIR", str(tmp_path))
    reset_dispatchers()
    return tmp_path


@pytest.fixture
def h200(tmp_path: Path) -> Path:
    path = tmp_path / "h200.json"
    path.write_text(H200.model_dump_json(), encoding="utf-8")
    return path


def test_version() -> None:
    result = RUNNER.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.startswith("moe-dispatch ")


def test_the_installed_command_lists_its_commands() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("moe-dispatch"), "--help"], capture_output=True, text=True, check=True
    )
    for command in ("demo", "doctor", "explain", "calibrate", "fit", "bench"):
        assert command in done.stdout


def test_help_imports_no_foreign_backend() -> None:
    script = (
        "import sys; from moe_dispatch.cli import app\n"
        "heavy = {'vllm', 'deep_gemm', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.usefixtures("cache")
def test_doctor_names_every_backend_within_80_columns() -> None:
    result = RUNNER.invoke(app, ["doctor"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    for name in BACKENDS.names():
        assert name in result.output
    assert max(map(len, result.output.splitlines())) <= 80


@pytest.mark.usefixtures("cache")
def test_doctors_machine_can_be_read_back(tmp_path: Path) -> None:
    report = json.loads(RUNNER.invoke(app, ["doctor", "--json"]).stdout)
    path = tmp_path / "here.json"
    path.write_text(json.dumps(report["machine"]), encoding="utf-8")
    assert Machine.load(path).fingerprint == report["fingerprint"]
    by_name = {backend["name"]: backend for backend in report["backends"]}
    assert "fp8" in by_name["reference"]["dtypes"]


@pytest.mark.usefixtures("cache")
def test_doctor_probes_against_fp32() -> None:
    report = json.loads(RUNNER.invoke(app, ["doctor", "--json", "--probe"]).stdout)
    reference = next(backend for backend in report["backends"] if backend["name"] == "reference")
    assert set(reference["probe"]) == {"bf16", "fp16", "fp32", "fp8"}
    assert all(text.startswith("ok, error") for text in reference["probe"].values()), reference["probe"]


def test_doctor_shows_and_lifts_the_quarantine(cache: Path) -> None:
    machine = Machine.inspect("cpu")
    problem = MoEProblem(M=4, K=64, N=64, E=4, topk=2, device="cpu", capability=None)
    Quarantine(machine, cache).bar("torch_grouped", problem, "it fell over", fatal=True)
    assert "it fell over" in RUNNER.invoke(app, ["doctor"], env={"COLUMNS": "200"}).output
    assert "lifted: 1 entry" in RUNNER.invoke(app, ["doctor", "--reset"]).output
    assert Quarantine(machine, cache).entries() == ()


def test_a_quarantine_that_cannot_be_lifted_is_one_message(cache: Path) -> None:
    machine = Machine.inspect("cpu")
    problem = MoEProblem(M=4, K=64, N=64, E=4, topk=2, device="cpu", capability=None)
    Quarantine(machine, cache).bar("torch_grouped", problem, "it fell over", fatal=True)
    lock = next(cache.rglob("*.lock"))
    lock.unlink()
    lock.mkdir()  # root, who may write anywhere, cannot open it either
    result = RUNNER.invoke(app, ["doctor", "--reset"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: the quarantine cannot be lifted")
    assert str(cache) in result.stderr


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_explain_answers_for_a_described_machine(h200: Path, dtype: str) -> None:
    asked = ["explain", "--model", "deepseek-v3", "--dtype", dtype, "--tokens", "1,64,4096", "--machine", str(h200)]
    answers = json.loads(RUNNER.invoke(app, [*asked, "--json"]).stdout)
    assert [answer["problem"]["M"] for answer in answers] == [1, 64, 4096]
    for answer in answers:
        assert answer["machine"]["name"] == "NVIDIA H200"
        assert answer["problem"]["capability"] == [9, 0]
        assert answer["chosen"]["choice"]["backend"] != "reference"
    text = RUNNER.invoke(app, asked, env={"COLUMNS": "80"}).output
    assert "NVIDIA H200" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.usefixtures("cache")
def test_explain_full_prints_the_ranking(h200: Path) -> None:
    result = RUNNER.invoke(app, ["explain", "--tokens", "64", "--machine", str(h200), "--full"])
    assert "-> " in result.output
    assert "MoEProblem(M=64" in result.output


@pytest.mark.usefixtures("cache")
def test_graph_mode_reaches_the_problem(h200: Path) -> None:
    asked = ["explain", "--tokens", "1", "--mode", "graph", "--machine", str(h200), "--json"]
    (answer,) = json.loads(RUNNER.invoke(app, asked).stdout)
    assert answer["problem"]["mode"] == "graph"
    assert answer["chosen"]["choice"]["backend"] != "reference"  # which cannot be captured


@dataclass(frozen=True)
class Mistake:
    """A command line that cannot work, and what its message must name."""

    arguments: tuple[str, ...]
    named: str

    def __str__(self) -> str:
        return " ".join(self.arguments)


@pytest.mark.parametrize(
    "mistake",
    [
        Mistake(("explain", "--model", "no-such-model"), "no-such-model"),
        Mistake(("explain", "--tokens", "1,many"), "1,many"),
        Mistake(("explain", "--tokens", "0"), "positive numbers"),
        Mistake(("explain", "--dtype", "int4"), "int4"),
        Mistake(("explain", "--mode", "lazy"), "lazy"),
        Mistake(("explain", "--machine", "/no/such/file.json"), "/no/such/file.json"),
        Mistake(("calibrate", "--model", "8,2,64,32", "--device", "gpu"), "cpu, cuda or cuda:N, got 'gpu'"),
        Mistake(("calibrate", "--model", "8,2,64,32", "--device", "cuda:99"), "'cuda:99' was asked for"),
        Mistake(("calibrate", "--model", "8,2,64,32", "--backend", "cutlass"), "no backend is called 'cutlass'"),
    ],
    ids=str,
)
def test_mistakes_are_one_message_and_exit_2(mistake: Mistake) -> None:
    result = RUNNER.invoke(app, mistake.arguments)
    assert result.exit_code == 2
    assert "error:" in result.stderr
    assert mistake.named in result.stderr
    assert "Traceback" not in result.stderr


def test_a_calibration_without_candidates_fails_and_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_dispatch.system.libraries.library_version", lambda _: "")  # nothing is installed
    asked = ["calibrate", "--model", "4,2,64,32", "--device", "cpu", "--tokens", "1", "--backend", "vllm_fused_moe"]
    result = RUNNER.invoke(app, asked, env={"COLUMNS": "200"})
    assert result.exit_code == 1, result.output
    assert "not here: vllm_fused_moe: vllm is not installed" in result.output
    assert "no backend here takes it" in result.stderr
    assert not (cache / "calibration").exists()


def test_a_described_machine_is_not_calibrated(h200: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_DISPATCH_MACHINE", str(h200))
    asked = ["calibrate", "--model", "4,2,64,32", "--device", "cpu", "--tokens", "1"]
    result = RUNNER.invoke(app, asked)
    assert result.exit_code == 2
    assert "describes a cuda machine" in result.stderr
    assert "--machine" in result.stderr


def test_the_table_of_variables_holds_every_variable_in_the_sources() -> None:
    import re

    import moe_dispatch

    package = Path(moe_dispatch.__file__).parent
    rooms = (package, *(package / name for name in ("backends", "policies", "benchmarks")))  # rglob follows no links
    sources = [source for room in rooms for source in room.rglob("*.py")]
    texts = {source.name: source.read_text(encoding="utf-8") for source in sources}
    named = {name for text in texts.values() for name in re.findall(r"MOE_DISPATCH_[A-Z_]*[A-Z]\b", text)}
    assert named == set(VARIABLES)
    readers = {name for name, text in texts.items() if re.search(r"environ.*MOE_DISPATCH_", text)}
    # The demo gives its calibration a folder of its own; the engine benchmark starts one engine with the plugin.
    assert readers == {"settings.py", "demo.py", "engine_vllm.py"}


def test_the_readme_holds_the_table_of_variables() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert variables_table() in readme, f"README.md must hold this table:\n{variables_table()}"
