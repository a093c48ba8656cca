"""The transformers integration: models and layers with random weights, against their own implementation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.17")

from moe_dispatch.integrations.transformers import register  # noqa: E402
from moe_dispatch.integrations.transformers.layout import layout_of, model_forward  # noqa: E402
from moe_dispatch.numerics import dequantize_blocks  # noqa: E402
from tests.integrations.transformers_models import (  # noqa: E402
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


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_dispatched_layers_agree_with_their_own_forward(case: ModelCase, dtype: torch.dtype) -> None:
    # One layer under one routing: through a whole BF16 model, rounding may turn a later router's near tie.
    model = build(case.config(), dtype)
    model.set_experts_implementation("moe_dispatch")
    module = experts_of(model)
    call = call_of(module, M=11)
    before = calls()
    with torch.no_grad():
        own = model_forward(module)(module, *call).float()
        dispatched = module(*call).float()
    assert calls() == before + 1
    layout = layout_of(module)
    assert (layout.activation, layout.interleaved, layout.transposed) == (
        case.activation,
        case.interleaved,
        case.transposed,
    )
    assert (dispatched - own).norm() / own.norm() <= TOLERANCE[dtype]


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


@pytest.mark.parametrize("grad", [False, True], ids=["without gradients", "with gradients enabled"])
def test_block_fp8_layers_are_dispatched(grad: bool) -> None:
    module = fp8_layer()
    rows = torch.randn(5, 256, dtype=torch.bfloat16)
    ids, weights = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 2], [4, 1]]), torch.full((5, 2), 0.5)
    before = calls()
    with torch.set_grad_enabled(grad):
        out = module(rows, ids, weights)
    assert calls() == before + 1
    expected = torch.zeros(5, 256)
    up, down = (
        dequantize_blocks(getattr(module, name).detach(), getattr(module, f"{name}_scale_inv").detach())
        for name in ("gate_up_proj", "down_proj")
    )
    for m in range(5):
        for e in ids[m].tolist():
            if e < 4:
                gate, value = (up[e] @ rows[m].float()).chunk(2)
                expected[m] += 0.5 * (down[e] @ (torch.nn.functional.silu(gate) * value))
    assert (out.float() - expected).norm() / expected.norm() < 5e-2  # two roundings to e4m3 lie between
