"""The measurement of transformers' experts implementations, on tiny models."""

import time
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")

from moe_dispatch.benchmarks.record import transformers_inference
from moe_dispatch.benchmarks.record.gradients import IMPLEMENTATIONS, build
from moe_dispatch.benchmarks.record.transformers_inference import Case, rows
from moe_dispatch.benchmarks.record.verdicts import verdicts
from moe_dispatch.integrations.transformers import register

TINY = {"hidden_size": 32, "num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}


def measured(model: Any, *modes: transformers_inference.Mode) -> list[tuple[str, str]]:
    """What was measured of a decode, in its order, once outputs are known to agree."""
    made = list(rows(model, "cpu", 1, (Case("decode", 2),), modes, time.monotonic() + 300, backend="eager"))
    assert not [row for row in made if "reason" in row]
    differences = {row["implementation"]: row["difference"] for row in made if "difference" in row}
    assert set(differences) == set(IMPLEMENTATIONS[1:])
    assert max(differences.values()) < 0.05
    return [(row["mode"], row["implementation"]) for row in made if row.get("tokens_per_s", 0.0) > 0.0]


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_inference, "_DECODE_STEPS", 2)
    register()
    torch.compiler.reset()


@pytest.mark.slow  # imports a model of transformers
def test_every_implementation_is_measured_and_agrees() -> None:
    model = build("qwen3-30b-a3b", 1, "cpu", **TINY, num_experts=4, moe_intermediate_size=16, intermediate_size=16)
    assert measured(model.eval(), "eager") == [("eager", name) for name in IMPLEMENTATIONS]


@pytest.mark.slow  # compiles a model of transformers three times
def test_compiled_models_are_measured_in_one_graph_each() -> None:
    model = build("gpt-oss-20b", 1, "cpu", **TINY, num_local_experts=4, intermediate_size=16)
    assert measured(model.eval(), "compiled") == [("compiled", name) for name in IMPLEMENTATIONS[1:]]


def test_verdicts_stand_beside_each_alternative() -> None:
    turns = {"grouped_mm": (2.0, 4.0), "batched_mm": (1.0, 1.0), "moe_dispatch": (1.5, 1.5)}
    made = [
        {"mode": "eager", "what": "decode", "tokens": 1, "implementation": name, "ms": ms}
        for name, each in turns.items() for ms in each
    ]  # fmt: skip
    made.append({"mode": "eager", "what": "decode", "tokens": 1, "implementation": "eager", "reason": "out of memory"})
    (line,) = verdicts(made)
    assert line == (
        "eager decode 1: moe_dispatch 1.500 ms is NOT the fastest; batched_mm 1.000 ms (1.50× FASTER), "
        "grouped_mm 3.000 ms (2.00× slower)"
    )
