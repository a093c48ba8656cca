"""The README says nothing that the code does not."""

import os
import subprocess
import sys
from pathlib import Path

from moe_dispatch.machine import Machine
from moe_dispatch.problem import DTYPES
from moe_dispatch.registry import BACKENDS
from moe_dispatch.workloads import Workload

README = Path(__file__).parents[2] / "README.md"
DEVICES = {
    "CPU": Machine(device="cpu", name="described", sms=100, memory_bytes=80 << 30, torch="2.11.0", triton="3.6.0"),
    "A100 (sm_80)": Machine.load("a100-80gb"),
    "L40S (sm_89)": Machine.load("l40s"),
    "H100, H200 (sm_90)": Machine.load("h200"),
    "B200 (sm_100)": Machine.load("b200"),
}
# A decode layer that no backend refuses for its shape.
LAYER = Workload("aligned", E=8, topk=2, K=1024, N=512)


def support_matrix() -> list[str]:
    """The README's table, from what the backends declare."""
    lines = ["| | " + " | ".join(DEVICES) + " |", "|---|" + "---|" * len(DEVICES)]
    for name in BACKENDS.names():
        cells = []
        for machine in DEVICES.values():
            backend = BACKENDS.load(name)(machine)
            taken = [dtype for dtype in DTYPES if not backend.unsupported_reasons(LAYER.problem(8, dtype, machine))]
            cells.append(", ".join(taken) or "–")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return lines


def test_the_support_matrix_is_what_the_backends_declare() -> None:
    # In a process of its own: in Triton's interpreter, where this one may be, the kernels take a CPU too.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = "from tests.core.test_readme import support_matrix; print(*support_matrix(), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=README.parent, env=environment, capture_output=True, text=True, check=True
    )
    table = done.stdout.strip()
    assert table in README.read_text(encoding="utf-8"), f"README.md must hold this table:\n{table}"
