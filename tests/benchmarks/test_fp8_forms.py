"""The record of FP8's forms, as far as it runs without a GPU."""

import json
from pathlib import Path

import pytest

from moe_dispatch.benchmarks.record import fp8_forms


@pytest.mark.parametrize("part", ["forms", "dequantized"])
def test_a_tiny_layer_gives_rows_with_their_origin(part: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    fp8_forms.main([part, "--tiny", "--out", str(out)])
    origin, *rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {"machine", "commit", "versions"} == set(origin["origin"])
    assert [row["M"] for row in rows] == [1, 8]
    for row in rows:
        assert row["failed"] == {}
        assert list(row["us"]) == list(fp8_forms.DTYPES[part])
        assert all("reference" in timed for timed in row["us"].values())
        assert row["over_last"] > 0


def test_ratios_are_of_our_fastest() -> None:
    us = {
        "fp8_channel": {"triton_splitk": 10.0, "triton_persistent": 20.0, "vllm": 40.0},
        "fp8": {"triton_splitk": 8.0},
    }
    assert fp8_forms.ratios(us) == {"over_last": 1.25, "over_vllm": 0.25}
    assert fp8_forms.ratios({"fp8": {"vllm": 1.0}, "bf16": {}}) == {}
