"""`report`: which layers of a model are dispatched, which keep their own forward, which are out of reach."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")
import transformers

from moe_dispatch.integrations.transformers import register, report
from tests.integrations.transformers_models import build, calls, experts_of, qwen3


def test_each_layer_has_a_line_with_its_reason() -> None:
    register()
    model = build(qwen3(num_hidden_layers=3))
    model.set_experts_implementation("moe_dispatch")
    model.model.layers[1].mlp.experts.act_fn = torch.nn.Tanh()
    before = calls()
    layers = report(model).layers
    assert calls() == before, "report ran the model"
    assert [(layer.name, layer.state) for layer in layers] == [
        ("model.layers.0.mlp.experts", "dispatched"),
        ("model.layers.1.mlp.experts", "own"),
        ("model.layers.2.mlp.experts", "dispatched"),
    ]
    assert "none of" in layers[1].reason
    assert str(report(model)).count("\n") == 2


def test_a_model_that_did_not_ask_is_told_how() -> None:
    register()
    (line, _) = report(build(qwen3())).layers
    assert line.state == "own"
    assert 'set_experts_implementation("moe_dispatch")' in line.reason


def test_families_without_an_interface_are_out_of_reach() -> None:
    config = transformers.Llama4TextConfig(
        hidden_size=32, intermediate_size=16, intermediate_size_mlp=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, vocab_size=64, num_local_experts=2, moe_layers=[0, 1], pad_token_id=0,
    )  # fmt: skip
    lines = report(transformers.Llama4ForCausalLM(config)).layers
    assert [line.state for line in lines] == ["out of reach"] * 2
    assert "use_experts_implementation" in lines[0].reason


def test_a_model_on_the_meta_device_is_inspected() -> None:
    register()
    model = build(qwen3())
    model.set_experts_implementation("moe_dispatch")
    assert "not loaded" in report(model.to("meta")).layers[0].reason
    assert experts_of(model).down_proj.is_meta
