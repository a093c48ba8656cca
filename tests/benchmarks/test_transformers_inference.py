"""The measurement of transformers' experts implementations, on a tiny model."""

import time

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")

from moe_dispatch.benchmarks.record import transformers_inference
from moe_dispatch.benchmarks.record.gradients import IMPLEMENTATIONS, build
from moe_dispatch.benchmarks.record.transformers_inference import Case, rows
from moe_dispatch.integrations.transformers import register


@pytest.mark.slow  # compiles a model of transformers three times
def test_every_implementation_is_measured_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_inference, "_DECODE_STEPS", 2)
    register()
    torch.compiler.reset()
    model = build(
        1, "cpu", hidden_size=32, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, intermediate_size=32,
    ).eval()  # fmt: skip
    made = list(
        rows(model, "cpu", 1, (Case("decode", 2),), ("eager", "compiled"), time.monotonic() + 300, backend="eager")
    )
    assert not [row for row in made if "reason" in row]
    differences = {row["implementation"]: row["difference"] for row in made if "difference" in row}
    assert set(differences) == set(IMPLEMENTATIONS[1:])
    assert max(differences.values()) < 0.05
    measured = [(row["mode"], row["implementation"]) for row in made if row.get("tokens_per_s", 0.0) > 0.0]
    assert measured == [
        *(("eager", name) for name in IMPLEMENTATIONS),
        *(("compiled", name) for name in IMPLEMENTATIONS[1:]),
    ]
