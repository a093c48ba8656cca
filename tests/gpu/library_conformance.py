"""Conformance of the backends over foreign libraries, with whatever releases are on PYTHONPATH, as one JSON record.

    PYTHONPATH=~/site python3 tests/gpu/library_conformance.py --label vllm-0.20.2
    PYTHONPATH=~/sgl python3 tests/gpu/library_conformance.py --label sgl-0.1.3 --backend deep_gemm

A folder on PYTHONPATH holds unpacked wheels: vLLM with all that it imports, or sgl-deep-gemm with the release of
apache-tvm-ffi that it requires. Needs a Hopper GPU, nvcc and pytest-xdist, and takes under three minutes on 16 cores.
Prints one line a case at the end, and writes versions, commit, counts and failures to
``$OUT/library-conformance-<label>.json``. Fails if a case fails, or if a backend passes none, as it does where its
library does not load.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BACKENDS = ("vllm_fused_moe", "deep_gemm")
TESTS = (
    "tests/backends/test_conformance.py", "tests/backends/test_vllm_fused_moe.py", "tests/gpu/test_faults.py",
    "tests/gpu/test_libraries.py",
)  # fmt: skip


class Recorder:
    """Collects the outcome of every case; with xdist it sees the reports of all workers."""

    def __init__(self) -> None:
        self.cases: dict[str, dict[str, object]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the call of a test, or the phase that kept it from being called or spoilt it afterwards."""
        if report.when != "call" and report.outcome == "passed":
            return
        why = ""
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            why = str(report.longrepr[2]).removeprefix("Skipped: ")
        elif report.outcome == "failed":
            why = next((line for line in reversed(report.longreprtext.splitlines()) if line.strip()), "")
        self.cases[report.nodeid] = {"outcome": report.outcome, "seconds": round(report.duration, 2), "why": why}


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

    recorder, begun = Recorder(), time.monotonic()
    pytest_options = ["-q", "-m", "gpu", "-k", " or ".join(backends), "-n", options.workers, "--dist", "worksteal"]
    pytest.main([*pytest_options, "--tb=short", *TESTS], plugins=[recorder])
    record = describe(options.label) | count(recorder, backends) | {"seconds": round(time.monotonic() - begun)}
    out = Path(os.environ.get("OUT", ROOT / "out")) / f"library-conformance-{options.label}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, case in sorted(recorder.cases.items()):
        print(f"{case['outcome']:7} {name.partition('::')[2]} {case['seconds']} s {case['why']}")
    print(json.dumps(record, indent=1))
    return 1 if record["failed"] or record["without_a_pass"] else 0


def describe(label: str) -> dict[str, object]:
    """What ran: versions, where DeepGEMM comes from, and the commit."""
    from moe_dispatch.machine import Machine
    from moe_dispatch.measure.provenance import commit, versions
    from moe_dispatch.system.libraries import deep_gemm_package

    machine = Machine.inspect()
    vllm = importlib.util.find_spec("vllm")
    return {
        "label": label,
        "machine": machine.name,
        "versions": versions(machine),
        "vllm_at": vllm.origin if vllm else "",
        "deep_gemm_at": str(deep_gemm_package() or ""),
        "commit": commit(ROOT),
    }


def count(recorder: Recorder, backends: Sequence[str]) -> dict[str, object]:
    """Cases by outcome, and the backends that passed none."""
    outcomes = Counter(str(case["outcome"]) for case in recorder.cases.values())
    passed = [name for name, case in recorder.cases.items() if case["outcome"] == "passed"]
    lacking = [backend for backend in backends if not any(f"[{backend}" in name for name in passed)]
    skips = Counter(str(case["why"]) for case in recorder.cases.values() if case["outcome"] == "skipped")
    return {
        "passed": outcomes["passed"],
        "failed": outcomes["failed"],
        "skipped": outcomes["skipped"],
        "without_a_pass": lacking,
        "why_skipped": dict(skips.most_common(20)),
        "failures": {name: case["why"] for name, case in recorder.cases.items() if case["outcome"] == "failed"},
    }


if __name__ == "__main__":
    sys.exit(main())
