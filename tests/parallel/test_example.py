"""The example of the docs, as torchrun would start it."""

import contextlib
import os
import runpy
import socket
from pathlib import Path

from tests.support.ranks import CONTEXT, PATIENCE

EXAMPLE = Path(__file__).parents[2] / "examples" / "expert_parallel.py"


def _run(rank: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "MOE_DISPATCH_CACHE_DIR": f"{folder}/cache",
        "MOE_DISPATCH_DISABLE": "torch_grouped",  # its kernels would run in Triton's interpreter, slowly
    }  # fmt: skip
    with Path(folder, f"out{rank}").open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_the_example_runs_on_two_ranks(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = [CONTEXT.Process(target=_run, args=(rank, port, str(tmp_path)), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = ((tmp_path / f"out{rank}").read_text(encoding="utf-8") for rank in (0, 1))
    assert "M=256 a rank: " in first
    assert "rank 0: [100, 512] from experts on 2 ranks" in first
    assert "measured as fastest by warm_up for M up to 256" in first
    assert second == "rank 1: [120, 512] from experts on 2 ranks\n"
