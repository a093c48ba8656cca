"""Options of the attack: `make attack` runs the large profile and writes its figures."""

import json
import platform
import re
import resource
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from tests.attack import harness
from tests.support.interpreter import leave_out_the_interpreter

_MEMORY: Final = 6 << 30
_SECONDS: Final = 3600  # for one test of the large profile; each input has a limit of its own


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attack", "hostile inputs (tests/attack)")
    group.addoption(
        "--attack",
        choices=(harness.SMALL, harness.LARGE),
        default=harness.SMALL,
        help="how many inputs: a few, the same each time; or more than 20,000, drawn anew",
    )
    group.addoption("--attack-figures", metavar="FILE", help="write the number of inputs by area to FILE, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    harness.profile = config.getoption("attack", harness.SMALL)
    if harness.profile == harness.LARGE and config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(secrets.randbelow(1 << 32))


def pytest_report_header(config: pytest.Config) -> str | None:
    if harness.profile != harness.LARGE:
        return None
    return f"attack: the same inputs again by --attack=large --hypothesis-seed={config.option.hypothesis_seed}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            # A thread, since `watched` uses the signal; it also ends a process that hangs in native code.
            seconds = _SECONDS if harness.profile == harness.LARGE else 300
            item.add_marker(pytest.mark.timeout(seconds, method="thread"))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collect the figures of a worker of pytest-xdist."""
    if figures := node.workeroutput.get("attack"):
        harness.FIGURES.add(harness.Figures(**figures))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["attack"] = vars(harness.FIGURES)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    figures = harness.FIGURES
    if harness.profile != harness.LARGE or not figures.inputs:
        return
    terminalreporter.section("attack")
    for area, count in sorted(figures.inputs.items()):
        terminalreporter.line(
            f"{area}: {count:,} inputs, {figures.refused.get(area, 0):,} refused, the slowest took "
            f"{figures.slowest_s[area]:.1f} s"
        )
    terminalreporter.line(f"{sum(figures.inputs.values()):,} inputs, seed {config.option.hypothesis_seed}")
    if path := config.getoption("attack_figures", None):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(_record(config), indent=1) + "\n", encoding="utf-8")


def _record(config: pytest.Config) -> dict[str, object]:
    return {
        "seed": config.option.hypothesis_seed,
        **vars(harness.FIGURES),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _data_bytes() -> int:
    """What `resource.RLIMIT_DATA` limits, as it is now."""
    (kibibytes,) = re.findall(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    return int(kibibytes) << 10


@pytest.fixture(autouse=True)
def _as_in_a_program(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels' torch references, as on any CPU, and not Triton's interpreter; torch's state is restored."""
    leave_out_the_interpreter(monkeypatch)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    # An endless read raises, and takes no machine with it. What earlier tests keep in this process does not count.
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + _MEMORY, hard))
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
