"""The vLLM plugin against the installed vLLM's own classes, on a CPU: a real layer, method and modular kernel.

Runs where vLLM is installed (`nox -s vllm`); the engine itself is tested on a GPU, by benchmarks/record/engine_vllm.py.
Without a GPU vLLM has no platform of its own, so the tests describe an sm_90 one, and `moe_forward` runs its reference.
"""

import abc
import contextlib
import dataclasses
import functools
import importlib
import inspect
import itertools
import logging
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from moe_dispatch import ExpertWeights, MoEDispatchWarning, moe_forward, stats
from moe_dispatch.integrations import engine_warm_up as warm_up
from moe_dispatch.integrations.engine_takeover import kernel_reasons
from moe_dispatch.integrations.vllm import VARIABLE, register, takeover
from moe_dispatch.machine import Machine
from moe_dispatch.numerics import quantize_blocks, quantize_channels
from moe_dispatch.problem import MoEProblem
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
    # vLLM loads two projections with a scale each by quantising both anew, for which it has a CUDA kernel only.
    library.define("static_scaled_fp8_quant(Tensor! out, Tensor input, Tensor scale, int[]? group_shape=None) -> ()")
    library.impl("static_scaled_fp8_quant", _quantize_by_a_scale, "CPU")

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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platforms, "_current_platform", Described())
        # A torch built for CPUs raises here, one built for CUDA does nothing without a GPU.
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)
        yield


def _quantize_by_a_scale(out: Tensor, values: Tensor, scale: Tensor, _shape: list[int] | None = None) -> None:
    out.copy_((values.float() / scale).clamp(-448, 448))


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
    cls, name = wrapped_method()
    monkeypatch.setattr(cls, name, vars(cls)[name])  # so that it is put back
    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    takeover.TAKEOVER.taken.clear()
    takeover.TAKEOVER.left.clear()
    takeover.TAKEOVER._told = (0, 0)
    takeover.TAKEOVER.warmed.clear()
    register()
    yield
    op_registry_oot.clear()
    op_registry_oot.update(before)


def make_layer(quant_config: Any = None, cls: Any = None, **options: Any) -> Any:
    """A layer of the installed vLLM, or of `cls`: a FusedMoE up to 0.23, the RoutedExperts inside one from 0.24 on."""
    make = layer_factory()
    if cls is not None and inspect.isclass(make):
        make = cls
    elif cls is not None:
        options["routed_experts_cls"] = cls
    layer = make(
        num_experts=E, top_k=TOPK, hidden_size=K, intermediate_size=N, params_dtype=torch.bfloat16,
        quant_config=quant_config, prefix=f"layer{next(numbers)}", **options,
    )  # fmt: skip
    return getattr(layer, "routed_experts", layer)


def plain_layer(**options: Any) -> Any:
    layer = make_layer(**options)
    fill_randomly(layer, 0.05)
    return layer


def fill_randomly(layer: Any, std: float) -> None:
    for weight in (layer.w13_weight, layer.w2_weight):
        weight.data.normal_(std=std)


def experts_of(layer: Any, activation: Any = "silu") -> ExpertWeights:
    return ExpertWeights(layer.w13_weight.data, layer.w2_weight.data, activation=activation)


def wrapped_method() -> tuple[Any, str]:
    """The class of vLLM's layers, and its method that the plugin wraps."""
    try:
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    except ImportError:
        from vllm.model_executor.layers.fused_moe.layer import FusedMoE

        return FusedMoE, "__init__"
    return RoutedExperts, "_get_quant_method"


def layer_factory() -> Any:
    from vllm.model_executor.layers import fused_moe

    return getattr(fused_moe, "FusedMoEFactory", None) or fused_moe.FusedMoE  # renamed by 0.33


def skip_what_is_unknown(options: dict[str, Any]) -> None:
    """Skip where this vLLM's layers do not have such options."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    unknown = options.keys() - inspect.signature(layer_factory()).parameters.keys()
    activation = options.get("activation", "silu")
    if unknown or activation not in {member.value for member in MoEActivation}:
        pytest.skip(f"this vLLM has no {', '.join(unknown) or activation}")


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
    layer = plain_layer()
    x, weights, ids = draw()
    out = run(layer, x, weights, ids)
    expected = moe_forward(x, experts_of(layer), weights, ids)
    assert torch.equal(out, expected)
    assert takeover.TAKEOVER.taken.total() == 1
    assert not takeover.TAKEOVER.left


def compressed_tensors(strategy: str, *, dynamic: bool = True) -> Any:
    """The config of a checkpoint that llm-compressor wrote."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    each: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
    weights = {**each, "strategy": strategy, "dynamic": False}
    if strategy == "block":
        weights["block_structure"] = [128, 128]
    activations = {**each, "strategy": "token" if strategy == "channel" else "tensor", "dynamic": dynamic}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return CompressedTensorsConfig.from_config(
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    )


def deepseek_fp8(*block: int, scheme: str = "dynamic") -> Any:
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    return Fp8Config(True, scheme, weight_block_size=list(block) or None)


def fill(layer: Any, weights: dict[str, Tensor]) -> None:
    """Load what a checkpoint holds, whatever the layer's method calls its scales."""
    for name, tensor in weights.items():
        parameter = getattr(layer, name, None)
        (getattr(layer, f"{name}_inv") if parameter is None else parameter).data.copy_(tensor)


FP8_LAYERS: dict[str, tuple[Callable[[], Any], str]] = {
    "block FP8": (lambda: deepseek_fp8(128, 128), "block"),
    "block FP8 of llm-compressor": (lambda: compressed_tensors("block"), "block"),
    "by row": (lambda: compressed_tensors("channel"), "channel"),
    "by tensor": (deepseek_fp8, "tensor"),
    "by tensor, of llm-compressor": (lambda: compressed_tensors("tensor"), "tensor"),
}


def fp8_weights(form: str) -> dict[str, Tensor]:
    """e4m3 weights and scales as a checkpoint holds them, gate and up with a scale of their own."""
    weights: dict[str, Tensor] = {}
    for name, rows, columns in (("w13", 2 * N, K), ("w2", K, N)):
        values = torch.randn(E, rows, columns, generator=torch.Generator().manual_seed(rows)) / 16
        if form == "tensor":
            scale = torch.full((E, 2 if name == "w13" else 1), 2**-8)
            scale[:, 0] *= 2
            codes, scale = values.div(2**-8).clamp(-448, 448).to(torch.float8_e4m3fn), scale.squeeze(1)
        else:
            codes, scale = (quantize_blocks if form == "block" else quantize_channels)(values)
            scale = scale if form == "block" else scale.unsqueeze(2)
        weights |= {f"{name}_weight": codes, f"{name}_weight_scale": scale}
    return weights


@pytest.mark.parametrize("case", FP8_LAYERS)
def test_an_fp8_layer_runs_through_moe_forward(case: str) -> None:
    make_config, form = FP8_LAYERS[case]
    layer = make_layer(make_config())
    weights = fp8_weights(form)
    fill(layer, weights)
    gate_up, down = weights["w13_weight"].clone(), weights["w2_weight"].clone()
    gate_up_scale, down_scale = weights["w13_weight_scale"], weights["w2_weight_scale"]
    if form == "tensor":  # vLLM keeps the larger scale of gate and up, which makes the codes of up half as large
        gate_up[:, N:] = (gate_up[:, N:].float() / 2).to(gate_up.dtype)
        gate_up_scale = gate_up_scale[:, 0]
    experts = ExpertWeights(gate_up, down, gate_up_scale=gate_up_scale.contiguous(), down_scale=down_scale)
    x, topk_weights, ids = draw()
    out = run(layer, x, topk_weights, ids)
    assert torch.equal(out, moe_forward(x, experts, topk_weights, ids))
    (described,) = takeover.TAKEOVER.taken
    assert ("block FP8" if form == "block" else "FP8 scaled by row or tensor") in described


def test_scales_of_tensors_stay_where_graphs_read_them_when_weights_are_reloaded() -> None:
    layer = make_layer(deepseek_fp8())
    state = fp8_weights("tensor")
    x, topk_weights, ids = draw()
    outputs, scales = [], []
    for factor in (1, 2):
        for name in ("w13_weight_scale", "w2_weight_scale"):  # as a reload finds them, in the checkpoint's shapes
            loaded = state[name] * (factor if name == "w2_weight_scale" else 1)
            setattr(layer, name, torch.nn.Parameter(loaded, requires_grad=False))
        fill(layer, {name: tensor for name, tensor in state.items() if not name.endswith("scale")})
        outputs.append(run(layer, x, topk_weights, ids).float())
        scales.append(layer.quant_method.moe_kernel.fused_experts._experts.down_scale.data_ptr())
    torch.testing.assert_close(outputs[1], 2 * outputs[0])
    assert scales[0] == scales[1]


# Options of a layer, and what they become: (alpha, limit, shift) or the two caps.
GATES: dict[str, tuple[dict[str, Any], str]] = {
    "DeepSeek-V4": ({"activation": "silu", "swiglu_limit": 10.0}, "swiglu(limit=10)"),
    "MiniMax-M3": (
        {"activation": "swigluoai_uninterleave", "swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0},
        "swiglu_oai",
    ),
    "without beta": ({"activation": "swigluoai_uninterleave", "swiglu_limit": 0.5}, "swiglu(limit=0.5)"),
    "Kimi": (
        {"activation": "situ", "activation_situ_beta": 4.0, "activation_situ_linear_beta": 25.0},
        "swiglu(gate_cap=4,up_cap=25)",
    ),
}


@pytest.mark.parametrize("model", GATES)
def test_gates_with_parameters_are_taken_over(model: str) -> None:
    options, activation = GATES[model]
    skip_what_is_unknown(options)
    layer = make_layer(**options)
    if not hasattr(layer.moe_config, "swiglu_limit"):  # up to 0.21 it is handed to the layer and not applied
        assert "swiglu_limit=10.0" in next(iter(takeover.TAKEOVER.left))
        return
    fill_randomly(layer, 0.5)
    x, weights, ids = draw()
    out = run(layer, x, weights, ids)
    assert torch.equal(out, moe_forward(x, experts_of(layer, activation), weights, ids))
    if activation.startswith("swiglu("):
        assert not torch.equal(out, moe_forward(x, experts_of(layer), weights, ids))
        assert activation in next(iter(takeover.TAKEOVER.taken))


def test_tensor_parallelism_leaves_each_gpu_its_columns() -> None:
    layer = plain_layer(tp_size=2)
    assert f"N={N // 2} " in next(iter(takeover.TAKEOVER.taken))
    assert layer.w2_weight.shape == (E, K, N // 2)
    x, weights, ids = draw()
    expected = moe_forward(x, experts_of(layer), weights, ids)
    assert torch.equal(run(layer, x, weights, ids), expected)


def test_router_weights_that_were_applied_to_the_input_are_not_applied_again() -> None:
    layer = plain_layer()
    x, weights, ids = draw()
    weights, ids = weights[:, :1], ids[:, :1]
    out = run(layer, x, weights, ids, weighted=True)
    assert torch.equal(out, moe_forward(x * weights.bfloat16(), experts_of(layer), torch.ones(M, 1), ids))


def test_the_output_is_written_where_vllm_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not to a workspace first, from which vLLM would copy it."""
    from moe_dispatch.integrations.vllm import experts as ours

    outputs: list[Tensor] = []

    def watched(*arguments: Any, out: Tensor) -> Tensor:
        outputs.append(out)
        return moe_forward(*arguments, out=out)

    monkeypatch.setattr(ours, "moe_forward", watched)
    layer = plain_layer()
    out = run(layer, *draw())
    (written,) = outputs
    assert written.data_ptr() == out.data_ptr()
    assert out.isfinite().all()


def test_no_tokens_leave_nothing_behind_and_a_reloaded_layer_uses_its_new_weights() -> None:
    layer = plain_layer()
    x, weights, ids = draw()
    first = run(layer, x, weights, ids)
    assert call(layer, x[:0], weights[:0], ids[:0]).shape == (0, K)
    assert torch.equal(call(layer, x, weights, ids), first)
    layer.w2_weight.data = layer.w2_weight.data * 2
    torch.testing.assert_close(call(layer, x, weights, ids).float(), 2 * first.float())


LEFT: dict[str, tuple[dict[str, Any], str]] = {
    "an activation that is not ours": ({"activation": "swiglustep"}, "activation 'swiglustep'"),
    "another alpha": ({"swiglu_alpha": 1.5}, "swiglu_alpha=1.5 is not built into activation 'silu'"),
    "another limit than gpt-oss's": (
        {"activation": "swigluoai", "swiglu_limit": 5.0}, "swiglu_limit=5.0"
    ),
    "static scales of activations": (
        {"quant_config": lambda: compressed_tensors("tensor", dynamic=False)}, "static scales of activations",
    ),
    "static scales, in vLLM's own config": (
        {"quant_config": lambda: deepseek_fp8(scheme="static")}, "static scales of activations",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_a_layer_that_does_not_fit_stays_vllms_own(case: str, caplog: pytest.LogCaptureFixture) -> None:
    options, reason = LEFT[case]
    skip_what_is_unknown(options)
    with caplog.at_level(logging.INFO, logger="vllm.moe_dispatch"):
        layer = make_layer(**{name: value() if callable(value) else value for name, value in options.items()})
    assert layer.quant_method.experts_cls.__name__ != "MoeDispatchExperts"
    assert reason in next(iter(takeover.TAKEOVER.left))
    assert "left to vLLM: 1" in caplog.text


def test_a_gpu_without_kernels_of_ours_leaves_the_layer_to_vllm() -> None:
    """Turing has none, and there the reference would loop over experts."""
    h200 = Machine.load("h200")
    turing = h200.model_copy(update={"capability": (7, 5), "name": "Tesla T4"})
    problem = MoEProblem(M=1, K=K, N=N, E=E, topk=TOPK, dtype="fp16", act_dtype="fp16")
    assert not kernel_reasons(problem, h200)
    (reason,) = kernel_reasons(dataclasses.replace(problem, capability=(7, 5)), turing)
    assert "no backend but reference runs it on this GPU" in reason
    assert "compute capability 8.0" in reason


@pytest.mark.parametrize(("activation", "model"), [("silu", f"{E},{TOPK},{K},{N}"), ("gelu", "FOLDER_OF_THE_MODEL")])
def test_what_was_not_calibrated_is_chosen_otherwise_and_the_log_says_how(
    activation: str, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    layer = plain_layer(activation=activation)
    with caplog.at_level(logging.INFO, logger="vllm.moe_dispatch"):
        run(layer, *draw())
        call(layer, *draw())
    (line,) = (record.getMessage() for record in caplog.records if "warmed up" in record.getMessage())
    assert f"`moe-dispatch calibrate --model {model} --dtype bf16` measures this layer here" in line
    assert "by rules" in line


def test_a_second_engine_is_warmed_up_for_its_own_batches(
    parallel_state: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO, logger="vllm.moe_dispatch"):
        first = plain_layer()
        run(first, *draw())
        monkeypatch.setattr(parallel_state.scheduler_config, "max_num_batched_tokens", 32)
        run(plain_layer(), *draw())
        call(first, *draw())
    lines = [record.getMessage() for record in caplog.records if "warmed up" in record.getMessage()]
    assert [line.partition("M ≤ ")[2].partition(",")[0] for line in lines] == ["16", "32"]


@pytest.mark.usefixtures("fixed_policy")
def test_a_backend_that_fails_in_the_warm_up_is_replaced() -> None:
    layer = plain_layer()
    x, weights, ids = draw()
    experts = experts_of(layer)
    with ranked(Raising, Honest):
        with pytest.warns(MoEDispatchWarning, match="'honest' runs instead"):
            warm_up.prepare(takeover.TAKEOVER, takeover.TAKEOVER.batches, experts, TOPK, x.dtype, into_out=True)
        before = stats()["raising"]
        out = run(layer, x, weights, ids)
        assert stats()["raising"] == before
    assert torch.equal(out, moe_forward(x, experts, weights, ids, backend="reference"))


def test_off_it_changes_nothing_and_registering_twice_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    cls, name = wrapped_method()
    ours = vars(cls)[name]
    register()
    assert vars(cls)[name] is ours
    monkeypatch.setattr(cls, name, vllms_own := ours.__wrapped__)
    for off in ("", "0", "off"):
        monkeypatch.setenv(VARIABLE, off)
        register()
    assert vars(cls)[name] is vllms_own


def test_the_log_says_that_the_plugin_is_on(caplog: pytest.LogCaptureFixture) -> None:
    """Of a model whose layers are of another kind nothing else would be said."""
    with caplog.at_level(logging.INFO, logger="vllm.moe_dispatch"):
        register()
    assert f"a line for each model says which {wrapped_method()[0].__name__} it runs" in caplog.text


def test_a_vllm_without_the_method_is_refused_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cls, name = wrapped_method()
    monkeypatch.delattr(cls, name)
    with caplog.at_level(logging.WARNING):
        register()
    assert f"expert layers cannot be replaced (KeyError: '{name}')" in caplog.text


def one_argument_more(*_: Any, lora: Any) -> None:
    """Stands for a method that vLLM has changed."""


# Altered classes of vLLM's by the attribute that is altered: its value, None for one that is gone, and the warning.
CONTRACTS: dict[str, tuple[str, Any, str]] = {
    "another argument": ("FusedMoEExpertsModular.apply", one_argument_more, "FusedMoEExpertsModular.apply takes no"),
    "a sum with another argument": ("TopKWeightAndReduce.apply", one_argument_more, "TopKWeightAndReduce.apply takes"),
    "a new method": ("FusedMoEExpertsModular.route", abc.abstractmethod(one_argument_more), "Modular wants route"),
    "no such method": ("FusedMoEExperts.expects_unquantized_inputs", None, "has no expects_unquantized_inputs"),
    "no such class": ("FusedMoEExpertsModular", None, "FusedMoEExpertsModular"),
}


@pytest.mark.parametrize("case", CONTRACTS)
def test_a_vllm_with_another_contract_keeps_its_layers_and_is_told_why(
    case: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import vllm.model_executor.layers.fused_moe.modular_kernel as mk

    from moe_dispatch.integrations import vllm as adapter

    make_layer()  # so that vLLM has imported its own experts
    path, value, said = CONTRACTS[case]
    *above, name = path.split(".")
    owner = functools.reduce(getattr, above, mk)
    if value is None:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, value, raising=False)
        monkeypatch.setattr(owner, "__abstractmethods__", owner.__abstractmethods__)
        abc.update_abstractmethods(owner)
    cls, method = wrapped_method()
    monkeypatch.setattr(cls, method, vllms_own := vars(cls)[method].__wrapped__)
    # As a process that starts with that vLLM imports them.
    for module in ("experts", "layers"):
        monkeypatch.setattr(adapter, module, getattr(adapter, module))
        monkeypatch.delitem(sys.modules, f"moe_dispatch.integrations.vllm.{module}")
    with caplog.at_level(logging.WARNING):
        register()
    assert said in caplog.text
    assert "the engine runs its own" in caplog.text
    assert vars(cls)[method] is vllms_own
    assert make_layer().quant_method.experts_cls.__name__ != "MoeDispatchExperts"


def test_arguments_by_which_vllm_chooses_a_method_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    cls, name = wrapped_method()
    if name == "__init__":
        pytest.skip("the plugin wraps the constructor here, with whatever arguments")
    own = vars(cls)[name].__wrapped__

    def altered(self: Any, prefix: str, *, role: str) -> Any:
        assert role == "experts"
        return own(self, prefix, None, self.moe_config)

    layer = make_layer()
    monkeypatch.setattr(cls, name, altered)
    register()
    assert layer._get_quant_method("layer", role="experts").experts_cls.__name__ == "MoeDispatchExperts"
    assert takeover.TAKEOVER.taken.total() == 2


def test_arguments_with_which_vllm_makes_experts_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.model_executor.layers.fused_moe.modular_kernel as mk

    own, roles = mk.FusedMoEExperts.__init__, []

    def altered(self: Any, moe_config: Any, quant_config: Any, *, role: str) -> None:
        roles.append(role)
        own(self, moe_config, quant_config)

    layer = plain_layer()
    run(layer, *draw())
    method = layer.quant_method
    monkeypatch.setattr(mk.FusedMoEExperts, "__init__", altered)
    made = method.experts_cls(layer.moe_config, method.moe_quant_config, role="experts")
    assert type(made).__name__ == "MoeDispatchExperts"
    assert roles == ["experts"]


@pytest.mark.parametrize("renamed", ["unquantized_backend", "experts_cls", "TRITON"])
def test_a_method_that_chooses_its_kernel_otherwise_is_left_as_it_is(
    renamed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the changes would give our experts weights in the layout of another backend."""
    from moe_dispatch.integrations.vllm import layers

    monkeypatch.setenv(VARIABLE, "0")
    cls, name = wrapped_method()
    monkeypatch.setattr(cls, name, vars(cls)[name].__wrapped__)
    layer = make_layer()
    state = vars(layer.quant_method)
    if renamed == "TRITON":
        monkeypatch.setattr(layers, "UnquantizedMoeBackend", types.SimpleNamespace(OTHER="other"))
    else:
        state["another_name"] = state.pop(renamed)
    before = dict(state)
    layers.take(layer, layer.quant_method)
    assert state == before
    assert renamed in next(iter(takeover.TAKEOVER.left))
    assert not takeover.TAKEOVER.taken


def test_a_vllm_that_does_not_sum_gets_the_layer_from_its_experts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first call, which profiles memory, shows it; what is read comes later."""

    def copies(output: Tensor, fused_expert_output: Tensor, *_: Any, **_options: Any) -> None:
        output.copy_(fused_expert_output)

    layer = plain_layer()
    layer.quant_method.process_weights_after_loading(layer)
    monkeypatch.setattr(layer.quant_method.moe_kernel.prepare_finalize, "finalize", copies)
    x, weights, ids = draw()
    with caplog.at_level(logging.WARNING, logger="vllm.moe_dispatch"):
        outputs = [call(layer, x, weights, ids) for _ in range(3)]
    expected = moe_forward(x, experts_of(layer), weights, ids)
    assert torch.equal(outputs[1], expected)
    assert torch.equal(outputs[2], expected)
    assert caplog.text.count("vLLM did not sum over experts") == 1
    monkeypatch.undo()  # one that sums again gets the same
    assert torch.equal(call(layer, x, weights, ids), expected)


def test_another_plugins_layer_is_respected() -> None:
    """Also one that is registered later: vLLM takes one class a name."""
    base, _ = wrapped_method()
    base.register_oot(type("Foreign", (base,), {"__module__": "another_plugin.layers"}))
    layer = make_layer()
    assert type(layer).__name__ == "Foreign"
    assert layer.quant_method.experts_cls.__name__ != "MoeDispatchExperts"
    assert "Foreign is a layer class of another_plugin.layers" in next(iter(takeover.TAKEOVER.left))


def classes_of_models() -> list[Any]:
    """The layer classes that vLLM's models bring and that are built like any layer."""
    base, _ = wrapped_method()
    for name in ("gpt_oss", "transformers.moe", "aria"):
        with contextlib.suppress(ImportError):
            importlib.import_module(f"vllm.model_executor.models.{name}")
    plain = type("OfAModel", (base,), {"__module__": "vllm.model_executor.models.a_model"})
    others = {"config", "expert_substitution"}  # arguments of a model's own
    found = [
        cls
        for cls in base.__subclasses__()
        if cls.__module__.startswith("vllm.") and not others & inspect.signature(cls).parameters.keys()
    ]
    assert plain in found
    return found


def test_the_layer_classes_of_models_are_judged_like_any() -> None:
    """gpt-oss and the models of transformers have their own, which vLLM's registry of replaced layers passes over."""
    x, weights, ids = draw()
    for count, cls in enumerate(classes_of_models(), 1):
        layer = plain_layer(cls=cls)
        assert type(layer) is cls
        assert takeover.TAKEOVER.taken.total() == count, cls
        expected = moe_forward(x, experts_of(layer), weights, ids)
        assert torch.equal(run(layer, x, weights, ids), expected), cls


def test_a_method_of_a_models_own_stays_the_models() -> None:
    """MuseSpark's, for one, has the rows of experts normalised before they are summed."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    class OfAModel(UnquantizedFusedMoEMethod):  # type: ignore[misc]
        pass

    class ConfigOfAModel(type(deepseek_fp8())):  # type: ignore[misc]
        def get_quant_method(self, layer: Any, *_: Any, **_options: Any) -> Any:
            return OfAModel(layer.moe_config)

    layer = make_layer(ConfigOfAModel())
    assert type(layer.quant_method) is OfAModel
    assert layer.quant_method.experts_cls.__name__ != "MoeDispatchExperts"
    assert "weights stored by OfAModel" in next(iter(takeover.TAKEOVER.left))


class Halved(torch.nn.Module):
    """Stands for a model's shared experts."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5


@pytest.mark.parametrize("scaled", [False, True])
def test_vllms_runner_adds_shared_experts_and_scales_what_our_layer_returns(
    scaled: bool, parallel_state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call that a model makes: router, experts, the factor of the routed output, and shared experts."""
    from vllm.forward_context import set_forward_context

    monkeypatch.setenv("VLLM_DISABLE_SHARED_EXPERTS_STREAM", "1")  # it would be a stream of a GPU
    x, weights, ids = draw()
    runner = layer_factory()(
        num_experts=E, top_k=TOPK, hidden_size=K, intermediate_size=N, params_dtype=torch.bfloat16,
        prefix=f"layer{next(numbers)}", custom_routing_function=lambda *_, **_options: (weights.clone(), ids.clone()),
        shared_experts=Halved(), routed_scaling_factor=2.5, apply_routed_scale_to_output=scaled,
    )  # fmt: skip
    layer = getattr(runner, "routed_experts", runner)
    fill_randomly(layer, 0.05)
    layer.quant_method.process_weights_after_loading(layer)
    with set_forward_context(None, parallel_state, num_tokens=M):
        out = runner(x.clone(), torch.zeros(M, E))
    routed = moe_forward(x, experts_of(layer), weights, ids)
    assert torch.equal(out, x * 0.5 + routed * (2.5 if scaled else 1))
    assert takeover.TAKEOVER.taken.total() == 1


def test_a_layer_of_gpt_oss_has_biases_and_alternating_rows() -> None:
    layer = plain_layer(activation="swigluoai", has_bias=True)
    for bias in (layer.w13_bias, layer.w2_bias):
        bias.data.normal_()
    x, weights, ids = draw()
    experts = ExpertWeights(
        layer.w13_weight.data, layer.w2_weight.data, gate_up_bias=layer.w13_bias.data, down_bias=layer.w2_bias.data,
        activation="swiglu_oai", interleaved=True,
    )  # fmt: skip
    assert torch.equal(run(layer, x, weights, ids), moe_forward(x, experts, weights, ids))


# Options of the engine by their path in its config, a value, and what the log says.
ENGINE_OPTIONS: dict[str, tuple[Any, str]] = {
    "offload_config.uva.cpu_offload_gb": (1, "weights offloaded to host memory"),
    "offload_config.prefetch.offload_group_size": (2, "weights offloaded to host memory"),
    "parallel_config.enable_dbo": (True, "dual-batch overlap"),
    "parallel_config.ubatch_size": (2, "dual-batch overlap"),
    "parallel_config.enable_eplb": (True, "load balancing"),
    "kernel_config.moe_backend": ("triton", "--moe-backend triton names vLLM's own"),
    "lora_config": (object(), "LoRA adapters need vLLM's own experts"),
    "load_config.load_format": ("ipc_cache", "--load-format ipc_cache brings weights in the layout"),
}


@pytest.mark.parametrize("path", ENGINE_OPTIONS)
def test_options_of_the_engine_leave_its_layers_to_vllm(
    path: str, parallel_state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    value, reason = ENGINE_OPTIONS[path]
    *above, name = path.split(".")
    config = functools.reduce(getattr, above, parallel_state)
    assert hasattr(config, name), f"this vLLM has no {path}; what has taken its place?"
    monkeypatch.setattr(config, name, value)
    layer = make_layer()
    assert layer.quant_method.experts_cls.__name__ != "MoeDispatchExperts"
    assert reason in next(iter(takeover.TAKEOVER.left))


def test_vllms_kernels_of_one_result_leave_its_layers_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs

    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", True)
    make_layer()
    assert "VLLM_BATCH_INVARIANT needs results" in next(iter(takeover.TAKEOVER.left))


PARALLEL: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"tp_size": 2}, "expert parallelism (ep_size=2)"),
    "data": ({"dp_size": 2}, "data parallelism (dp_size=2)"),
    "context": ({"pcp_size": 2}, "prefill context parallelism (pcp_size=2)"),
}


@pytest.mark.parametrize("case", PARALLEL)
def test_parallel_layers_that_share_their_tokens_stay_vllms_own(
    case: str, parallel_state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, reason = PARALLEL[case]
    monkeypatch.setattr(parallel_state.parallel_config, "enable_expert_parallel", case == "experts")
    make_layer(**options)
    assert reason in next(iter(takeover.TAKEOVER.left))


def test_every_option_of_the_installed_layers_is_known_and_a_new_one_that_is_set_is_refused() -> None:
    layer = make_layer()
    config, method = layer.moe_config, layer.quant_method
    offload = current_config().offload_config
    for each in (config, config.moe_parallel_config, offload, offload.uva, offload.prefetch):
        assert {field.name for field in dataclasses.fields(each)} <= takeover._KNOWN_OPTIONS
    default: Any = dataclasses.field(default=False)
    newer = dataclasses.make_dataclass("Newer", [("scale_of_rows", bool, default)], bases=(type(config),))
    config.__class__ = newer
    vllm_config = current_config()
    assert not takeover.reasons_against(config, vllm_config, method)
    config.scale_of_rows = True
    (reason,) = takeover.reasons_against(config, vllm_config, method)
    assert reason == "scale_of_rows=True, an option that this plugin does not know"


def test_a_new_way_to_keep_weights_elsewhere_leaves_the_layers_to_vllm(
    parallel_state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: Any = dataclasses.field(default=0)
    config = parallel_state.offload_config
    newer = dataclasses.make_dataclass("Newer", [("expert_pool_rows", int, rows)], bases=(type(config),))
    monkeypatch.setattr(parallel_state, "offload_config", newer())
    assert make_layer().quant_method.experts_cls.__name__ == "MoeDispatchExperts"
    monkeypatch.setattr(parallel_state, "offload_config", newer(expert_pool_rows=16))
    assert make_layer().quant_method.experts_cls.__name__ != "MoeDispatchExperts"
    assert "expert_pool_rows=16, an option that this plugin" in next(iter(takeover.TAKEOVER.left))


def current_config() -> Any:
    from vllm.config import get_current_vllm_config

    return get_current_vllm_config()


def test_weights_in_our_layout_are_not_handed_to_another_process() -> None:
    """`vllm preload` holds loaded weights for engines, which may have chosen another backend and so another layout."""
    protocol = pytest.importorskip("vllm.model_executor.model_loader.weight_cache.protocol")
    for config in (None, deepseek_fp8(128, 128)):
        with pytest.raises(protocol.UnsupportedQuantForIPCError):
            protocol.check_ipc_quant_support(make_layer(config))


def test_the_plugin_is_announced_to_vllm() -> None:
    code = "import importlib.metadata as m; print([e.value for e in m.entry_points(group='vllm.general_plugins')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if "moe_dispatch" not in done.stdout:
        pytest.skip("moe-dispatch is on the path here, not installed")
    assert "moe_dispatch.integrations.vllm:register" in done.stdout
