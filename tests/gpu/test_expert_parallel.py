"""What only two GPUs can show of expert parallelism: the exchanges on NCCL and on each other's memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def torchrun(*arguments: str) -> str:
    """What a module prints that two processes run, one on each GPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", *arguments]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_every_exchange_gives_the_right_results_eagerly_and_in_replays(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    division = ("--division", "experts", "--division", "columns")
    record = "moe_dispatch.benchmarks.record.expert_parallel"
    torchrun(record, "--tiny", *division, "--replays", "10000", "--out", str(out))
    rows = [row for row in map(json.loads, out.read_text().splitlines()) if "exchange" in row]
    both = {(mode, name) for mode in ("eager", "graph") for name in ("gather", "direct", "by hand", "chosen")}
    ran = {(row["division"], row["mode"], row["exchange"]) for row in rows}
    by_both = {(division, *each) for division in ("experts", "columns") for each in both}
    assert ran == by_both | {("experts", "eager", "alltoall")}
    for row in rows:
        if row["exchange"] == "chosen":
            assert row["alike"], row
        elif row["mode"] == "graph":
            assert row["like_eager"], row
            assert row["changed_replays"] == 0, row
        else:
            assert (row["host_syncs"] > 0) == (row["exchange"] == "alltoall"), row
