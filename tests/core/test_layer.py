"""`MoELayer` against the blocks of transformers, and what a module must be able to do."""

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize

from moe_dispatch import ExpertWeights, InvalidInputError, MoELayer, Router, moe_forward
from moe_dispatch.measure.verify import relative_error
from moe_dispatch.modules import layer as layer_module
from moe_dispatch.numerics import FP8
from moe_dispatch.settings import settings
from tests.integrations.transformers_models import SMALL, deepseek_v3, gpt_oss, mixtral, qwen3, transformers


@pytest.fixture(autouse=True)
def reference(fresh_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies around `moe_forward` is tested here, and interpreted kernels take seconds."""
    monkeypatch.setenv("MOE_DISPATCH_BACKEND", "reference")
    settings.cache_clear()


def qwen2() -> Any:
    return transformers.Qwen2MoeConfig(
        **SMALL, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32, intermediate_size=64,
        shared_expert_intermediate_size=48,
    )  # fmt: skip


def qwen3_renormalised() -> Any:
    return qwen3(norm_topk_prob=True)


# The config of each family, and the class of its block.
BLOCKS: dict[Callable[[], Any], str] = {
    qwen3: "qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
    qwen3_renormalised: "qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
    qwen2: "qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
    mixtral: "mixtral.modeling_mixtral.MixtralSparseMoeBlock",
    deepseek_v3: "deepseek_v3.modeling_deepseek_v3.DeepseekV3MoE",
    gpt_oss: "gpt_oss.modeling_gpt_oss.GptOssMLP",
}


def block_of(config: Callable[[], Any]) -> tuple[Any, nn.Module]:
    """A config, and a block of transformers with weights that make every part of it count."""
    module, _, name = BLOCKS[config].rpartition(".")
    made = config()
    kind = getattr(__import__(f"transformers.models.{module}", fromlist=[name]), name)
    block: nn.Module = kind(made)
    generator = torch.Generator().manual_seed(0)
    for tensor in block.state_dict().values():
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return made, block.eval()


def small_layer(**options: Any) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(64, 32, 8, options.pop("router", 2), **options)


def tokens(M: int = 5, K: int = 64) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", BLOCKS, ids=lambda config: config.__name__)
def test_equals_the_block_of_transformers_from_its_state_dict(config: Callable[[], Any]) -> None:
    described, block = block_of(config)
    layer = MoELayer.from_config(described)
    model = nn.ModuleDict({"mlp": layer})  # as a part of a model
    model.load_state_dict({f"mlp.{name}": tensor for name, tensor in block.state_dict().items()})
    hidden = tokens(6).view(2, 3, 64)
    with torch.no_grad():
        expected = block(hidden)
        out = layer(hidden)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert out.shape == hidden.shape
    assert relative_error(out, expected) <= 2e-6


def test_takes_experts_one_by_one_as_checkpoints_have_them() -> None:
    fused = small_layer(shared_N=16)
    single = {"gate.weight": fused.gate.weight}
    for module, experts in (("experts", fused.experts), ("shared_experts", fused.shared_experts)):
        assert experts is not None
        for e, (gate_up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
            prefix = f"{module}.{e}" if module == "experts" else module
            gate, up = gate_up.chunk(2)
            single |= {f"{prefix}.w1.weight": gate, f"{prefix}.w3.weight": up, f"{prefix}.w2.weight": down}
    layer = MoELayer(64, 32, 8, 2, shared_N=16)
    layer.load_state_dict(single)
    assert torch.equal(layer(tokens()), fused(tokens()))


def test_its_own_state_dict_loads() -> None:
    router = Router(2, "sigmoid", correction_bias=True, bias=True)
    layer, other = (small_layer(router=router, bias=True, shared_N=16) for _ in range(2))
    nn.init.ones_(layer.gate.weight)
    other.load_state_dict(layer.state_dict())
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, layer.state_dict()[name]), name


def test_wrong_names_are_refused() -> None:
    layer = small_layer()
    state = layer.state_dict()
    state["experts.gate_up"] = state.pop("experts.gate_up_proj")
    with pytest.raises(RuntimeError, match=r"Missing key.*experts.gate_up_proj(?s:.)*Unexpected key.*experts.gate_up"):
        layer.load_state_dict(state)


def fp8_layer(**options: Any) -> tuple[MoELayer, MoELayer]:
    """A layer in fp32, and the same with experts in block FP8."""
    torch.manual_seed(0)
    plain = MoELayer(128, 128, 4, 2, **options)
    layer = MoELayer(128, 128, 4, 2, dtype=FP8, **options).float()
    state = plain.state_dict()
    for module in ("experts", "shared_experts") if plain.shared_experts is not None else ("experts",):
        up, down = f"{module}.gate_up_proj", f"{module}.down_proj"
        quantized = ExpertWeights.quantize(state[up], state[down])
        for name, tensor in ((up, "gate_up"), (down, "down")):
            state[name], state[f"{name}_scale_inv"] = getattr(quantized, tensor), getattr(quantized, f"{tensor}_scale")
    layer.load_state_dict(state)
    return plain, layer


def test_block_fp8_runs_and_keeps_its_codes_and_scales() -> None:
    plain, layer = fp8_layer(shared_N=128)
    hidden = tokens(5, 128)
    with torch.no_grad():
        assert relative_error(layer(hidden), plain(hidden)) < 0.06
    before = layer.experts.gate_up_proj.clone()
    layer.to(torch.bfloat16)
    assert layer.gate.weight.dtype == torch.bfloat16
    assert layer.experts.gate_up_proj.dtype == FP8
    assert layer.experts.down_proj_scale_inv.dtype == torch.float32
    assert torch.equal(layer.experts.gate_up_proj.view(torch.uint8), before.view(torch.uint8))


def test_tokens_of_fp8_experts_may_have_another_dtype_than_the_gates() -> None:
    _, layer = fp8_layer(shared_N=128, shared_gate=True)
    hidden = tokens(5, 128)
    with torch.no_grad():
        expected = layer(hidden)
        assert relative_error(layer.bfloat16()(hidden), expected) < 0.02  # of gates in BF16


def one_by_one(experts: ExpertWeights, prefix: str, scale: str) -> dict[str, Tensor]:
    """Weights and scales as checkpoints name them, an expert at a time."""
    state: dict[str, Tensor] = {}
    tensors = dict(experts.tensors())
    for e in range(experts.E):
        for name, projections in (("gate_up", ("gate_proj", "up_proj")), ("down", ("down_proj",))):
            weights = tensors[name][e].chunk(len(projections))
            scales = tensors[f"{name}_scale"][e].chunk(len(projections))
            for projection, weight, each in zip(projections, weights, scales, strict=True):
                state[f"{prefix}{e}.{projection}.weight"] = weight
                state[f"{prefix}{e}.{projection}.{scale}"] = each
    return state


@pytest.mark.parametrize("stored", ["one by one", "fused"])
@pytest.mark.parametrize(
    ("form", "scale_dtype"), [("block", torch.bfloat16), ("block", torch.float8_e8m0fnu), ("channel", torch.float32)]
)
def test_fp8_checkpoints_load_in_the_form_that_they_have(form: Any, scale_dtype: torch.dtype, stored: str) -> None:
    torch.manual_seed(0)
    quantized = ExpertWeights.quantize(torch.randn(4, 256, 128) / 11, torch.randn(4, 128, 128) / 11, form=form)
    scales = {
        name: getattr(quantized, name).log2().round().exp2()  # which each of the dtypes holds exactly
        for name in ("gate_up_scale", "down_scale")
    }
    expected = ExpertWeights(quantized.gate_up, quantized.down, **scales)
    if stored == "one by one":
        weight_scale = "weight_scale_inv" if form == "block" else "weight_scale"
        state = one_by_one(expected, "experts.", weight_scale)
    else:
        state = {
            f"experts.{name.removesuffix('_scale')}_proj" + "_scale" * name.endswith("_scale"): tensor
            for name, tensor in expected.tensors()
        }
    state = {name: tensor.to(scale_dtype) if "scale" in name else tensor for name, tensor in state.items()}
    layer = MoELayer(128, 128, 4, 2, dtype=FP8).float()
    missing = layer.load_state_dict({"gate.weight": layer.gate.weight.detach(), **state})
    assert not missing.missing_keys
    loaded = layer.experts.weights()
    assert loaded.dtype == expected.dtype
    for (name, tensor), (_, other) in zip(loaded.tensors(), expected.tensors(), strict=True):
        assert torch.equal(tensor.float(), other.float()), name
    again = MoELayer(128, 128, 4, 2, dtype=FP8).float()
    again.load_state_dict(layer.state_dict())
    hidden = tokens(5, 128)
    with torch.no_grad():
        assert torch.equal(again(hidden), layer(hidden))


def test_scales_of_tensors_become_those_of_rows() -> None:
    layer = MoELayer(16, 8, 4, 2, dtype=FP8)
    scale = torch.tensor([[1.0, 2.0]]).repeat(4, 1)
    state = layer.state_dict()
    state |= {"experts.gate_up_proj_scale_inv": scale, "experts.down_proj_scale_inv": torch.ones(4)}
    layer.load_state_dict(state)
    loaded = layer.experts.weights().gate_up_scale
    assert loaded is not None
    assert loaded.tolist() == [[1.0] * 8 + [2.0] * 8] * 4


def test_fp8_codes_are_not_loaded_as_values() -> None:
    _, layer = fp8_layer()
    with pytest.raises(InvalidInputError, match=r"make the layer with dtype=torch\.float8_e4m3fn"):
        MoELayer(128, 128, 4, 2).load_state_dict(layer.state_dict(), strict=False)
    state = layer.state_dict()
    state["experts.gate_up_proj_scale_inv"] = torch.ones(4, 3)
    with pytest.raises(InvalidInputError, match=r"gate_up_scale must be \[4, 2, 1\]"):
        layer.load_state_dict(state)


def test_the_correction_bias_stays_in_fp32() -> None:
    layer = small_layer(router=Router(2, "sigmoid", correction_bias=True))
    assert layer.gate.e_score_correction_bias is not None
    layer.gate.e_score_correction_bias.fill_(1 + 2**-20)
    layer.bfloat16()
    assert layer.gate.e_score_correction_bias[0] == 1 + 2**-20


def test_weights_are_wrapped_anew_when_they_are_others() -> None:
    layer = small_layer()
    kept = layer.experts.weights()
    assert layer.experts.weights() is kept
    layer.half()
    assert layer.experts.weights().dtype == "fp16"
    state = {name: torch.zeros_like(tensor) for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    with torch.no_grad():
        assert not layer(tokens().half()).any()


def test_experts_stored_transposed_are_assigned_as_they_are() -> None:
    layer = MoELayer(16, 8, 4, 2, activation="swiglu(limit=0.5)")
    hidden = torch.randn(5, 16)
    with torch.no_grad():
        expected = layer(hidden)
        weights = layer.experts.weights()
        stored = [weight.mT.contiguous() for weight in (weights.gate_up, weights.down)]
        views = [weight.mT for weight in stored]
        layer.experts.assign(ExpertWeights(*views, activation=weights.activation, transposed=True))
        assert layer.experts.down_proj.data_ptr() == stored[1].data_ptr()
        torch.testing.assert_close(layer(hidden), expected)


def test_copies_have_weights_of_their_own() -> None:
    layer = small_layer().requires_grad_(requires_grad=False)
    expected = layer(tokens())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301 - its own
        assert torch.equal(other(tokens()), expected)
        other.experts.down_proj.zero_()
        assert not other(tokens()).any()
    assert torch.equal(layer(tokens()), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda experts: pickle.loads(pickle.dumps(experts))])  # noqa: S301
def test_copies_of_expert_weights_run(copied: Callable[[ExpertWeights], ExpertWeights]) -> None:
    experts = ExpertWeights(torch.randn(2, 8, 6), torch.randn(2, 6, 4))
    call = torch.randn(3, 6), torch.rand(3, 1), torch.tensor([[0], [1], [1]])
    other = copied(experts)
    assert torch.equal(moe_forward(call[0], other, *call[1:]), moe_forward(call[0], experts, *call[1:]))
    assert other.spec is experts.spec
    assert other.down is not experts.down


def test_moves_from_meta() -> None:
    layer = small_layer(device="meta", router=Router(2, "sigmoid", correction_bias=True))
    assert "E=8" in repr(layer)
    layer.to_empty(device="cpu")
    for module in (layer.gate, layer.experts):
        module.reset_parameters()
    assert layer(tokens()).isfinite().all()


@pytest.mark.parametrize("shared_N", [0, 4])
@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 6), (6,)], ids=str)
def test_a_result_is_no_view(shape: tuple[int, ...], shared_N: int) -> None:
    """FSDP2 hooks the result of what it shards: of a view, ``out += residual`` drops the hook."""
    layer = MoELayer(6, 4, 4, Router(2), shared_N=shared_N)
    hidden = torch.randn(shape, requires_grad=True)
    out = layer(hidden)
    assert out.shape == shape
    assert out.requires_grad
    assert out._base is None
    (gradient,) = torch.autograd.grad(out.square().sum(), hidden)
    changed = layer(hidden)
    changed += 1
    (other,) = torch.autograd.grad(((changed - 1).square()).sum(), hidden)
    assert torch.allclose(other, gradient, atol=1e-5)


def test_an_offloaded_layer_holds_nothing_between_calls() -> None:
    """What a hook brings for one call, and the layer kept, would be memory that offloading does not free."""
    accelerate = pytest.importorskip("accelerate")
    layer, hidden = small_layer(shared_N=16), tokens()

    def wrapped() -> list[ExpertWeights]:
        gc.collect()
        return [each for each in gc.get_objects() if type(each) is ExpertWeights]

    before = len(wrapped())
    with torch.no_grad():
        expected = layer(hidden)
        assert len(wrapped()) == before + 2, "a layer that stays where it is is wrapped once"
        accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
        assert torch.allclose(layer(hidden), expected, atol=1e-6)
    assert layer.experts.gate_up_proj.is_meta
    assert len(wrapped()) == before


@pytest.mark.parametrize("grad", [False, True])
def test_tensors_that_are_the_layers_for_one_call_are_not_held(grad: bool) -> None:
    layer, hidden = small_layer(), tokens()
    weights = {name: 2 * each for name, each in layer.named_parameters()}
    memory = weakref.ref(weights["experts.gate_up_proj"].untyped_storage())
    with torch.set_grad_enabled(grad):
        torch.func.functional_call(layer, weights, (hidden,))
    del weights
    gc.collect()
    assert memory() is None
    parametrize.register_parametrization(layer.experts, "gate_up_proj", twice := Twice())
    made = twice.made
    with torch.set_grad_enabled(grad):
        layer(hidden)
    gc.collect()
    assert made
    assert not [reference for reference in made if reference() is not None]


class Twice(nn.Module):
    """A parametrization; it remembers, weakly, what it made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[torch.UntypedStorage]] = []

    def forward(self, weight: Tensor) -> Tensor:
        twice = 2 * weight
        self.made.append(weakref.ref(twice.untyped_storage()))
        return twice


def test_torch_may_swap_parameters_after_a_recorded_call() -> None:
    """It swaps no tensor that is referred to weakly."""
    layer = small_layer(shared_N=16)
    layer(tokens()).sum().backward()
    state = {name: 2 * each.detach() for name, each in layer.state_dict().items()}
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.bfloat16().float()
        layer(tokens()).sum().backward()
        layer.load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(layer.experts.down_proj, state["experts.down_proj"])
    layer(tokens()).sum().backward()


def test_what_is_no_tensor_or_has_no_memory_is_refused_by_name() -> None:
    with pytest.raises(InvalidInputError, match=r"hidden_states must be a torch\.Tensor, got ndarray"):
        MoELayer(6, 4, 4, 2)(numpy.zeros((3, 6)))
    with pytest.raises(InvalidInputError, match="must be on cpu or cuda, got meta"):
        MoELayer(6, 4, 4, 2, device="meta")(torch.empty(3, 6, device="meta"))
    with pytest.raises(InvalidInputError, match=r"experts must be ExpertWeights\(gate_up, down\), got dict"):
        MoELayer(6, 4, 4, 2).experts.assign({})  # type: ignore[arg-type]


def test_a_fake_layer_is_run_without_a_warning() -> None:
    """Torch warns where the address of a fake tensor is asked for."""
    with warnings.catch_warnings(), FakeTensorMode():
        warnings.simplefilter("error")
        layer = MoELayer(6, 4, 4, 2)
        layer(torch.randn(2, 3, 6)).sum().backward()
        assert layer.experts.down_proj.grad is not None
        assert layer.experts.down_proj.grad.shape == (4, 6, 4)


def test_gradients_reach_everything_and_are_right() -> None:
    torch.manual_seed(0)
    layer = MoELayer(6, 4, 4, Router(2), shared_N=4, shared_gate=True)
    hidden = tokens(3, 6).requires_grad_()
    layer(hidden).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    weight = layer.gate.weight
    assert weight.grad is not None
    step = 1e-3 * torch.randn_like(weight)
    predicted = 2 * (weight.grad * step).sum()
    with torch.no_grad():
        weight.add_(step)
        above = layer(hidden).square().sum()
        weight.sub_(2 * step)
        below = layer(hidden).square().sum()
    assert above - below == pytest.approx(predicted.item(), rel=0.02, abs=1e-5)


def test_compiles_whole() -> None:
    layer = small_layer(router=Router(2, "sigmoid", groups=4, topk_groups=2, correction_bias=True), shared_N=16)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(tokens()), layer(tokens())) <= 1e-6


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_is_traced_whole(*, grad: bool, warm: bool) -> None:
    """As TensorBoard's add_graph does. Sizes are tensors in such a trace, and the layer was broken from then on."""
    layer = MoELayer(K=64, N=16, E=4, router=2, shared_N=16)
    with torch.set_grad_enabled(grad):
        if warm:
            layer(tokens())
        traced = torch.jit.trace(layer, tokens())
        few = tokens()[:2]
        expected = layer(few)
        assert relative_error(traced(few), expected) <= 1e-6
    if grad:
        (gradient,) = torch.autograd.grad(traced(few).sum(), layer.experts.down_proj)
        assert torch.equal(gradient, torch.autograd.grad(expected.sum(), layer.experts.down_proj)[0])


def test_autocast_does_not_reach_the_router() -> None:
    layer = small_layer()
    for gradients in (False, True):  # the two ways in which a gate computes
        with torch.set_grad_enabled(gradients):
            expected = layer.gate(tokens())
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert all(map(torch.equal, layer.gate(tokens()), expected))


def test_warm_up_runs_the_layer() -> None:
    from moe_dispatch.dispatch.process import stats

    layer = small_layer(shared_N=16)
    layer.warm_up([1, 3])
    ran = stats()["reference"]["ran"]
    assert ran >= 4
    layer.warm_up(iter([1, 3]))  # type: ignore[arg-type]
    assert stats()["reference"]["ran"] == 2 * ran
    layer.warm_up(2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"E": 0}, "E must be an integer of at least 1, got 0"),
        ({"shared_gate": True}, "give shared_N"),
        ({"activation": "tanh"}, "activation must be one of silu"),
        ({"router": 9}, "topk=9 experts cannot be chosen of 8"),
        ({"router": "softmax"}, "router must be a Router or the number of experts, got str"),
        ({"dtype": torch.uint8}, r"dtype must be None or one of torch\.bfloat16, .*, got torch\.uint8"),
    ],
)
def test_refuses_what_does_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        MoELayer(**{"K": 64, "N": 32, "E": 8, "router": 2, **options})


def test_takes_no_tokens_and_refuses_those_of_another_size() -> None:
    assert small_layer(shared_N=16)(torch.empty(0, 3, 64)).shape == (0, 3, 64)
    with pytest.raises(InvalidInputError, match=r"\[…, K=64\], got \[2, 32\]"):
        small_layer()(torch.randn(2, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "jetmoe"}, "model_type 'jetmoe', whose router is unknown; known: deepseek_v3"),
        ({"model_type": ["qwen3_moe"]}, "whose router is unknown"),
        ({"model_type": "deepseek_v3", "routed_scaling_factor": None}, "scale must be a finite number, got None"),
        ({"model_type": "deepseek_v3", "routed_scaling_factor": True}, "scale must be a finite number, got True"),
        ({"model_type": "deepseek_v3", "routed_scaling_factor": 10**400}, "scale must be a finite number, got 1000"),
        ({"model_type": "deepseek_v3", "n_shared_experts": [1]}, r"n_shared_experts=\[1\], and it must be an integer"),
        ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid', and 'softmax' is known of qwen3_moe"),
    ],
)
def test_from_config_refuses_an_unknown_router(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        MoELayer.from_config({**qwen3().to_dict(), **change})
    with pytest.raises(InvalidInputError, match=r"cannot be read as a config: .*File name too long"):
        MoELayer.from_config("a" * 300)


def test_from_config_says_that_a_model_of_the_hub_must_be_here() -> None:
    with pytest.raises(
        InvalidInputError, match=r"^Qwen/Qwen3 .*: No such file or directory; .* must be downloaded first"
    ):
        MoELayer.from_config("Qwen/Qwen3")


def test_the_second_stream_is_for_few_tokens_without_gradients_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = small_layer(shared_N=16)
    assert not layer._on_two_streams(tokens())
    hidden = torch.empty(1, 64)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    assert not layer._on_two_streams(hidden)
    with torch.no_grad():
        assert layer._on_two_streams(hidden)
        assert not layer._on_two_streams(torch.empty(layer_module.SIDE_STREAM_TOKENS + 1, 64))
