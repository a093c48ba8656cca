"""The transformers integration: real models with random weights, against their own implementation."""

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.17")

from moe_dispatch.dispatch.process import stats  # noqa: E402
from moe_dispatch.errors import MoEDispatchWarning  # noqa: E402
from moe_dispatch.experts import ExpertWeights  # noqa: E402
from moe_dispatch.integrations import transformers as integration  # noqa: E402

# ‖out − own‖ / ‖own‖: fp32 differs by the order of sums, BF16 by what each rounds (eager sums in BF16).
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": None,
}


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


def qwen3(**changes: Any) -> Any:
    own = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    return transformers.Qwen3MoeConfig(**{**SMALL, **own, "intermediate_size": 64, **changes})


def mixtral() -> Any:
    return transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, intermediate_size=64)


def deepseek_v3() -> Any:
    return transformers.DeepseekV3Config(
        **SMALL, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, intermediate_size=64, n_group=2,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=16,
    )  # fmt: skip


def gpt_oss() -> Any:
    return transformers.GptOssConfig(
        **SMALL, head_dim=16, num_local_experts=4, num_experts_per_tok=2, intermediate_size=32
    )


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
    integration.register()
    integration._warned.clear()


def build(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 3:
                weight.normal_(std=0.2)
    return model


def logits(model: Any, implementation: str) -> torch.Tensor:
    model.set_experts_implementation(implementation)
    ids = torch.arange(1, 12)[None]
    out: torch.Tensor = model(ids).logits.detach().float()
    return out


def experts_of(model: Any) -> Any:
    return next(module for module in model.modules() if type(module).__name__.endswith("Experts"))


def calls() -> int:
    return sum(counts["ran"] for counts in stats().values())


@pytest.mark.parametrize("case", [FUSED[0], FUSED[-1]], ids=str)
@pytest.mark.filterwarnings("ignore:.*:UserWarning:torch")
def test_compiled_each_layer_has_its_own_weights(case: ModelCase) -> None:
    """What is kept of one layer would be a constant to a trace, which serves all layers."""
    model = build(case.config())
    ids = torch.arange(1, 12)[None]
    expected = logits(model, "eager")
    model.set_experts_implementation("moe_dispatch")
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        out = compiled(ids).logits
    assert (out - expected).norm() / expected.norm() < TOLERANCE[torch.float32]
    assert calls() == SMALL["num_hidden_layers"]
    gradients = []
    for run in (compiled, model):
        model.zero_grad()
        run(ids, labels=ids).loss.backward()
        gradients.append(experts_of(model).down_proj.grad.clone())
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def compiled_whole(model: Any) -> tuple[Any, list[int]]:
    """The model in one graph, and how often each graph that was compiled of it calls the operator."""
    found: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        found.append(sum("moe_dispatch.forward" in str(node.target) for node in graph.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    return torch.compile(model, backend=backend, fullgraph=True), found


@pytest.mark.parametrize(
    ("config", "layers"),
    [(lambda: qwen3(num_hidden_layers=3), 3), (mixtral, 2), (deepseek_v3, 1)],
    ids=["qwen3-moe", "mixtral", "deepseek-v3"],
)
def test_a_model_that_has_run_is_compiled_whole(config: Callable[[], Any], layers: int) -> None:
    model, ids = build(config()), torch.arange(1, 12)[None]
    torch.compiler.reset()
    with torch.no_grad():
        logits(model, "moe_dispatch")
        expected = logits(model, "eager")
        model.set_experts_implementation("moe_dispatch")
        compiled, found = compiled_whole(model)
        before = calls()
        assert (compiled(ids).logits - expected).norm() / expected.norm() < TOLERANCE[torch.float32]
        assert found == [layers]
        assert calls() == before + layers
        # The graph has the layers' tensors as they are when it runs, and one each.
        experts_of(model).down_proj.mul_(3.0)
        experts_of(model).gate_up_proj = torch.nn.Parameter(torch.randn_like(experts_of(model).gate_up_proj))
        changed = compiled(ids).logits
        assert not torch.allclose(changed, expected)
        model.set_experts_implementation("eager")
        torch.testing.assert_close(changed, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_models_of_one_class_are_not_compiled_for_each_others_gate() -> None:
    """They share the code that is traced; what it read of the one is guarded."""
    ids = torch.arange(1, 12)[None]
    torch.compiler.reset()
    with torch.no_grad():
        for activation in ("silu", "gelu", "silu"):
            model = build(qwen3(hidden_act=activation))
            expected = logits(model, "eager")
            logits(model, "moe_dispatch")
            compiled, _ = compiled_whole(model)
            assert (compiled(ids).logits - expected).norm() / expected.norm() < TOLERANCE[torch.float32]


def test_a_copy_of_a_layer_is_looked_at_anew() -> None:
    module = experts_of(build(qwen3()))
    assert integration._layout(module).activation == "silu"
    copied = copy.deepcopy(module)
    copied.act_fn = torch.nn.GELU()
    assert integration._layout(copied).activation == "gelu"


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
    module = experts_of(build(case.config(), dtype))
    E = module.down_proj.shape[0]
    rows = torch.randn(11, 64).to(dtype)
    ids = torch.rand(11, E).topk(2, dim=1).indices
    weights = torch.rand(11, 2).to(dtype)
    before = calls()
    with torch.no_grad():
        own = integration._own_forward(module, rows, ids, weights).float()
        dispatched = integration.experts_forward(module, rows, ids, weights).float()
    assert calls() == before + 1
    layout = integration._layout(module)
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


@pytest.mark.parametrize("config", [qwen3, gpt_oss], ids=["used as they are", "copied"])
def test_weights_changed_in_place_are_seen(config: Callable[[], Any]) -> None:
    model = build(config())
    with torch.no_grad():
        first = logits(model, "moe_dispatch")
        experts_of(model).down_proj.mul_(3.0)
        second = logits(model, "moe_dispatch")
        assert not torch.allclose(first, second)
        torch.testing.assert_close(second, logits(model, "eager"), rtol=1e-4, atol=1e-4)


def test_weights_replaced_are_seen() -> None:
    model = build(gpt_oss())
    module = experts_of(model)
    with torch.no_grad():
        logits(model, "moe_dispatch")
        module.down_proj = torch.nn.Parameter(torch.randn_like(module.down_proj))
        torch.testing.assert_close(logits(model, "moe_dispatch"), logits(model, "eager"), rtol=1e-4, atol=1e-4)


def test_unchanged_weights_are_wrapped_once() -> None:
    model = build(gpt_oss())
    module = experts_of(model)
    with torch.no_grad():
        logits(model, "moe_dispatch")
        kept = integration._held[module].experts
        logits(model, "moe_dispatch")
    assert integration._held[module].experts is kept


def test_plain_weights_are_not_copied() -> None:
    model = build(qwen3())
    with torch.no_grad():
        logits(model, "moe_dispatch")
    module = experts_of(model)
    assert integration._held[module].experts.gate_up.data_ptr() == module.gate_up_proj.data_ptr()


def test_a_deleted_model_leaves_nothing_behind() -> None:
    model = build(gpt_oss())
    with torch.no_grad():
        logits(model, "moe_dispatch")
    module = weakref.ref(experts_of(model))
    kept = weakref.ref(integration._held[experts_of(model)].experts)
    del model
    gc.collect()
    assert module() is None
    assert kept() is None


@pytest.mark.parametrize("config", [qwen3, gpt_oss], ids=["used as they are", "copied"])
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
    module = experts_of(build(qwen3()))
    rows = torch.randn(3, 64)
    ids = torch.tensor([[1, 8], [8, 8], [2, 3]])  # 8 is expert parallelism's sentinel for 8 experts
    weights = torch.tensor([[0.5, float("nan")], [float("nan"), float("nan")], [0.5, 0.5]])
    with torch.no_grad():
        out = integration.experts_forward(module, rows, ids, weights)
        mine = integration.experts_forward(module, rows[:1], ids[:1, :1], weights[:1, :1])
    assert out.isfinite().all()
    torch.testing.assert_close(out[:1], mine)
    assert not out[1].any()


@dataclass(frozen=True)
class OwnCase:
    """A model that keeps its own implementation, and why."""

    name: str
    activation: str
    reason: str

    def __str__(self) -> str:
        return self.name


@pytest.mark.parametrize(
    "case",
    [
        OwnCase("quick gelu looks like silu", "quick_gelu", "none of"),
        OwnCase("another function altogether", "tanh", "none of"),
    ],
    ids=str,
)
def test_other_gates_keep_their_own_forward_and_say_so(case: OwnCase) -> None:
    model = build(qwen3(hidden_act=case.activation))
    own = logits(model, "eager")
    before = calls()
    with pytest.warns(MoEDispatchWarning, match=case.reason):
        kept = logits(model, "moe_dispatch")
    assert calls() == before
    assert torch.equal(kept, own)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MoEDispatchWarning)
        logits(model, "moe_dispatch")  # said once


def test_a_limit_of_its_own_is_noticed() -> None:
    module = experts_of(build(gpt_oss()))
    module.limit = 9.0
    assert "none of" in integration._inspect(module).unfit


def test_mixed_dtypes_keep_the_own_forward() -> None:
    model = build(qwen3())
    model.set_experts_implementation("moe_dispatch")
    with pytest.warns(MoEDispatchWarning, match="autocast"), torch.autocast("cpu", torch.bfloat16):
        experts_of(model)(torch.randn(2, 64).bfloat16(), torch.tensor([[0, 1], [2, 3]]), torch.full((2, 2), 0.5))


def fp8_module(**changes: Any) -> Any:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
    from transformers.integrations.moe import use_experts_implementation

    config = qwen3(hidden_size=256, moe_intermediate_size=128, num_experts=4)
    config._experts_implementation = "moe_dispatch"
    own = {"block_size": (128, 128), "activation_scheme": "dynamic"}
    made = use_experts_implementation(FP8Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    module = made(config, **{**own, **changes})
    torch.manual_seed(0)
    quantized = ExpertWeights.quantize(torch.randn(4, 256, 256) / 16, torch.randn(4, 256, 128) / 11)
    with torch.no_grad():
        module.gate_up_proj.copy_(quantized.gate_up)
        module.down_proj.copy_(quantized.down)
        module.gate_up_proj_scale_inv.copy_(quantized.gate_up_scale)
        module.down_proj_scale_inv.copy_(quantized.down_scale)
    return module


def test_block_fp8_layers_are_dispatched() -> None:
    module = fp8_module()
    rows = torch.randn(5, 256, dtype=torch.bfloat16)
    ids, weights = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 2], [4, 1]]), torch.full((5, 2), 0.5)
    out = module(rows, ids, weights)
    expected = torch.zeros(5, 256)
    gate_up = integration._experts(module, integration._layout(module))
    from moe_dispatch.numerics import dequantize_blocks

    assert gate_up.gate_up_scale is not None
    assert gate_up.down_scale is not None
    up, down = (
        dequantize_blocks(gate_up.gate_up, gate_up.gate_up_scale),
        dequantize_blocks(gate_up.down, gate_up.down_scale),
    )
    for m in range(5):
        for e in ids[m].tolist():
            if e < 4:
                gate, value = (up[e] @ rows[m].float()).chunk(2)
                expected[m] += 0.5 * (down[e] @ (torch.nn.functional.silu(gate) * value))
    assert (out.float() - expected).norm() / expected.norm() < 5e-2  # two roundings to e4m3 lie between


def test_block_fp8_layers_are_compiled_whole() -> None:
    module = fp8_module()
    rows, ids = torch.randn(5, 256, dtype=torch.bfloat16), torch.rand(5, 4).topk(2, dim=1).indices
    torch.compiler.reset()
    with torch.no_grad():
        expected = module(rows, ids, torch.full((5, 2), 0.5))
        compiled, found = compiled_whole(module)
        assert torch.equal(compiled(rows, ids, torch.full((5, 2), 0.5)), expected)
    assert found == [1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"block_size": (64, 64)}, "blocks"), ({"activation_scheme": "static"}, "static")],
    ids=["other blocks", "static activations"],
)
def test_other_fp8_schemes_are_left_alone(changes: dict[str, Any], reason: str) -> None:
    from transformers.integrations.finegrained_fp8 import FP8Experts

    module = FP8Experts(qwen3(hidden_size=256, moe_intermediate_size=128), **{"block_size": (128, 128), **changes})
    assert reason in integration._inspect(module).unfit
