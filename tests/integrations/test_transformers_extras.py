"""Models of transformers adapted by PEFT and offloaded by accelerate, where those are installed."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.17")

from moe_dispatch.integrations.transformers import own, register, report
from tests.integrations.transformers_models import build, calls, experts_of, gpt_oss, logits, qwen3

TOKENS = torch.arange(1, 12)[None]
BOTH = pytest.mark.parametrize("config", [qwen3, gpt_oss], ids=["straight", "transposed"])


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()
    own._warned.clear()


@BOTH
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of its own rank pattern
def test_lora_on_attention_and_experts_trains_as_with_the_models_own(config: Callable[[], Any]) -> None:
    """PEFT makes the experts' weights a parametrisation: another tensor at every call, with a graph of its own."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    model = peft.get_peft_model(build(config()), lora)
    layers = model.config.num_hidden_layers
    results: list[tuple[Tensor, dict[str, Tensor]]] = []
    for implementation in ("eager", "moe_dispatch", "moe_dispatch"):
        model.base_model.model.set_experts_implementation(implementation)
        model.zero_grad()
        before = calls()
        out = model(TOKENS).logits
        assert calls() == before + (layers if implementation == "moe_dispatch" else 0)
        out.square().mean().backward()
        adapted = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
        assert all(gradient is not None and gradient.any() for gradient in adapted.values())
        results.append((out.detach(), {name: gradient.clone() for name, gradient in adapted.items()}))
    assert any("experts" in name for name in results[0][1])
    assert [line.state for line in report(model).layers] == ["dispatched"] * layers
    for out, gradients in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=1e-4, atol=1e-4)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][name], rtol=1e-3, atol=1e-6, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, results[0][0], rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize("by_parent", [True, False], ids=["hook on the block", "hook on the layer"])
def test_an_offloaded_model_is_dispatched_and_keeps_nothing(
    config: Callable[[], Any], by_parent: bool, tmp_path: Path
) -> None:
    """A hook on a parent brings all weights below it before its call and frees them after it."""
    accelerate = pytest.importorskip("accelerate")
    model = build(config())
    expected = logits(model, "eager")
    model.set_experts_implementation("moe_dispatch")
    experts = experts_of(model)
    blocks = [type(model.model.layers[0]).__name__] if by_parent else []
    accelerate.disk_offload(
        model, tmp_path, execution_device=torch.device("cpu"), preload_module_classes=[*blocks, type(experts).__name__]
    )
    memory: list[weakref.ref[torch.UntypedStorage]] = []
    innermost = "forward" if by_parent else "_old_forward"  # what the hook of the layer itself calls
    inner = getattr(experts, innermost)

    def observed(*arguments: Any, **others: Any) -> Any:
        memory.append(weakref.ref(experts.gate_up_proj.untyped_storage()))
        return inner(*arguments, **others)

    setattr(experts, innermost, observed)
    for _ in range(5):
        before = calls()
        with torch.no_grad():
            out = model(TOKENS).logits
        assert calls() == before + model.config.num_hidden_layers
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        assert all(weight.is_meta for weight in experts.parameters())
    assert len(memory) == 5
    assert not any(storage() for storage in memory)
