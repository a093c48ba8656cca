"""Compiles kernels for devices that are not here: shared memory, registers and instructions of any configuration.

The compiling is done in a process of its own, this file run as a script: in Triton's interpreter, where the suite runs
without a GPU, there is no compiler.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

# Opt-in bytes of shared memory per block.
SHARED_MEMORY: Final = {80: 166912, 89: 101376, 90: 232448, 100: 232448}


@dataclass(frozen=True)
class Build:
    """A kernel and how to compile it.

    Attributes:
        kernel: ``"module:function"`` of a ``@triton.jit`` function.
        capability: 80, 89, 90 or 100.
        arguments: Types of what is no constant: ``"*bf16"``, ``"i32"``, ``"tensordesc<bf16[128,64]>"``.
        constants: Values of the constants, None for an absent pointer.
        num_warps: Launch option.
        num_stages: Launch option.
        aligned: Whether pointers and integers are multiples of 16.
    """

    kernel: str
    capability: int
    arguments: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: bool = True


@dataclass(frozen=True)
class Built:
    """What the compiler made of it: bytes, registers, and the names of PTX instructions that occur."""

    shared: int
    registers: int
    stack: int
    wgmma: bool
    tma: bool
    fp8: bool


def compile_kernels(builds: Sequence[Build]) -> list[Built]:
    """Compile all, in one process. What does not compile fails with the compiler's own words."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps([asdict(build) for build in builds]), env=environment, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise AssertionError(f"a kernel does not compile:\n{done.stderr[-4000:]}")
    return [Built(**built) for built in json.loads(done.stdout.splitlines()[-1])]


def _compile(build: Build) -> Built:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = build.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    names = kernel.arg_names
    missing = set(names) - set(build.arguments) - set(build.constants)
    if missing:
        raise TypeError(f"{name} also needs {', '.join(sorted(missing))}")
    signature = {parameter: build.arguments.get(parameter, "constexpr") for parameter in names}
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, parameter in enumerate(names)
        if build.aligned and (signature[parameter].startswith("*") or signature[parameter] == "i32")
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(parameter),): value for parameter, value in build.constants.items()},
        attrs=attributes,
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", build.capability, 32), options=options)
    ptx, usage = made.asm["ptx"], _resources(triton.__file__, made.asm["cubin"])
    return Built(
        shared=made.metadata.shared, registers=usage["REG"], stack=usage["STACK"], wgmma="wgmma.mma_async" in ptx,
        tma="cp.async.bulk.tensor" in ptx, fp8="e4m3" in ptx,
    )  # fmt: skip


def _resources(triton_file: str, cubin: bytes) -> dict[str, int]:
    tool = Path(triton_file).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", text)}


if __name__ == "__main__":
    print(json.dumps([asdict(_compile(Build(**build))) for build in json.load(sys.stdin)]))  # noqa: T201
