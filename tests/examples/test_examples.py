"""Every example runs and shows what it says."""

import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from moe_dispatch.backend import Backend
from moe_dispatch.machine import Machine
from moe_dispatch.policies.calibrated import CalibratedPolicy
from moe_dispatch.registry import ENTRY_POINT_GROUP, Registry
from moe_dispatch.testing import CASES, Precision, conform, make_inputs
from moe_dispatch.workloads import Workload
from tests.support.interpreter import leave_out_the_interpreter

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    leave_out_the_interpreter(monkeypatch)  # an example is for a user's machine
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_the_list_names_examples_and_a_test_names_each() -> None:
    listed = re.findall(r"\]\(([^)]+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    assert [name for name in listed if not (EXAMPLES / name).exists()] == []
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].rglob("*.py"))
    examples = {path.stem for path in EXAMPLES.iterdir()} - {"README", "__pycache__"}
    assert [name for name in sorted(examples) if name not in tests] == []


def test_generate_with_transformers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", minversion="5.17")
    output = run("generate_with_transformers.py", monkeypatch, capsys)
    assert "equal to the model's own: True" in output
    assert "'ran': 0" not in output.split("reference")[-1]


def test_own_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = run("own_model.py", monkeypatch, capsys)
    first, last = (float(text) for text in output.split("\n")[0].removeprefix("loss ").split(" -> "))
    assert last < 0.5 * first
    assert "gives the same: True" in output


def test_finetune_lora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = run("finetune_lora.py", monkeypatch, capsys)
    first, last = (float(text) for text in output.split("\n")[0].removeprefix("relative error ").split(" -> "))
    assert last < 0.5 * first
    assert "unchanged: True" in output
    assert "gives the same: True" in output


def test_fp8_checkpoint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors")
    output = run("fp8_checkpoint.py", monkeypatch, capsys)
    assert "E=4, K=128, N=256, dtype='fp8'" in output
    assert float(output.split("differs by ")[1]) < 0.01


def test_third_party_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = EXAMPLES / "third_party_backend"
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # What an installer writes beside the package, and where Python looks for entry points.
    metadata = tmp_path / "moe_einsum-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n", encoding="utf-8")
    lines = (f"{name} = {target}" for name, target in project["entry-points"][ENTRY_POINT_GROUP].items())
    (metadata / "entry_points.txt").write_text("\n".join([f"[{ENTRY_POINT_GROUP}]", *lines]), encoding="utf-8")
    for path in (tmp_path, folder):
        monkeypatch.syspath_prepend(path)
    registry: Registry[Backend] = Registry("backend", Backend, {}, ENTRY_POINT_GROUP)  # type: ignore[type-abstract]
    assert registry.names() == ("einsum",)
    machine, precision = Machine.inspect("cpu"), Precision("fp32", "fp32")
    backend = registry.load("einsum")(machine)
    conformed = 0
    for case in CASES.values():
        problem = case.problem(precision, machine)
        if not backend.unsupported_reasons(problem):
            conform(backend, backend.default_config(problem), make_inputs(case, precision, "cpu"))
            conformed += 1
    assert conformed > 10


@pytest.mark.slow
def test_fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("calibrates a CPU")
    command = tmp_path / "bin" / "moe-dispatch"
    command.parent.mkdir()
    command.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "from moe_dispatch.cli import app; app()" "$@"\n', encoding="utf-8"
    )
    command.chmod(0o755)
    out = tmp_path / "out"
    out.mkdir()
    outside = {variable: value for variable, value in os.environ.items() if variable != "TRITON_INTERPRET"}
    environment = outside | {
        "PATH": f"{command.parent}:{os.environ['PATH']}", "MOE_DISPATCH_CACHE_DIR": str(tmp_path / "container"),
        "PYTHONPATH": str(EXAMPLES.parent),
    }  # fmt: skip
    layer = ("--model", "4,2,64,32", "--dtype", "fp32", "--tokens", "1")
    backends = ("--backend", "reference", "--backend", "torch_grouped")
    script = EXAMPLES / "fleet" / "calibrate.sh"
    subprocess.run([script, out, *layer, *backends], env=environment, check=True, capture_output=True)
    machine = Machine.inspect("cpu")
    monkeypatch.setenv("MOE_DISPATCH_CALIBRATION_PATH", str(out))
    choices = CalibratedPolicy(machine).rank(Workload("tiny", E=4, topk=2, K=64, N=32).problem(1, "fp32", machine))
    assert choices


@pytest.mark.parametrize("name", ["fp8_checkpoint.py", "generate_with_transformers.py"])
def test_one_argument_of_two_shows_the_usage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers" if "transformers" in name else "safetensors")
    monkeypatch.setattr(sys, "argv", [name, "/models/DeepSeek-V3"])
    with pytest.raises(SystemExit, match=f"usage: {name}"):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
