"""A real vLLM engine serves through the plugin: the same tokens as without it, and no late work.

Each engine has a process of its own, tests/gpu/serve_counted.py, which serves the model of examples/serve_vllm.py.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# In nats. BF16 logits of the two engines differ by rounding, which may turn the order of tokens that are as close.
CLOSE = 1.0
LONGER_START_S = 30.0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
    pytest.mark.skipif("MOE_DISPATCH_MACHINE" in os.environ, reason="the engine sees the real GPU"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, Any]]:
    """What an engine served without the plugin, and what one served with it."""
    folder = tmp_path_factory.mktemp("engines")
    results = {}
    for on in (False, True):
        out, log = folder / f"{on}.json", folder / f"{on}.log"
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "MOE_DISPATCH_VLLM": str(int(on)), "PYTHONPATH": os.pathsep.join(paths), "VLLM_LOGGING_LEVEL": "INFO",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_CACHE_ROOT": str(folder / "cache"),
            # From 0.26 on, vLLM does not start with the FlashInfer sampler where FlashInfer is not installed.
            "VLLM_USE_FLASHINFER_SAMPLER": os.environ.get("VLLM_USE_FLASHINFER_SAMPLER", "0"),
        }  # fmt: skip
        with log.open("w") as stream:
            done = subprocess.run(
                [sys.executable, "-m", "tests.gpu.serve_counted", str(out)], cwd=ROOT, env=environment,
                stdout=stream, stderr=subprocess.STDOUT, timeout=400, check=False,
            )  # fmt: skip
        assert done.returncode == 0, log.read_text()[-4000:]
        results[on] = json.loads(out.read_text()) | {"log": log.read_text()}
    return results


def test_the_layers_are_taken_and_the_log_says_so(served: dict[bool, dict[str, Any]]) -> None:
    assert (served[False]["taken"], served[True]["taken"]) == (0, 2)
    assert served[True]["left"] == {}
    assert "moe_dispatch runs 2 × E=8 topk=8 K=512 N=256 bfloat16; left to vLLM: none" in served[True]["log"]
    assert "moe_dispatch runs" not in served[False]["log"]
    assert not served[False]["stats"]
    assert sum(counts["ran"] for counts in served[True]["stats"].values()) > 0
    assert all(counts["fell_back"] == 0 for counts in served[True]["stats"].values())


def test_nothing_is_compiled_probed_proven_or_allocated_while_serving(served: dict[bool, dict[str, Any]]) -> None:
    on = served[True]
    assert (on["compiled"], on["probes"], on["first_runs"]) == (0, 0, 0)
    assert on["allocations"] <= served[False]["allocations"]


def test_greedy_tokens_are_equal_but_where_two_are_as_likely(served: dict[bool, dict[str, Any]]) -> None:
    pairs = list(zip(served[True]["sequences"], served[False]["sequences"], strict=True))
    for ours, theirs in pairs:
        same = [token == other for token, other in zip(ours["tokens"], theirs["tokens"], strict=True)]
        if not all(same):
            first = same.index(False)
            assert max(ours["margins"][first], theirs["margins"][first]) < CLOSE
    assert sum(ours["tokens"] == theirs["tokens"] for ours, theirs in pairs) >= len(pairs) / 2


def test_the_tokens_depend_on_the_experts(served: dict[bool, dict[str, Any]]) -> None:
    """Else the test above would show nothing."""
    for result in served.values():
        pairs = zip(result["sequences"], result["without_experts"], strict=True)
        assert sum(normal["tokens"] != silent["tokens"] for normal, silent in pairs) > len(result["sequences"]) / 2


def test_the_start_takes_little_longer(served: dict[bool, dict[str, Any]]) -> None:
    assert served[True]["started_s"] <= served[False]["started_s"] + LONGER_START_S
