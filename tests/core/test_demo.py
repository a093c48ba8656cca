"""The demo, run for real on this machine's CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers", minversion="5.17")

from moe_dispatch.commands.app import app

RUNNER = CliRunner()


@pytest.mark.slow
def test_the_demo_generates_the_models_own_tokens() -> None:
    # The installed command, as a user runs it: not in Triton's interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"COLUMNS": "120"}
    command = [str(Path(sys.executable).with_name("moe-dispatch")), "demo", "--device", "cpu", "--tokens", "4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 tokens equal the model's own" in done.stdout
    # Both token counts were measured, and each beside the naive loop.
    for M in (1, 64):
        assert re.search(rf"^\s*{M}\s+\w+\s+[\d.]+ [µm]?s\s+[\d.]+ [µm]?s", done.stdout, re.MULTILINE), done.stdout
    assert "needs a CUDA device" in done.stdout
    assert "at M=64 (eager)" in done.stdout, "the choice is this machine's measurement"


def test_a_model_that_is_no_qwen_is_refused() -> None:
    result = RUNNER.invoke(app, ["demo", "--device", "cpu", "--model", "gpt-oss-120b"])
    assert result.exit_code == 2
    assert "silu" in result.stderr


def test_an_unknown_device_is_refused() -> None:
    result = RUNNER.invoke(app, ["demo", "--device", "tpu"])
    assert result.exit_code == 2
    assert "must be cpu, cuda or cuda:N" in result.stderr
