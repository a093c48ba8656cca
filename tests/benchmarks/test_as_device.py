"""tests/gpu/as_device.sh; needs no GPU."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

KERNEL = """
    import triton, triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    @triton.jit
    def product(a, b, c):
        offs = tl.arange(0, 64)
        tile = offs[:, None] * 64 + offs[None, :]
        tl.store(c + tile, tl.dot(tl.load(a + tile), tl.load(b + tile)))

    source = ASTSource(fn=product, signature={"a": "*bf16", "b": "*bf16", "c": "*fp32"}, constexprs={})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    ptx = made.asm["ptx"]
    print("wgmma" in ptx, "mma.sync" in ptx, ".target sm_90a" in ptx, len(made.asm["cubin"]) > 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("device", "wgmma"), [("a100", False), ("l40s", False), ("", True)])
def test_an_h200_told_that_it_is_older_gets_older_code_that_it_can_load(
    device: str, wgmma: bool, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    script = tmp_path / "kernel.py"
    script.write_text(textwrap.dedent(KERNEL))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path / "c")
    }
    wrapper = [str(ROOT / "tests/gpu/as_device.sh"), device] if device else []
    done = subprocess.run(
        [*wrapper, sys.executable, script], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.split() == [str(wgmma), str(not wgmma), "True", "True"], done.stderr
