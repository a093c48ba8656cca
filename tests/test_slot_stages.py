"""The kernels of spread.py and mask_slots.py compile without a GPU, for every device that runs them.

Compiled in a process of its own: in Triton's interpreter, where the rest of the suite may run, there is no compiler.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from moe_dispatch.problem import ACTIVATIONS

pytest.importorskip("triton")

_POINTERS = {
    "x_ptr": "*bf16",
    "gate_up_ptr": "*bf16",
    "bias_ptr": "*bf16",
    "row_of_slot_ptr": "*i32",
    "ids_ptr": "*i64",
}


def _compile_all() -> dict[str, int]:
    """Compile each variant; its shared memory in bytes by its name."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moe_dispatch.backends.stages.mask_slots_kernel import _moe_mask_slots_kernel
    from moe_dispatch.backends.stages.spread_kernel import _moe_activate_spread_kernel, _moe_spread_kernel

    shared = {}

    def compile_one(kernel: Any, arch: int, out: str, constants: dict[str, Any]) -> None:
        types = {"out_ptr": out, "scale_ptr": "*fp32", **_POINTERS}
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
        assert compiled.asm["cubin"]
        shared[f"{kernel.__name__} sm_{arch} {out} {constants}"] = compiled.metadata.shared

    for arch in (80, 90, 100):
        compile_one(_moe_mask_slots_kernel, arch, "*i32", {"BLOCK": 512})
    # Only DeepGEMM's masked layout uses the others, and that is for Hopper.
    for groups in (1, 8):
        compile_one(_moe_spread_kernel, 90, "*bf16", {"scale_ptr": None, "GROUPS": groups})
        compile_one(_moe_spread_kernel, 90, "*fp8e4nv", {"GROUPS": groups})
    for activation in ACTIVATIONS:
        how = {"ACTIVATION": activation, "INTERLEAVED": activation == "swiglu_oai", "GROUPS": 8}
        compile_one(_moe_activate_spread_kernel, 90, "*bf16", {"scale_ptr": None, "bias_ptr": None, **how})
        compile_one(_moe_activate_spread_kernel, 90, "*fp8e4nv", how)
    return shared


def test_kernels_compile_without_a_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout)
    assert len(shared) == 3 + 4 + 2 * len(ACTIVATIONS)
    assert max(shared.values()) <= 48 << 10  # what a block gets without asking


if __name__ == "__main__":
    json.dump(_compile_all(), sys.stdout)
