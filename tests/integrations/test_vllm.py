"""The vLLM plugin against the installed vLLM's own classes, on a CPU: a real layer, method and modular kernel.

Runs where vLLM is installed (`nox -s vllm`); the engine itself is tested on a GPU, by benchmarks/record/engine_vllm.py.
Without a GPU vLLM has no platform of its own, so the tests describe an sm_90 one, and `moe_forward` runs its reference.
"""

import itertools
import logging
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from moe_dispatch import ExpertWeights, MoEDispatchWarning, moe_forward, stats
from moe_dispatch.integrations.vllm import VARIABLE, register, takeover, warm_up
from moe_dispatch.settings import settings
from tests.support.fakes import Honest, Raising, ranked

E, TOPK, K, N, M = 8, 2, 256, 128, 5


class AbsentModule(types.ModuleType):
    """Stands in for an extension module that is imported and never called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_args, **_options: None


@pytest.fixture(scope="module", autouse=True)
def described_platform() -> Iterator[None]:
    """vLLM on a machine without a GPU, told that it has an sm_90 device."""
    from vllm import platforms
    from vllm.platforms.interface import DeviceCapability

    if torch.cuda.is_available():
        yield
        return
    unspecified = type(platforms.current_platform)
    # Attention is not under test, and its extension modules need a driver to be imported.
    attention = AbsentModule("vllm.vllm_flash_attn")
    sys.modules.setdefault("vllm.vllm_flash_attn", attention)
    # vLLM asks these of its extension when modules are imported, and the extension needs a driver.
    library = cast("Any", torch.library).Library("_C", "FRAGMENT")
    for question in (
        "cutlass_scaled_mm_supports_fp8",
        "cutlass_scaled_mm_supports_block_fp8",
        "cutlass_group_gemm_supported",
    ):
        library.define(f"{question}(int capability) -> bool")
        library.impl(question, lambda capability: False, "CompositeExplicitAutograd")

    class Described(unspecified):  # type: ignore[misc, valid-type]
        device_name = "described"
        device_type = "cpu"
        dispatch_key = "CPU"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(9, 0)

        def is_cuda(self) -> bool:
            return True

        def is_cuda_alike(self) -> bool:
            return True

    before = platforms._current_platform
    platforms._current_platform = Described()
    yield
    platforms._current_platform = before


@pytest.fixture(scope="module", autouse=True)
def parallel_state(described_platform: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.v1.worker import workspace

    config = VllmConfig()
    config.scheduler_config.max_num_batched_tokens = 16  # so many are warmed up for
    with set_current_vllm_config(config):
        store = tmp_path_factory.mktemp("store") / "store"
        parallel_state.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
        workspace.init_workspace_manager(torch.device("cpu"))
        yield config
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The plugin registered, and what it did forgotten afterwards."""
    from vllm.model_executor.custom_op import op_registry_oot

    before = dict(op_registry_oot)
    monkeypatch.setenv(VARIABLE, "1")
    takeover.TAKEOVER.taken.clear()
    takeover.TAKEOVER.left.clear()
    warm_up._done.clear()
    register()
    yield
    op_registry_oot.clear()
    op_registry_oot.update(before)


def make_layer(quant_config: Any = None, **options: Any) -> Any:
    """A layer of the installed vLLM: its FusedMoE up to 0.22, the RoutedExperts inside one from 0.24 on."""
    from vllm.model_executor.layers import fused_moe

    make = getattr(fused_moe, "FusedMoEFactory", None) or fused_moe.FusedMoE  # renamed by 0.33
    layer = make(
        num_experts=E, top_k=TOPK, hidden_size=K, intermediate_size=N, params_dtype=torch.bfloat16,
        quant_config=quant_config, prefix=f"layer{next(numbers)}", **options,
    )  # fmt: skip
    return getattr(layer, "routed_experts", layer)


numbers = itertools.count()


def run(layer: Any, x: Tensor, weights: Tensor, ids: Tensor, *, weighted: bool = False) -> Tensor:
    """A loaded layer's first call."""
    layer.quant_method.process_weights_after_loading(layer)
    return call(layer, x, weights, ids, weighted=weighted)


def call(layer: Any, x: Tensor, weights: Tensor, ids: Tensor, *, weighted: bool = False) -> Tensor:
    """A call through vLLM's modular kernel; `weighted` if the router's weights go to the input."""
    out: Tensor = layer.quant_method.moe_kernel.apply(
        hidden_states=x, w1=layer.w13_weight, w2=layer.w2_weight, topk_weights=weights, topk_ids=ids,
        activation=layer.activation, global_num_experts=E, expert_map=None, apply_router_weight_on_input=weighted,
    )  # fmt: skip
    return out


def draw() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator).bfloat16()
    weights = torch.rand(M, TOPK, generator=generator)
    ids = torch.stack([torch.randperm(E, generator=generator)[:TOPK] for _ in range(M)]).int()
    return x, weights, ids


def test_a_bf16_layer_runs_through_moe_forward() -> None:
    layer = make_layer()
    for weight in (layer.w13_weight, layer.w2_weight):
        weight.data.normal_(std=0.05)
    x, weights, ids = draw()
    out = run(layer, x, weights, ids)
    expected = moe_forward(x, ExpertWeights(layer.w13_weight.data, layer.w2_weight.data), weights, ids)
    assert torch.equal(out, expected)
    assert takeover.TAKEOVER.taken.total() == 1
    assert not takeover.TAKEOVER.left


def test_a_block_fp8_layer_runs_through_moe_forward() -> None:
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    layer = make_layer(Fp8Config(True, "dynamic", weight_block_size=[128, 128]))
    experts = ExpertWeights.quantize(torch.randn(E, 2 * N, K) / 16, torch.randn(E, K, N) / 16)
    layer.w13_weight.data.copy_(experts.gate_up)
    layer.w2_weight.data.copy_(experts.down)
    layer.w13_weight_scale_inv.data.copy_(experts.gate_up_scale)
    layer.w2_weight_scale_inv.data.copy_(experts.down_scale)
    x, weights, ids = draw()
    out = run(layer, x, weights, ids)
    assert torch.equal(out, moe_forward(x, experts, weights, ids))
    assert "block FP8" in next(iter(takeover.TAKEOVER.taken))


def test_tensor_parallelism_leaves_each_gpu_its_columns() -> None:
    layer = make_layer(tp_size=2)
    assert f"N={N // 2} " in next(iter(takeover.TAKEOVER.taken))
    for weight in (layer.w13_weight, layer.w2_weight):
        weight.data.normal_(std=0.05)
    assert layer.w2_weight.shape == (E, K, N // 2)
    x, weights, ids = draw()
    expected = moe_forward(x, ExpertWeights(layer.w13_weight.data, layer.w2_weight.data), weights, ids)
    assert torch.equal(run(layer, x, weights, ids), expected)


def test_router_weights_that_were_applied_to_the_input_are_not_applied_again() -> None:
    layer = make_layer()
    for weight in (layer.w13_weight, layer.w2_weight):
        weight.data.normal_(std=0.05)
    x, weights, ids = draw()
    weights, ids = weights[:, :1], ids[:, :1]
    out = run(layer, x, weights, ids, weighted=True)
    plain = ExpertWeights(layer.w13_weight.data, layer.w2_weight.data)
    assert torch.equal(out, moe_forward(x * weights.bfloat16(), plain, torch.ones(M, 1), ids))


def test_the_output_is_written_where_vllm_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not to a workspace first, from which vLLM would copy it."""
    from moe_dispatch.integrations.vllm import experts as ours

    outputs: list[Tensor] = []

    def watched(*arguments: Any, out: Tensor) -> Tensor:
        outputs.append(out)
        return moe_forward(*arguments, out=out)

    monkeypatch.setattr(ours, "moe_forward", watched)
    layer = make_layer()
    for weight in (layer.w13_weight, layer.w2_weight):
        weight.data.normal_(std=0.05)
    out = run(layer, *draw())
    (written,) = outputs
    assert written.data_ptr() == out.data_ptr()
    assert out.isfinite().all()


def test_no_tokens_leave_nothing_behind() -> None:
    layer = make_layer()
    for weight in (layer.w13_weight, layer.w2_weight):
        weight.data.normal_(std=0.05)
    x, weights, ids = draw()
    first = run(layer, x, weights, ids)
    assert call(layer, x[:0], weights[:0], ids[:0]).shape == (0, K)
    assert torch.equal(call(layer, x, weights, ids), first)


def test_a_reloaded_layer_uses_its_new_weights() -> None:
    layer = make_layer()
    for weight in (layer.w13_weight, layer.w2_weight):
        weight.data.normal_(std=0.05)
    x, weights, ids = draw()
    first = run(layer, x, weights, ids)
    layer.w2_weight.data = layer.w2_weight.data * 2
    second = call(layer, x, weights, ids)
    torch.testing.assert_close(second.float(), 2 * first.float())


def test_a_layer_that_does_not_fit_stays_vllms_own(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vllm.moe_dispatch"):
        logging.getLogger("vllm").propagate = True
        layer = make_layer(activation="swiglustep")
    assert layer.quant_method.experts_cls.__name__ != "MoeDispatchExperts"
    assert "swiglustep" in next(iter(takeover.TAKEOVER.left))
    assert "left to vLLM: 1" in caplog.text


def test_what_was_not_calibrated_is_chosen_otherwise_and_the_log_says_how(caplog: pytest.LogCaptureFixture) -> None:
    layer = make_layer()
    for weight in (layer.w13_weight, layer.w2_weight):
        weight.data.normal_(std=0.05)
    with caplog.at_level(logging.INFO, logger="vllm.moe_dispatch"):
        logging.getLogger("vllm").propagate = True
        run(layer, *draw())
        call(layer, *draw())
    (line,) = (record.getMessage() for record in caplog.records if "warmed up" in record.getMessage())
    assert f"`moe-dispatch calibrate --model {E},{TOPK},{K},{N} --dtype bf16` measures this layer here" in line
    assert "by rules" in line


def test_a_backend_that_fails_in_the_warm_up_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_DISPATCH_POLICY", "fixed")
    settings.cache_clear()
    layer = make_layer()
    for weight in (layer.w13_weight, layer.w2_weight):
        weight.data.normal_(std=0.05)
    x, weights, ids = draw()
    experts = ExpertWeights(layer.w13_weight.data, layer.w2_weight.data)
    with ranked(Raising, Honest):
        with pytest.warns(MoEDispatchWarning, match="'honest' runs instead"):
            warm_up.warm_up_once(experts, TOPK, x.dtype)
        before = stats()["raising"]
        out = run(layer, x, weights, ids)
        assert stats()["raising"] == before
    assert torch.equal(out, moe_forward(x, experts, weights, ids, backend="reference"))


def test_off_it_registers_nothing_and_registering_twice_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.custom_op import op_registry_oot

    register()
    ours = [cls for cls in op_registry_oot.values() if getattr(cls, "_moe_dispatch", False)]
    assert len(ours) == 1
    op_registry_oot.clear()
    for off in ("", "0", "off"):
        monkeypatch.setenv(VARIABLE, off)
        register()
    assert not op_registry_oot


def test_another_plugins_layer_is_respected(caplog: pytest.LogCaptureFixture) -> None:
    from vllm.model_executor.custom_op import op_registry_oot

    name = next(iter(op_registry_oot))
    op_registry_oot[name] = type("Foreign", (), {})
    with caplog.at_level(logging.WARNING):
        register()
    assert op_registry_oot[name].__name__ == "Foreign"


def test_the_plugin_is_announced_to_vllm() -> None:
    code = "import importlib.metadata as m; print([e.value for e in m.entry_points(group='vllm.general_plugins')])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    if "moe_dispatch" not in done.stdout:
        pytest.skip("moe-dispatch is on the path here, not installed")
    assert "moe_dispatch.integrations.vllm:register" in done.stdout
