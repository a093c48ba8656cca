"""The weights of transformers' layers: that they are read in place, and that nothing outlives its model."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")

from moe_dispatch.experts import ExpertWeights
from moe_dispatch.integrations.transformers import own, register
from moe_dispatch.integrations.transformers.takeover import take_over
from tests.integrations.transformers_models import call_of, calls, eager, gpt_oss, layer, qwen3

BOTH = pytest.mark.parametrize("config", [qwen3, gpt_oss], ids=["straight", "transposed"])


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """Without what was made before: the modules of transformers take a collection two seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()
    own._warned.clear()


@torch.no_grad()
def dispatched(module: Any) -> torch.Tensor:
    """The output of one dispatched call."""
    before = calls()
    out: torch.Tensor = module(*call_of(module))
    assert calls() == before + 1
    return out


def weights_of(module: Any) -> ExpertWeights:
    with torch.no_grad():
        experts = take_over(module, torch.float32).experts
    assert experts is not None
    return experts


def scale_in_place(module: Any) -> None:
    with torch.no_grad():
        module.down_proj.mul_(3.0)


def replace(module: Any) -> None:
    module.down_proj = torch.nn.Parameter(torch.randn_like(module.down_proj))


def replace_memory(module: Any) -> None:
    module.down_proj.data = torch.randn_like(module.down_proj)


@BOTH
@pytest.mark.parametrize("change", [scale_in_place, replace, replace_memory])
def test_changed_weights_are_seen(config: Callable[[], Any], change: Callable[[Any], None]) -> None:
    module = layer(config())
    first = dispatched(module)
    change(module)
    second = dispatched(module)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, eager(module, call_of(module)), rtol=1e-4, atol=1e-4)


@BOTH
def test_unchanged_weights_are_wrapped_once_and_not_copied(config: Callable[[], Any]) -> None:
    module = layer(config())
    dispatched(module)
    kept = weights_of(module)
    dispatched(module)
    assert weights_of(module) is kept
    assert kept.gate_up.data_ptr() == module.gate_up_proj.data_ptr()
    assert kept.down.data_ptr() == module.down_proj.data_ptr()


def test_weights_that_no_backend_reads_in_place_keep_the_own_forward() -> None:
    module = layer(gpt_oss())
    module.down_proj.data = module.down_proj.data.mT.contiguous().mT
    assert "not contiguous" in take_over(module, torch.float32).reason


def storages(module: Any) -> list["weakref.ref[torch.UntypedStorage]"]:
    """The memory of the module's weights; a storage's Python object lives as long as the memory."""
    return [weakref.ref(weight.untyped_storage()) for weight in module.parameters()]


def convert(module: Any) -> None:
    module.to(torch.float64)


def call_functionally(module: Any) -> None:
    other = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    module_memory = storages(module)
    with torch.no_grad():
        torch.func.functional_call(module, other, call_of(module))
    assert all(memory() is not None for memory in module_memory)
    for name in list(module._parameters):
        delattr(module, name)


def offload(module: Any) -> None:
    """What accelerate's hooks on a parent module do after its call."""
    for name, weight in list(module.named_parameters()):
        setattr(module, name, torch.nn.Parameter(weight.to("meta")))


@BOTH
@pytest.mark.parametrize("move", [convert, call_functionally, offload])
def test_weights_that_moved_leave_no_memory_behind(config: Callable[[], Any], move: Callable[[Any], None]) -> None:
    module = layer(config())
    dispatched(module)
    memory = storages(module)
    gc.collect()  # what Triton's interpreter has left of a launch
    gc.disable()  # what is read in place may not wait for a collection
    try:
        move(module)
        assert [each() for each in memory] == [None] * len(memory)
    finally:
        gc.enable()


@pytest.mark.parametrize("call", ["eager", "recorded", "compiled"])
@BOTH
def test_torch_may_swap_the_parameters(config: Callable[[], Any], call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses tensors that are referred to weakly, and is asked for by a flag before the first call."""
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    module = layer(config())
    torch.compiler.reset()
    run: Any = torch.compile(module, backend="aot_eager", fullgraph=True) if call == "compiled" else module
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        module.to(dtype)
        arguments = call_of(module)
        before = calls()
        with torch.set_grad_enabled(call != "eager"):
            out = run(*arguments)
        assert calls() == before + 1
        if call != "eager":
            out.sum().backward()
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out.detach(), eager(module, arguments).detach(), rtol=tolerance, atol=tolerance)
        del out
        module.load_state_dict({name: weight.detach() / 2 for name, weight in module.named_parameters()})


@BOTH
def test_a_deleted_model_leaves_nothing_behind(config: Callable[[], Any]) -> None:
    module = layer(config())
    dispatched(module)
    kept, alive = weakref.ref(weights_of(module)), weakref.ref(module)
    memory = storages(module)
    del module
    gc.collect()
    assert alive() is None
    assert kept() is None
    assert not any(each() for each in memory)


def test_transposed_weights_of_any_shape_are_read_in_place() -> None:
    """torch's grouped products, transformers' as well, refuse rows that do not start on 16 bytes."""
    config = gpt_oss()
    config.intermediate_size = 30
    with torch.inference_mode():
        module = layer(config)
        torch.testing.assert_close(dispatched(module), eager(module, call_of(module)), rtol=1e-4, atol=1e-5)
