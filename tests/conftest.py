"""Every test starts with a fresh dispatcher, its own cache directory, and memory that is poisoned, not zero."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton: without a GPU kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers, and the processes that their tests start, share the cores already.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from moe_dispatch.dispatch.process import reset_dispatchers
from moe_dispatch.settings import settings
from tests.support.interpreter import correct_interpreter, quicken_interpreter

correct_interpreter()
quicken_interpreter()

if os.environ.get("MOE_DISPATCH_MACHINE"):
    collect_ignore = ["test_compile_ahead.py", "test_policy_files.py"]  # of this CPU, which is not described then

KEPT_BYTES = 1 << 30  # of device memory that a worker keeps after a test: the others need the rest
GARBAGE = 0x3F3F3F3F  # what fresh integer memory holds here: far outside every index range


def _bf16_products_kill() -> bool:
    """Whether a BF16 product ends a process on this CPU, as it does where a virtual machine only announces AMX."""
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or "amx_tile" not in flags.read_text():
        return False
    code = "import torch; a = torch.ones(64, 64, dtype=torch.bfloat16); a @ a"
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode < 0


# oneDNN reads this variable at its first product, and workers inherit it.
if "ONEDNN_MAX_CPU_ISA" not in os.environ and _bf16_products_kill():
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"


# A test function with fewer cases than this many times --every keeps all of them.
_LONG = 2


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every", type=int, default=1, metavar="N",
        help="of a test function with many cases run every N-th: where a release of a library is tested, not our code",
    )  # fmt: skip


def thin_out(items: list[pytest.Item], every: int) -> None:
    """Keep every N-th case of each test function with many of them, in place."""
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = [cases if len(cases) < _LONG * every else cases[::every] for cases in functions.values()]
    items[:] = [item for cases in kept for item in cases]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (every := config.getoption("--every")) > 1:
        thin_out(items, every)
    # Importing vLLM takes 20 s. `--dist worksteal` deals out runs of tests: in one run few workers import it.
    items.sort(key=lambda item: "vllm" in item.nodeid)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def _in_a_process_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@pytest.fixture(autouse=True)
def fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in ("BACKEND", "POLICY", "MINIMIZE", "DISABLE", "LOG_LEVEL"):
        monkeypatch.delenv(f"MOE_DISPATCH_{variable}", raising=False)
    monkeypatch.setenv("MOE_DISPATCH_CACHE_DIR", str(tmp_path / "cache"))
    settings.cache_clear()
    reset_dispatchers()
    grouped = _in_a_process_group()  # that a fixture of the whole module made
    yield
    settings.cache_clear()
    reset_dispatchers()
    if _in_a_process_group() and not grouped:
        torch.distributed.destroy_process_group()
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > KEPT_BYTES:
        torch.cuda.empty_cache()


@pytest.fixture
def fixed_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends are ranked as a test says (`tests.support.fakes.ranked`)."""
    monkeypatch.setenv("MOE_DISPATCH_POLICY", "fixed")
    settings.cache_clear()


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends answer as where kernels are compiled; Triton's interpreter would refuse BF16."""
    monkeypatch.setattr("moe_dispatch.backends.triton_common.features.interpreting", lambda: False)


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with values that must not be read: NaN, or integers far out of range."""
    if tensor.is_floating_point():
        # fill_ does not take every 8-bit type: e4m3's NaN is all ones.
        return (
            tensor.view(torch.uint8).fill_(0x7F).view(tensor.dtype) if tensor.itemsize == 1 else tensor.fill_(torch.nan)
        )
    return tensor.fill_(GARBAGE) if tensor.dtype in (torch.int32, torch.int64) else tensor


@contextlib.contextmanager
def poisoned(fill: Callable[[torch.Tensor], torch.Tensor] = poison) -> Iterator[None]:
    """Make torch.empty and its kin hand out poison, so that an unwritten element cannot pass for a zero."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    with (
        mock.patch.object(torch, "empty", lambda *a, **k: fill(empty(*a, **k))),
        mock.patch.object(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k))),
        mock.patch.object(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k))),
    ):
        yield


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    with poisoned():
        yield
