"""The vllm_fused_moe backend: its reasons, and the contract with vLLM held against a stand-in that really computes.

The stand-in has the signatures of an old and a new release, and does with ids what all of them do: it skips its sorting
where M·topk·4 ≤ E, and there writes zeros for -1 and reads the weights of any other id; where it sorts, it indexes with
the id and drops what expert_map maps to -1.
The real one runs in the conformance suite, on a GPU.
"""

import dataclasses
import enum
import gc
import os
import sys
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from moe_dispatch.activations import Activation
from moe_dispatch.backend import BackendConfig
from moe_dispatch.backends.stages.mask_slots import mask_slots
from moe_dispatch.backends.vllm_fused_moe import VllmFusedMoEBackend, library
from moe_dispatch.backends.vllm_fused_moe.layers import ACTIVATIONS
from moe_dispatch.backends.vllm_fused_moe.nan_tokens import mark_nan_tokens, mark_nan_tokens_torch
from moe_dispatch.errors import BackendUnavailableError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.numerics import activate_torch, dequantize, quantize_rows_torch
from moe_dispatch.problem import DType, MoEProblem
from moe_dispatch.testing import relative_error, truth
from moe_dispatch.workloads import Workload, make_experts
from tests.support.ambient import default_dtype
from tests.support.described import CPU, H200, small_layer
from tests.support.packages import forgotten, write_package
from tests.support.refusals import Refusal, on_hopper

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKAGE = "vllm.model_executor.layers.fused_moe"
E8M0 = "VLLM_USE_DEEP_GEMM_E8M0"


# Reasons.


REFUSALS = {
    "parts of a group": Refusal(on_hopper("fp8", K=192, N=96), ("K % 128 == 0", "K=192", "N % 128 == 0", "N=96")),
    "gelu_tanh": Refusal(on_hopper(activation="gelu_tanh"), ("got activation gelu_tanh",)),
    "alternating silu": Refusal(on_hopper(interleaved=True), ("silu with rows alternating",)),
    "gate-first swiglu_oai": Refusal(on_hopper(activation="swiglu_oai"), ("swiglu_oai with rows gate first",)),
    "too many experts to sort": Refusal(on_hopper(E=992), ("at most 991", "E=992")),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_refuses_with_limit_and_value(refusal: Refusal) -> None:
    refusal.check(VllmFusedMoEBackend(H200))


@pytest.mark.parametrize(
    "taken",
    [
        on_hopper(mode="graph"),
        on_hopper("fp16"),
        on_hopper("fp8", mode="graph"),
        on_hopper("fp8_channel", K=192, N=96),
        on_hopper("fp8", act_dtype="fp16", capability=(8, 9)),
        on_hopper(capability=(8, 0), K=250, N=90),
        on_hopper(activation="relu2"),
        on_hopper(activation="swiglu_oai", interleaved=True, bias=True),
        on_hopper(capability=(10, 0)),
    ],
    ids=str,
)
def test_takes(taken: MoEProblem) -> None:
    assert VllmFusedMoEBackend(H200).unsupported_reasons(taken) == ()


def test_absent_library_says_how_to_get_it() -> None:
    (reason,) = VllmFusedMoEBackend(CPU).unavailable_reasons()
    assert "vllm is not installed" in reason
    assert "vllm==0.26.0 (torch 2.11) or vllm==0.32.0 (torch 2.13)" in reason
    assert VllmFusedMoEBackend(H200).unavailable_reasons() == ()


def test_measurements_depend_on_vllm_and_triton() -> None:
    assert VllmFusedMoEBackend(H200).measured_versions() == {"vllm": "0.20.2", "triton": "3.6.0"}


def test_takes_more_workspace_for_more_tokens() -> None:
    backend = VllmFusedMoEBackend(H200)
    small, large = (backend.workspace_bytes(on_hopper(M=M), backend.config_type()) for M in (4, 64))
    assert large == 16 * small > 0


# The contract, against a stand-in.


class MoEActivation(enum.Enum):
    """vLLM's enumeration, the part of it that is used."""

    SILU = "silu"
    GELU = "gelu"
    SWIGLUOAI = "swigluoai"
    RELU2_NO_MUL = "relu2_no_mul"


OURS: dict[MoEActivation, tuple[Activation, bool]] = {
    MoEActivation.SILU: ("silu", False),
    MoEActivation.GELU: ("gelu", False),
    MoEActivation.SWIGLUOAI: ("swiglu_oai", True),
    MoEActivation.RELU2_NO_MUL: ("relu2", False),
}


class Description(types.SimpleNamespace):
    """What vLLM knows of the weights; unlike its base it can be referred to weakly."""


class Parallelism:
    """vLLM's `FusedMoEParallelConfig`."""

    @classmethod
    def make_no_parallel(cls) -> "Parallelism":
        return cls()


# The fields of `FusedMoEConfig` without a default that all releases have.
FIELDS = (
    "num_experts", "experts_per_token", "hidden_dim", "num_local_experts", "num_logical_experts", "activation",
    "device", "routing_method", "moe_parallel_config", "in_dtype",
)  # fmt: skip
# Up to 0.22.1 the caller divides the layer; from 0.24.0 on the size per partition is computed and has a default.
ConfigOf0202 = dataclasses.make_dataclass("ConfigOf0202", (*FIELDS, "intermediate_size_per_partition"))
ConfigOf0260 = dataclasses.make_dataclass(
    "ConfigOf0260", (*FIELDS, "intermediate_size", ("intermediate_size_per_partition", int, -1))
)
RELEASES: Final = ("0.20.2", "0.33.0")


@dataclass
class StandIn:
    """Computes what vLLM computes, and remembers how it was called."""

    release: str = "0.33.0"
    calls: list[dict[str, Any]] = field(default_factory=list)
    configs: int = 0
    rounds: bool = False
    platform_is_cuda: bool = True

    def fp8_w8a8_moe_quant_config(
        self, w1_scale: Tensor, w2_scale: Tensor,
        w1_bias: Tensor | None = None, w2_bias: Tensor | None = None, per_act_token_quant: bool = False,
        per_out_ch_quant: bool = False, block_shape: list[int] | None = None,
    ) -> Description:  # fmt: skip
        assert (block_shape == [128, 128]) != (per_act_token_quant and per_out_ch_quant)
        assert all(scale.dim() == 3 for scale in (w1_scale, w2_scale))
        self.configs += 1
        return Description(w1_scale=w1_scale, w2_scale=w2_scale, w1_bias=w1_bias, w2_bias=w2_bias)

    def biased_moe_quant_config(self, w1_bias: Tensor, w2_bias: Tensor) -> Description:
        self.configs += 1
        return Description(w1_bias=w1_bias, w2_bias=w2_bias)

    def assign(
        self, topk_ids: Tensor, config: dict[str, Any], num_tokens: int, top_k_num: int, global_num_experts: int,
        expert_map: Tensor | None, *, ignore_invalid_experts: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert topk_ids.device.type == "cpu"
        if expert_map is None and num_tokens * top_k_num * 4 <= global_num_experts:
            return None, topk_ids.view(-1), torch.full((1,), topk_ids.numel() * config["BLOCK_SIZE_M"])
        raise NotImplementedError("Could not run '_moe_C::moe_align_block_size' with arguments from the 'CPU' backend")

    def expert_of_slot(self, ids: Tensor, E: int, global_num_experts: int, expert_map: Tensor | None) -> list[int]:
        if expert_map is None and ids.numel() * 4 <= global_num_experts:
            read = [int(e) for e in ids.flatten()]
            assert all(-1 <= e < E for e in read), "the weights of an expert that is not there were read"
            return read
        assert expert_map is not None, "a slot that is sorted out leaves its part of the buffer uninitialised"
        assert expert_map.numel() == global_num_experts
        assert all(0 <= e < global_num_experts for e in ids.flatten()), "an id was used as an index"
        return [int(expert_map[e]) for e in ids.flatten()]

    def fused_experts_of_0202(
        self, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
        inplace: bool = False, activation: MoEActivation = MoEActivation.SILU,
        apply_router_weight_on_input: bool = False, global_num_experts: int = -1, expert_map: Tensor | None = None,
        quant_config: Any = None,
    ) -> Tensor:  # fmt: skip
        assert not inplace
        return self.fused_experts(
            hidden_states, w1, w2, topk_weights, topk_ids, activation, apply_router_weight_on_input,
            global_num_experts, expert_map, quant_config,
        )  # fmt: skip

    def fused_experts(
        self, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
        activation: MoEActivation = MoEActivation.SILU, apply_router_weight_on_input: bool = False,
        global_num_experts: int = -1, expert_map: Tensor | None = None, quant_config: Any = None,
    ) -> Tensor:  # fmt: skip
        self.calls.append(
            {"by_slot": expert_map is None, "ids": topk_ids, "quant_config": quant_config, "expert_map": expert_map}
        )
        assert not apply_router_weight_on_input
        assert topk_weights.dtype == torch.float32
        assert hidden_states.data_ptr() % 16 == 0, "misaligned address: the CUDA context would be lost"
        E, topk = w1.shape[0], topk_ids.shape[1]
        experts = self.expert_of_slot(topk_ids, E, E if global_num_experts == -1 else global_num_experts, expert_map)
        ours, interleaved = OURS[activation]
        out = torch.zeros(hidden_states.shape, dtype=torch.float32)
        for slot, e in enumerate(experts):
            if e < 0:
                continue
            x = hidden_states[slot // topk]
            gate_up = self.product(x, w1[e], quant_config, "w1", e)
            if activation is MoEActivation.SWIGLUOAI:
                gate_up = torch.where(gate_up.isnan(), 7.0, gate_up)  # fminf and fmaxf return the limit
            inner = activate_torch(gate_up, ours, interleaved=interleaved).to(hidden_states.dtype)
            y = self.product(inner, w2[e], quant_config, "w2", e)
            out[slot // topk] += y * topk_weights.flatten()[slot]
        return out.to(hidden_states.dtype)

    def product(self, x: Tensor, weight: Tensor, quant_config: Any, name: str, e: int) -> Tensor:
        wide, x = weight.float(), x.float()
        scale = getattr(quant_config, f"{name}_scale", None)
        if scale is not None:
            per_token = scale.shape[1:] == (weight.shape[0], 1)
            wide = dequantize(weight, scale[e, :, 0] if per_token else scale[e])
            # fmaxf passes over a NaN, and then clamps it to the least code.
            kept = x[None].nan_to_num(0.0, posinf=torch.inf, neginf=-torch.inf)
            codes, multiplier = quantize_rows_torch(kept, per_token=per_token)
            codes = torch.where(codes.float().isnan() | x[None].isnan(), -448.0, codes.float()).to(codes.dtype)
            if self.rounds:
                multiplier = torch.exp2(multiplier.log2().ceil())
                codes = (x.view(1, -1, 128) / multiplier[:, :, None]).view(1, -1).to(torch.float8_e4m3fn)
            x = (codes.float() * multiplier.repeat_interleave(len(x) // multiplier.shape[1], dim=1))[0]
        bias = getattr(quant_config, f"{name}_bias", None)
        return torch.nn.functional.linear(x, wide, None if bias is None else bias[e].float())

    def modules(self) -> dict[str, types.ModuleType]:
        old = self.release == "0.20.2"
        contents: dict[str, dict[str, Any]] = {
            "vllm.platforms": {
                "current_platform": types.SimpleNamespace(is_cuda=lambda: self.platform_is_cuda),
            },
            "vllm.utils.deep_gemm": {"is_deep_gemm_e8m0_used": lambda: self.rounds},
            f"{PACKAGE}.activation": {"MoEActivation": MoEActivation},
            f"{PACKAGE}.config": {
                "fp8_w8a8_moe_quant_config": self.fp8_w8a8_moe_quant_config,
                "biased_moe_quant_config": self.biased_moe_quant_config,
                "FusedMoEConfig": ConfigOf0202 if old else ConfigOf0260,
                "FusedMoEParallelConfig": Parallelism,
                "RoutingMethodType": types.SimpleNamespace(TopK="TopK"),
            },
            f"{PACKAGE}.fused_moe": {
                "fused_experts": self.fused_experts_of_0202 if old else self.fused_experts,
                "_prepare_expert_assignment": self.assign,
            },
        }
        made = {}
        for name, attributes in contents.items():
            made[name] = types.ModuleType(name)
            vars(made[name]).update(attributes)
        return made


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hide vLLM, and make the backend forget it."""
    monkeypatch.setattr(library, "_library", None)
    monkeypatch.setattr(library, "_keeps_fp32_scales", False)
    monkeypatch.setenv(E8M0, "")  # so that the fixture restores it, whatever the backend sets
    monkeypatch.delenv(E8M0)
    with forgotten("vllm"):
        yield


@pytest.fixture(params=RELEASES)
def vllm(no_vllm: None, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> StandIn:
    stand_in = StandIn(request.param)
    for name, module in stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return stand_in


def hidden_for(ids: Tensor, experts: ExpertWeights) -> Tensor:
    hidden = torch.randn(ids.shape[0], experts.K, generator=torch.Generator().manual_seed(2))
    return hidden.to(torch.float16 if experts.dtype == "fp16" else torch.bfloat16)


def run(hidden: Tensor, experts: ExpertWeights, weights: Tensor, ids: Tensor) -> Tensor:
    """What a new backend returns."""
    return VllmFusedMoEBackend(H200).run(hidden, experts, weights, ids, BackendConfig())


def error_of(experts: ExpertWeights, weights: Tensor, ids: Tensor) -> float:
    inputs = hidden_for(ids, experts), experts, weights, ids
    return relative_error(run(*inputs), truth(*inputs))


@pytest.mark.parametrize("activation", ["silu", "gelu", "swiglu_oai", "relu2"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8", "fp8_channel"])
def test_hands_the_layer_over_whole(vllm: StandIn, dtype: DType, activation: Activation) -> None:
    ids = torch.tensor([[0, 3], [7, 7], [5, 1]], dtype=torch.int32)
    weights = torch.rand(3, 2, generator=torch.Generator().manual_seed(3))
    error = error_of(small_layer(dtype, activation, bias=True), weights, ids)
    assert error <= VllmFusedMoEBackend.tolerance[dtype]


NOT_OURS = [[-1, 3], [8, 7], [0, 99], [-1, 8], [-5, 2**31 - 1]]


@pytest.mark.parametrize("E", [8, 256], ids=["sorted", "by slot"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_ids_that_are_not_ours_add_nothing(vllm: StandIn, dtype: torch.dtype, E: int) -> None:
    ids = torch.tensor(NOT_OURS, dtype=dtype)
    ids[ids == 8] = E
    if dtype == torch.int64:
        ids[0, 0] = 2**32 + 1  # expert 1, if its upper half is lost
    weights = torch.ones(ids.shape)
    weights[(ids < 0) | (ids >= E)] = torch.nan
    assert error_of(small_layer("bf16", E=E), weights, ids) <= 1e-2
    assert [call["by_slot"] for call in vllm.calls] == [E == 256]
    assert vllm.calls[0]["ids"].dtype == torch.int32


def test_a_vllm_that_cannot_be_asked_always_sorts(vllm: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules[f"{PACKAGE}.fused_moe"], "_prepare_expert_assignment")
    assert error_of(small_layer("bf16", E=256), torch.ones(1, 2), torch.tensor([[3, -1]])) <= 1e-2
    assert not vllm.calls[0]["by_slot"]


def test_description_is_made_once_and_dies_with_the_weights(vllm: StandIn) -> None:
    experts, ids = small_layer("fp8"), torch.tensor([[0, 1]])
    for _ in range(3):
        run(hidden_for(ids, experts), experts, torch.ones(1, 2), ids)
    assert vllm.configs == 1
    description = vllm.calls[-1]["quant_config"]
    assert all(call["quant_config"] is description for call in vllm.calls)
    gone = weakref.ref(description)
    vllm.calls.clear()
    del experts, description
    gc.collect()
    assert gone() is None


def test_a_description_follows_tensors_that_are_replaced(vllm: StandIn) -> None:
    """Weight synchronisation gives a tensor other memory; a description of tensors that are gone would be stale."""
    experts, ids, weights = small_layer("fp8", bias=True), torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2)
    assert error_of(experts, weights, ids) <= 3e-2
    assert experts.gate_up_scale is not None
    assert experts.down_bias is not None
    experts.gate_up_scale.data = experts.gate_up_scale * 3
    experts.down_bias.data = experts.down_bias + 1
    assert error_of(experts, weights, ids) <= 3e-2
    assert vllm.configs == 1
    experts.gate_up_scale = experts.gate_up_scale / 3
    assert error_of(experts, weights, ids) <= 3e-2
    assert vllm.configs == 2


def test_layers_alike_share_an_expert_map_which_outlives_the_backend(vllm: StandIn) -> None:
    """`reset_dispatchers` drops the backends; a graph that was captured before is replayed all the same."""
    ids = torch.zeros(8, 2, dtype=torch.int64)
    for _ in range(2):
        experts = small_layer("bf16", E=4)
        run(hidden_for(ids, experts), experts, torch.ones(8, 2), ids)
    first, second = (call["expert_map"] for call in vllm.calls)
    assert second is first
    assert first.tolist() == [0, 1, 2, 3, -1]


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_ambient_defaults_change_nothing(vllm: StandIn, default: torch.dtype) -> None:
    experts, weights, ids = small_layer("fp8", E=256), torch.ones(1, 2), torch.tensor([[3, -1]])
    inputs = hidden_for(ids, experts), experts, weights, ids
    expected = run(*inputs)
    library.load().assigns_by_slot.clear()
    with default_dtype(default):
        with torch.device("meta"):
            assert library.assigns_by_slot(library.load(), 1, 2, 256)
        assert torch.equal(run(*inputs), expected)
    assert vllm.calls[-1]["by_slot"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("E", [8, 256], ids=["sorted", "by slot"])
@pytest.mark.parametrize("activation", ["silu", "swiglu_oai"])
@pytest.mark.parametrize("dtype", ["bf16", "fp8", "fp8_channel"])
def test_a_nan_in_a_token_stays_in_it(
    vllm: StandIn, dtype: DType, activation: Activation, E: int, value: float
) -> None:
    experts, ids = small_layer(dtype, activation, E=E), torch.tensor([[0, 3], [7, 1], [5, -1]])
    hidden, weights = hidden_for(ids, experts), torch.ones(3, 2)
    hidden[2, 5] = value
    inputs = hidden, experts, weights, ids
    out, expected = run(*inputs).float(), truth(*inputs)
    assert torch.equal(out[2].isnan(), expected[2].isnan())
    assert ((out - expected)[:2].norm() / expected[:2].norm()).item() <= VllmFusedMoEBackend.tolerance[dtype]
    assert torch.equal(weights, torch.ones(3, 2))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8"])
def test_tokens_that_start_anywhere(vllm: StandIn, dtype: DType) -> None:
    """As a view into a flat buffer does; vLLM quantises tokens to FP8 in whole vectors, at any address."""
    experts, ids = small_layer(dtype), torch.tensor([[0, 3], [7, 7]])
    hidden = hidden_for(ids, experts)
    flat = torch.empty(hidden.numel() + 1, dtype=hidden.dtype)
    view = flat[1:].view(hidden.shape).copy_(hidden)
    assert view.data_ptr() % 16
    call = experts, torch.ones(2, 2), ids
    assert torch.equal(run(view, *call), run(hidden, *call))


def test_plain_scales_are_asked_for_by_fp8_only(vllm: StandIn) -> None:
    ids, weights = torch.tensor([[0, 1]]), torch.ones(1, 2)
    for dtype in ("bf16", "fp8_channel"):
        error_of(small_layer(dtype), weights, ids)
    assert E8M0 not in os.environ
    error_of(small_layer("fp8"), weights, ids)
    assert os.environ[E8M0] == "0"


@pytest.mark.parametrize(("value", "word"), [(None, "decided it before"), ("1", f"{E8M0}=1")])
def test_refuses_rounded_scales(vllm: StandIn, monkeypatch: pytest.MonkeyPatch, value: str | None, word: str) -> None:
    vllm.rounds = True
    if value is not None:
        monkeypatch.setenv(E8M0, value)
    ids, weights = torch.tensor([[0, 1]]), torch.ones(1, 2)
    with pytest.raises(BackendUnavailableError, match=word):
        error_of(small_layer("fp8"), weights, ids)
    assert os.environ.get(E8M0) == value  # a variable that did not help is removed again
    assert vllm.calls == []
    assert error_of(small_layer("bf16"), weights, ids) <= 1e-2  # which has no multipliers to round


def test_a_failing_question_about_scales_is_a_reason(vllm: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> bool:
        raise AssertionError

    monkeypatch.setattr(sys.modules["vllm.utils.deep_gemm"], "is_deep_gemm_e8m0_used", ask)
    with pytest.raises(BackendUnavailableError, match="CUDA_HOME"):
        error_of(small_layer("fp8"), torch.ones(1, 2), torch.tensor([[0, 1]]))


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "fp8_channel"])
def test_the_configuration_of_modular_experts(vllm: StandIn, dtype: DType) -> None:
    experts = small_layer(dtype)
    config = library.moe_config(experts, 2, library.load().activation("silu"))
    size = "intermediate_size_per_partition" if vllm.release == "0.20.2" else "intermediate_size"
    assert (getattr(config, size), config.hidden_dim, config.num_local_experts) == (experts.N, experts.K, experts.E)


# Loading.


def another_release(hidden_states: Tensor, w1: Tensor, w2: Tensor, routing: Any, activation: Any = None) -> Tensor:
    raise AssertionError("must not be called")


def test_an_interface_that_is_not_known_is_a_reason(vllm: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[f"{PACKAGE}.fused_moe"], "fused_experts", another_release)
    with pytest.raises(BackendUnavailableError, match=r"takes no expert_map, .*topk_ids.* and needs routing.*0\.33\.0"):
        library.load()


@pytest.mark.gpu
def test_the_installed_vllm_has_the_interface() -> None:
    """Whatever release is installed; what it computes, the conformance suite shows."""
    pytest.importorskip("vllm")
    loaded = library.load()
    library.require_fp32_scales()
    assert all(loaded.activation(name) for name in ACTIVATIONS.values())
    assert library.assigns_by_slot(loaded, 1, 8, 256)
    assert not library.assigns_by_slot(loaded, 64, 8, 256)
    experts = make_experts(Workload("tiny", E=8, topk=2, K=128, N=128), "fp8", "cuda")
    library.fp8_config(loaded, experts)
    config = library.moe_config(experts, 2, loaded.activation("silu"))
    assert config.intermediate_size_per_partition == experts.N


@pytest.mark.parametrize(
    ("init", "word"),
    [
        ("raise AssertionError('half installed')", "AssertionError: half installed"),
        ("import a_library_that_is_not_there", "ModuleNotFoundError"),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
        ("", "fused_moe"),
    ],
)
def test_a_vllm_that_does_not_load(
    no_vllm: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, init: str, word: str
) -> None:
    write_package(tmp_path, f"{PACKAGE}.config", init)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendUnavailableError, match="does not load") as caught:
        error_of(small_layer("bf16"), torch.ones(1, 2), torch.tensor([[0, 1]]))
    assert word in str(caught.value)
    assert "pip install" in str(caught.value)
    assert caught.value.__cause__ is not None


def test_a_vllm_without_its_metadata_sees_no_cuda(vllm: StandIn) -> None:
    vllm.platform_is_cuda = False
    with pytest.raises(BackendUnavailableError, match="not for CUDA"):
        error_of(small_layer("bf16"), torch.ones(1, 2), torch.tensor([[0, 1]]))


# The stages.


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("slots", [1, 7, 700])
def test_mask_slots(dtype: torch.dtype, slots: int) -> None:
    ids = torch.arange(slots, dtype=dtype).view(slots, 1) - 2
    if dtype == torch.int64:
        ids[-1] += 2**32
    masked = mask_slots(ids.to(DEVICE), 5, -1).cpu()
    assert masked.dtype == torch.int32
    assert masked.flatten().tolist() == [e if 0 <= e < 5 else -1 for e in ids.flatten().tolist()]


@pytest.mark.parametrize("infinite", [False, True])
@pytest.mark.parametrize("K", [77, 5000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_mark_nan_tokens(dtype: torch.dtype, K: int, infinite: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(5, K, generator=generator).to(dtype)
    hidden[1, K - 1], hidden[2, 0], hidden[3, K // 2] = torch.nan, torch.inf, -torch.inf
    weights, ids = torch.rand(5, 3, generator=generator), torch.randint(-2, 9, (5, 3), generator=generator)
    ids[4, 0] = 2**32 + 1
    inputs = hidden.to(DEVICE), weights.to(DEVICE), ids.to(DEVICE)
    marked = mark_nan_tokens(*inputs, 7, -1, infinite=infinite)
    expected = mark_nan_tokens_torch(*inputs, 7, -1, infinite=infinite)
    assert marked[1].dtype == torch.int32
    assert torch.equal(marked[1], expected[1])
    assert torch.equal(marked[0].nan_to_num(-1.0), expected[0].nan_to_num(-1.0))
    assert marked[0].isnan().any(dim=1).tolist() == [False, True, infinite, infinite, False]
