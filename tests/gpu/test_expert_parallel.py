"""What only two GPUs can show of expert parallelism: the exchanges on NCCL and on each other's memory."""

import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_exchange_gives_the_right_results_eagerly_and_in_replays() -> None:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    command += ["moe_dispatch.benchmarks.record.expert_parallel", "--tiny"]
    ended = subprocess.run([sys.executable, *command], check=False, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = [line for line in ended.stdout.splitlines() if line.startswith("tiny")]
    assert {tuple(line.split()[3:5]) for line in lines} == {
        ("eager", "gather"), ("graph", "gather"), ("eager", "alltoall"), ("eager", "direct"), ("graph", "direct"),
    }  # fmt: skip
