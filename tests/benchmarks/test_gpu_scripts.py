"""The scripts of tests/gpu, as far as they run without a GPU."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.benchmarks.helpers import ROOT
from tests.gpu import suite_record

SUITE = """
    import pytest

    def test_good(): pass
    def test_bad(): assert False
    @pytest.mark.parametrize("limit", [128, 256])
    def test_left_out(limit): pytest.skip(f"bf16 needs K % {limit} == 0, got K={limit + 1}")
"""


def test_reports_of_a_suite_become_one_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tests, report, out = tmp_path / "test_some.py", tmp_path / "h200.xml", tmp_path / "suite.json"
    tests.write_text("\n".join(line[4:] for line in SUITE.splitlines()))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--junitxml"]
    subprocess.run([*command, str(report), str(tests)], capture_output=True, check=False)
    (tmp_path / "l40s.xml").write_bytes(report.read_bytes())
    others = [str(tmp_path / "l40s.xml"), "--interrupted", "l40s", str(tmp_path / "a100.xml")]
    suite_record.main([str(report), *others, "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["runs"]["h200"]["seconds"] > 0
    assert record["runs"].pop("l40s") == record["runs"]["h200"] | {"complete": False}
    del record["runs"]["h200"]["seconds"]
    assert record["runs"] == {
        "h200": {
            "complete": True, "passed": 1, "failed": 1, "skipped": 2, "failures": ["test_some::test_bad"],
            "skip_reasons": {"bf16 needs K % … == …, got K=…": 2},
        },
        "a100": {"complete": False},
    }  # fmt: skip
    assert {"torch", "triton", "driver"} <= set(record["versions"])
    assert "h200" in capsys.readouterr().out


@pytest.mark.parametrize(
    "script", ["tests/gpu/session.sh", "tests/gpu/as_device.sh", "benchmarks/record/gpu_record.sh"]
)
def test_shell_scripts_parse_and_say_how_they_are_called(script: str) -> None:
    path = ROOT / script
    subprocess.run(["bash", "-n", path], check=True)
    done = subprocess.run([path], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "usage: " in done.stderr
    for word in path.read_text().split():
        if word.startswith(("tests/", "benchmarks/")) and word.endswith((".py", ".sh")):
            assert (ROOT / word).exists(), word


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
