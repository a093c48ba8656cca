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
DEVICES: dict[str, tuple[int, int] | None] = {
    "CPU": None,
    "A100 (sm_80)": (8, 0),
    "L40S (sm_89)": (8, 9),
    "H100, H200 (sm_90)": (9, 0),
    "B200 (sm_100)": (10, 0),
}
SHARED_MEMORY = {(8, 0): 166_912, (8, 9): 101_376, (9, 0): 232_448, (10, 0): 232_448}  # bytes for a block
# A decode layer that no backend refuses for its shape.
LAYER = Workload("aligned", E=8, topk=2, K=1024, N=512)


def support_matrix() -> list[str]:
    """The README's table, from what the backends declare."""
    lines = [
        "| | " + " | ".join(DEVICES) + " |",
        "|---|" + "---|" * len(DEVICES),
    ]
    for name in BACKENDS.names():
        cells = []
        for capability in DEVICES.values():
            machine = Machine(
                device="cuda" if capability else "cpu",
                name="described",
                capability=capability,
                sms=100,
                memory_bytes=80 << 30,
                shared_memory_per_block=SHARED_MEMORY[capability] if capability else 0,
                cuda="13.0" if capability else "",
                torch="2.11.0",
                triton="3.6.0",
                libraries={"vllm": "0.20.2", "deep_gemm": "2.5.0"},
            )
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
