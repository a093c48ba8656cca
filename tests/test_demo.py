"""The demo, run for real on this machine's CPU."""

import re

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers", minversion="5.17")

from moe_dispatch.cli import app

RUNNER = CliRunner()


@pytest.mark.slow
def test_the_demo_generates_the_models_own_tokens() -> None:
    result = RUNNER.invoke(app, ["demo", "--device", "cpu", "--tokens", "4"], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert "4 of 4 tokens equal the model's own" in result.output
    # Both token counts were measured, and each beside the naive loop.
    for M in (1, 64):
        assert re.search(rf"^\s*{M}\s+\w+\s+[\d.]+ [µm]?s\s+[\d.]+ [µm]?s", result.output, re.MULTILINE), result.output
    assert "needs a CUDA device" in result.output


def test_a_model_that_is_no_qwen_is_refused() -> None:
    result = RUNNER.invoke(app, ["demo", "--device", "cpu", "--model", "gpt-oss-120b"])
    assert result.exit_code == 2
    assert "silu" in result.stderr


def test_an_unknown_device_is_refused() -> None:
    result = RUNNER.invoke(app, ["demo", "--device", "tpu"])
    assert result.exit_code == 2
    assert "must be cpu or cuda" in result.stderr
