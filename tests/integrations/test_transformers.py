"""The transformers integration: models and layers with random weights, against their own implementation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")

from moe_dispatch.errors import MoEDispatchWarning
from moe_dispatch.integrations.transformers import register
from moe_dispatch.integrations.transformers.layout import layout_of
from moe_dispatch.numerics import dequantize_blocks
from tests.attack.oracle import Layer, truth
from tests.integrations.transformers_models import (
    TOLERANCE,
    build,
    call_of,
    calls,
    deepseek_v3,
    experts_of,
    fp8_layer,
    gpt_oss,
    layer,
    logits,
    mixtral,
    qwen3,
)


@dataclass(frozen=True)
class ModelCase:
    """A model family, and how its layers are to be understood."""

    name: str
    config: Callable[[], Any]
    activation: str = "silu"
    interleaved: bool = False
    transposed: bool = False

    def __str__(self) -> str:
        return self.name


FUSED = (
    ModelCase("qwen3-moe", qwen3),
    ModelCase("qwen3-moe with gelu", lambda: qwen3(hidden_act="gelu"), activation="gelu"),
    ModelCase("qwen3-moe with tanh gelu", lambda: qwen3(hidden_act="gelu_pytorch_tanh"), activation="gelu_tanh"),
    ModelCase("mixtral", mixtral),
    ModelCase("deepseek-v3", deepseek_v3),
    ModelCase("gpt-oss", gpt_oss, activation="swiglu_oai", interleaved=True, transposed=True),
)


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_dispatched_models_agree_with_their_own_forward(case: ModelCase) -> None:
    model = build(case.config())
    own = logits(model, "eager")
    before = calls()
    with torch.no_grad():
        dispatched = logits(model, "moe_dispatch")
    assert calls() > before, "moe_forward did not run"
    assert (dispatched - own).norm() / own.norm() <= TOLERANCE[torch.float32]
    layout = layout_of(experts_of(model))
    understood = layout.activation, layout.interleaved, layout.transposed
    assert understood == (case.activation, case.interleaved, case.transposed)


def test_generate_gives_the_models_own_tokens() -> None:
    model = build(qwen3())
    ids = torch.arange(1, 9)[None]
    model.set_experts_implementation("eager")
    own = model.generate(ids, max_new_tokens=8, do_sample=False)
    model.set_experts_implementation("moe_dispatch")
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), own)


@pytest.mark.parametrize("config", [qwen3, gpt_oss], ids=["in place", "transposed"])
def test_gradients_equal_the_models_own(config: Callable[[], Any]) -> None:
    grads = []
    model = build(config())
    for implementation in ("eager", "moe_dispatch", "moe_dispatch"):  # twice: no graph of a step may outlive it
        model.set_experts_implementation(implementation)
        model.zero_grad()
        model(torch.arange(1, 12)[None]).logits.square().mean().backward()
        module = experts_of(model)
        grads.append((module.gate_up_proj.grad.clone(), module.down_proj.grad.clone()))
    for dispatched in grads[1:]:
        for mine, own in zip(dispatched, grads[0], strict=True):
            assert own.norm() > 0
            assert (mine - own).norm() / own.norm() < 1e-4


def test_slots_of_other_ranks_add_nothing() -> None:
    module = layer(qwen3())
    rows = torch.randn(3, 64)
    ids = torch.tensor([[1, 8], [8, 8], [2, 3]])  # 8 is expert parallelism's sentinel for 8 experts
    weights = torch.tensor([[0.5, float("nan")], [float("nan"), float("nan")], [0.5, 0.5]])
    with torch.no_grad():
        out = module(rows, ids, weights)
        mine = module(rows[:1], ids[:1, :1], weights[:1, :1])
    assert out.isfinite().all()
    torch.testing.assert_close(out[:1], mine)
    assert not out[1].any()


FP8_FORMS: dict[str, dict[str, Any]] = {
    "a scale per block": {},
    "UE8M0 scales": {"scale_fmt": "ue8m0"},
    "a scale per tensor": {"block_size": None},
}


def fp8_output(module: Any, call: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What the codes and scales of an FP8 layer give, in fp64 and with activations that are not quantised."""
    rows, ids, weights = call
    up_scale, down_scale = (getattr(module, f"{name}_scale_inv").detach() for name in ("gate_up_proj", "down_proj"))
    if module.block_size is None:  # each tensor's scale, as a scale for each row
        up_scale, down_scale = up_scale.repeat_interleave(128, 1)[..., 0], down_scale.expand(-1, 256, 1)[..., 0]
    layer = Layer(module.gate_up_proj.detach(), module.down_proj.detach(), (up_scale.float(), down_scale.float()))
    return truth(rows, layer, weights, ids).out


@pytest.mark.parametrize("form", FP8_FORMS)
def test_fp8_layers_are_dispatched(form: str) -> None:
    module = fp8_layer(**FP8_FORMS[form])
    call = call_of(module)
    call[1][4, 0] = 4  # expert parallelism's sentinel
    compiled: Any = torch.compile(module, backend="eager", fullgraph=True)
    expected = fp8_output(module, call)
    for run, mode in ((module, torch.no_grad), (module, torch.enable_grad), (compiled, torch.no_grad)):
        before = calls()
        with mode():
            out = run(*call)
            assert calls() == before + 1
            assert torch.equal(run(*call), out)
        assert (out.float() - expected).norm() / expected.norm() < 5e-2  # two roundings to e4m3 lie between


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("form", FP8_FORMS)
def test_changed_fp8_scales_are_seen(form: str, compiled: bool) -> None:
    """Those that are not fp32 or not per block are read by a copy."""
    module = fp8_layer(**FP8_FORMS[form])
    call = call_of(module)
    torch.compiler.reset()  # each form is another graph of the same code, of which torch keeps eight
    run: Any = torch.compile(module, backend="eager", fullgraph=True) if compiled else module
    with torch.no_grad():
        first = run(*call)
        scale = module.down_proj_scale_inv
        scale.copy_(2 * scale.float())
        torch.testing.assert_close(run(*call).float(), 2 * first.float())
        module.down_proj_scale_inv = torch.nn.Parameter((4 * scale.float()).to(scale.dtype), requires_grad=False)
        torch.testing.assert_close(run(*call).float(), 8 * first.float())


def test_static_activations_run_the_models_own_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' faster implementations refuse them. Its product needs a kernel of the hub, so torch stands in."""
    module = fp8_layer(activation_scheme="static")
    call = call_of(module)

    def product(self: Any, rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, **_: Any) -> torch.Tensor:
        return (rows.float() @ dequantize_blocks(weight, scale).T).to(rows.dtype)

    monkeypatch.setattr(type(module), "linear", product)
    with torch.no_grad(), pytest.warns(MoEDispatchWarning, match="activation scheme is 'static'"):
        out = module(*call)
    expected = fp8_output(module, call)
    assert (out.float() - expected).norm() / expected.norm() < 1e-2
