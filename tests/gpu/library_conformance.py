"""Conformance of the backends over foreign libraries, with whatever releases are on PYTHONPATH, as one JSON record.

    PYTHONPATH=~/site python3 tests/gpu/library_conformance.py --label vllm-0.20.2
    PYTHONPATH=~/sgl python3 tests/gpu/library_conformance.py --label sgl-0.1.3 --backend deep_gemm

A folder on PYTHONPATH holds unpacked wheels: vLLM with all that it imports, or sgl-deep-gemm with the release of
apache-tvm-ffi that it requires. Needs a Hopper GPU, nvcc and pytest-xdist, and takes under three minutes on 16 cores.
Prints one line a case at the end, and writes what suite_record.py writes, and where the libraries lie, to
``$OUT/library-conformance-<label>.json``. Fails if a case fails, or if a backend passes none, as it does where its
library does not load.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BACKENDS = ("vllm_fused_moe", "deep_gemm")
TESTS = (
    "tests/backends/test_conformance.py", "tests/backends/test_vllm_fused_moe.py", "tests/gpu/test_faults.py",
    "tests/gpu/test_libraries.py",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases and write the record; 0 if every backend passed all that it takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", required=True, help="names the record: vllm-0.33.0, sgl-0.1.3")
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="only this one; may be repeated")
    parser.add_argument("--workers", default="14", help="processes that share the GPU: they compile most of the time")
    options = parser.parse_args(arguments)
    backends = options.backend or list(BACKENDS)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # Kernels of another release must not be found.
    os.environ.setdefault("DG_JIT_CACHE_DIR", str(Path.home() / ".cache" / f"deep_gemm-{options.label}"))

    from moe_dispatch.system.libraries import deep_gemm_package
    from tests.gpu import suite_record

    out = Path(os.environ.get("OUT", ROOT / "out")) / f"library-conformance-{options.label}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    report = out.with_suffix(".xml")
    selected = ["-m", "gpu", "-k", " or ".join(backends), "-n", options.workers, "--dist", "worksteal"]
    pytest.main(["-q", "-rpfEs", "--tb=short", "--junitxml", str(report), *selected, *TESTS])
    passed = [name for name, outcome, _ in suite_record.outcomes(report) if outcome == "passed"]
    without_a_pass = [backend for backend in backends if not any(f"[{backend}" in name for name in passed)]
    vllm = importlib.util.find_spec("vllm")
    record = suite_record.record([report]) | {
        "without_a_pass": without_a_pass,
        "vllm_at": vllm.origin if vllm else "",
        "deep_gemm_at": str(deep_gemm_package() or ""),
    }
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))
    return 1 if record["runs"][report.stem]["failed"] or without_a_pass else 0


if __name__ == "__main__":
    sys.exit(main())
