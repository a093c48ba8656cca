"""Layers that keep transformers' own implementation: which do, why, and what then runs."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

pytest.importorskip("transformers", minversion="5.17")

import transformers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from moe_dispatch.errors import MoEDispatchWarning
from moe_dispatch.integrations.transformers import own, register, report
from moe_dispatch.integrations.transformers.layout import inspect_module, layout_of
from moe_dispatch.integrations.transformers.takeover import take_over
from tests.integrations.transformers_models import (
    build,
    call_of,
    calls,
    eager,
    experts_of,
    gpt_oss,
    layer,
    logits,
    qwen3,
)
from tests.support.ambient import default_dtype


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()
    own._warned.clear()


def qwen3_layer(**changes: Any) -> Any:
    return layer(qwen3(**changes))


@pytest.mark.parametrize("activation", ["quick_gelu", "tanh"], ids=["looks like silu", "another function altogether"])
def test_other_gates_run_grouped_mm_and_say_so_once(activation: str) -> None:
    model = build(qwen3(hidden_act=activation))
    expected = logits(model, "grouped_mm")
    before = calls()
    with pytest.warns(MoEDispatchWarning, match="none of"):
        kept = logits(model, "moe_dispatch")
    assert calls() == before
    assert torch.equal(kept, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MoEDispatchWarning)
        logits(model, "moe_dispatch")


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, None], ids=str)
def test_a_gate_is_recognised_under_every_default(default: torch.dtype | None) -> None:
    """As a program sets the default dtype for the time in which it makes its model."""
    for module in (qwen3_layer(), layer(gpt_oss())):
        with default_dtype(default) if default else torch.device("meta"):
            taken = take_over(module, torch.float32)
        assert taken.experts is not None, taken.reason


UNKNOWN: dict[str, Callable[[Any], object]] = {
    "tensor up_proj_norm": lambda module: setattr(module, "up_proj_norm", nn.Parameter(torch.ones(3))),
    "tensor expert_scale": lambda module: module.register_buffer("expert_scale", torch.ones(8)),
    "submodule pre_norm": lambda module: setattr(module, "pre_norm", nn.Identity()),
    "attribute residual_scale=2.0": lambda module: setattr(module, "residual_scale", 2.0),
    "has_post_expert_norm": lambda module: setattr(module, "has_post_expert_norm", True),
    "tensor down_proj_orig is": lambda module: prune.random_unstructured(module, "down_proj", 0.5),
    "codes of torch.int8": lambda module: setattr(
        module, "gate_up_proj", nn.Parameter(torch.zeros(8, 64, 32, dtype=torch.int8), requires_grad=False)
    ),
    "FP8 without scales": lambda module: module.to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("reason", UNKNOWN)
def test_what_is_not_known_is_refused_by_name(reason: str) -> None:
    module = qwen3_layer()
    assert not inspect_module(module).unfit
    UNKNOWN[reason](module)
    unfit = inspect_module(module).unfit
    assert reason in unfit
    assert len(unfit) < 200, "no tensor is printed"


@pytest.mark.parametrize("name", ["post_scale", "cap"])
def test_options_that_are_off_are_no_reason(name: str) -> None:
    module = qwen3_layer()
    setattr(module, name, None if name == "cap" else False)
    assert not inspect_module(module).unfit


def test_an_option_that_a_later_decorator_may_have_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_dispatch.integrations.transformers import layout

    def decorator(experts_class: Any = None, *, has_gate: bool = True, has_latent: bool = False) -> None: ...

    monkeypatch.setattr(layout, "use_experts_implementation", decorator)
    module = qwen3_layer()
    module.has_latent = False
    assert not inspect_module(module).unfit
    module.has_latent = True
    assert "has_latent=True" in inspect_module(module).unfit


class Experts(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = 4
        self.gate_up_proj = nn.Parameter(torch.randn(4, 64, 64))
        self.down_proj = nn.Parameter(torch.randn(4, 64, 32))
        self.act_fn = nn.SiLU()


@use_experts_implementation
class TakesMore(Experts):
    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor, expert_scale: Tensor | None = None) -> Tensor:
        return hidden


@use_experts_implementation
class Doubles(Experts):
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        single: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
        return 2.0 * single


@use_experts_implementation
class SoftCapped(Experts):
    """Its gate is that of transformers' FP8 layers of Inkling2 from 5.24, with the caps as numbers."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gate_softcap, self.up_softcap = 7.0, 5.0

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gate_factor = torch.tanh(gate / self.gate_softcap) * self.gate_softcap
        return gate_factor * torch.sigmoid(gate) * torch.tanh(up / self.up_softcap) * self.up_softcap

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
        return out


def test_a_forward_with_another_argument_is_refused_by_name() -> None:
    assert "argument expert_scale" in inspect_module(TakesMore(qwen3())).unfit


def test_a_call_with_another_argument_keeps_the_own_forward() -> None:
    module = qwen3_layer()
    with pytest.raises(TypeError, match="process_group"), pytest.warns(MoEDispatchWarning, match="process_group"):
        module(*call_of(module), process_group=None)  # grouped_mm does not know it either, and says so


def test_a_layer_that_computes_something_else_is_noticed_at_its_first_call() -> None:
    config = qwen3()
    config._experts_implementation = "moe_dispatch"
    module = Doubles(config)
    before = calls()
    with torch.no_grad(), pytest.warns(MoEDispatchWarning, match=r"two tokens .* differ .* by 0\.5"):
        module(*call_of(module))
    assert calls() == before
    assert "two tokens" in layout_of(module).unfit


def test_soft_caps_of_the_layer_itself_are_dispatched_and_their_change_noticed() -> None:
    config = qwen3()
    config._experts_implementation = "moe_dispatch"
    module: Any = SoftCapped(config)
    call = call_of(module)
    for cap in (7.0, 0.5):
        module.gate_softcap = cap
        before = calls()
        with torch.no_grad():
            torch.testing.assert_close(module(*call), eager(module, call), rtol=1e-4, atol=1e-4)
        assert calls() == before + 1


def test_a_limit_of_its_own_is_noticed() -> None:
    module = layer(gpt_oss())
    assert not layout_of(module).unfit
    module.limit = 9.0
    assert layout_of(module).activation == "swiglu(alpha=1.702,limit=9,shift=1)"


def test_a_gate_changed_after_the_first_call_is_noticed() -> None:
    module = qwen3_layer()
    call = call_of(module)
    with torch.no_grad():
        module(*call)
        module.act_fn = nn.GELU()
        changed = module(*call)
        module.config._experts_implementation = "eager"
        torch.testing.assert_close(changed, module(*call))


def test_a_copy_of_a_layer_is_looked_at_anew() -> None:
    module = qwen3_layer()
    assert layout_of(module).activation == "silu"
    copied = copy.deepcopy(module)
    copied.act_fn = nn.GELU()
    assert layout_of(copied).activation == "gelu"


def test_fp64_runs_the_loop_as_torch_has_no_grouped_product_for_it() -> None:
    module = qwen3_layer().double()
    call = call_of(module)
    with pytest.warns(MoEDispatchWarning, match="torch.float64"):
        out = module(*call)
    torch.testing.assert_close(out, eager(module, call))


def test_plain_tensors_in_the_place_of_parameters_are_dispatched() -> None:
    """As FSDP's first version puts them there for a call."""
    module = qwen3_layer()
    call = call_of(module)
    expected = eager(module, call).detach()
    for name, weight in list(module.named_parameters()):
        delattr(module, name)
        setattr(module, name, weight.detach())
    before = calls()
    torch.testing.assert_close(module(*call), expected, rtol=1e-4, atol=1e-4)
    assert calls() == before + 1


def test_mixed_dtypes_keep_the_own_forward() -> None:
    module = qwen3_layer()
    with pytest.warns(MoEDispatchWarning, match="which only autocast brings together"):
        module(torch.randn(2, 64).bfloat16(), torch.tensor([[0, 1], [2, 3]]), torch.full((2, 2), 0.5))


def test_ids_of_other_ranks_do_not_break_a_layer_that_keeps_its_own() -> None:
    """Expert parallelism marks other ranks' slots by the id E, on which a loop with ``one_hot(ids, E)`` fails."""
    module = qwen3_layer(hidden_act="tanh")
    module._is_expert_parallel = True  # as transformers' plan sets it
    rows, ids, weights = call_of(module)
    with pytest.warns(MoEDispatchWarning, match="none of"):
        own_slots = module(rows, ids[:, :1], weights[:, :1])
    ids[:, 1], weights[:, 1] = 8, 0.0
    torch.testing.assert_close(module(rows, ids, weights), own_slots)


@pytest.mark.parametrize(
    ("change", "reason"), [({"block_size": (64, 64)}, "blocks"), ({"activation_scheme": "static"}, "static")]
)
def test_other_fp8_schemes_are_left_alone(change: dict[str, Any], reason: str) -> None:
    from transformers.integrations.finegrained_fp8 import FP8Experts

    module = FP8Experts(qwen3(hidden_size=256, moe_intermediate_size=128), **{"block_size": (128, 128), **change})
    assert reason in inspect_module(module).unfit


def test_each_layer_has_a_line_with_its_reason() -> None:
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


def test_a_wrapped_layer_is_reported_and_not_its_wrapper() -> None:
    model = build(qwen3(num_hidden_layers=1))
    model.set_experts_implementation("moe_dispatch")
    block = model.model.layers[0].mlp
    block.experts = torch.compile(block.experts, backend="eager")
    (line,) = report(model).layers
    assert (line.kind, line.state, line.reason) == ("Qwen3MoeExperts", "dispatched", "")


def test_a_model_that_did_not_ask_is_told_how() -> None:
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
    model = build(qwen3())
    model.set_experts_implementation("moe_dispatch")
    assert "not loaded" in report(model.to("meta")).layers[0].reason
    assert experts_of(model).down_proj.is_meta
