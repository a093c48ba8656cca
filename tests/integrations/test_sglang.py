"""The SGLang plugin against the installed SGLang's own runner, on a CPU; nothing of the engine around it is started."""

import importlib.metadata
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt import runtime_context
from sglang.srt.arg_groups import overrides
from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
from sglang.srt.layers.moe.moe_runner.runner import MoeRunner
from sglang.srt.layers.moe.moe_runner.triton import TritonMoeQuantInfo, TritonRunnerCore
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput, StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.moe.utils import MoeRunnerBackend
from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, PhaseConfig
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import ServerArgs

from moe_dispatch import ExpertWeights, moe_forward
from moe_dispatch.integrations.engine_takeover import Batches
from moe_dispatch.integrations.sglang import VARIABLE, VERSIONS, register, runner

E, TOPK, K, N, M = 8, 2, 256, 128, 5


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The hook applied as SGLang's `load_plugins` does, and undone afterwards."""
    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: VERSIONS[-1])
    runner.TAKEOVER.taken.clear()
    runner.TAKEOVER.left.clear()
    runner.TAKEOVER._told = (0, 0)
    runner.TAKEOVER.warmed.clear()
    monkeypatch.setattr(runner.TAKEOVER, "remember_engine", lambda *_: None)
    monkeypatch.setattr(runner.TAKEOVER, "batches", Batches(most_tokens=16))
    original = MoeRunner.run
    register()
    register()
    assert len(HookRegistry._hooks[runner.TARGET]) == 1
    HookRegistry.apply_hooks()
    yield
    HookRegistry.reset()
    MoeRunner.run = original


def weights(form: str = "bf16") -> tuple[ExpertWeights, dict[str, Any]]:
    """Experts, and how SGLang's quantisation methods describe them to the runner."""
    generator = torch.Generator().manual_seed(0)
    gate_up, down = (torch.randn(E, *shape, generator=generator) / 16 for shape in ((2 * N, K), (K, N)))
    if form == "bf16":
        experts = ExpertWeights(gate_up.bfloat16(), down.bfloat16())
        return experts, {"w13_weight": experts.gate_up, "w2_weight": experts.down}
    experts = ExpertWeights.quantize(gate_up, down, form="block" if form == "block" else "channel")
    assert experts.gate_up_scale is not None
    assert experts.down_scale is not None
    scales: tuple[torch.Tensor, torch.Tensor] = experts.gate_up_scale, experts.down_scale
    described: dict[str, Any] = {"use_fp8_w8a8": True, "w13_weight": experts.gate_up, "w2_weight": experts.down}
    if form == "block":
        described["block_shape"] = [128, 128]
    else:
        scales = scales[0].unsqueeze(2), scales[1].unsqueeze(2)
        described["per_channel_quant"] = True
    return experts, described | {"w13_scale": scales[0], "w2_scale": scales[1]}


def call() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(E, generator=generator)[:TOPK] for _ in range(M)]).int()
    return torch.randn(M, K, generator=generator).bfloat16(), torch.rand(M, TOPK, generator=generator), ids


def dispatched(hidden: torch.Tensor, topk_weights: torch.Tensor, ids: torch.Tensor) -> Any:
    return StandardDispatchOutput(hidden, None, StandardTopKOutput(topk_weights, ids, torch.empty(0)))


def make_runner(**config: Any) -> Any:
    own = {"num_experts": E, "num_local_experts": E, "hidden_size": K, "top_k": TOPK}
    made = MoeRunner(MoeRunnerBackend.TRITON, MoeRunnerConfig(**{**own, **config}))
    made.fused_func = lambda *_: StandardCombineInput(torch.zeros(0))  # SGLang's own needs a GPU
    return made


@pytest.mark.parametrize("form", ["bf16", "block", "channel"])
def test_layers_run_through_moe_forward(form: str, caplog: pytest.LogCaptureFixture) -> None:
    experts, described = weights(form)
    made, arguments = make_runner(routed_scaling_factor=2.5), call()
    hidden, topk_weights, ids = arguments
    before = hidden.clone()
    with caplog.at_level(logging.INFO, logger="sglang.moe_dispatch"):
        for _ in range(2):
            out = made.run(dispatched(*arguments), TritonMoeQuantInfo(**described)).hidden_states
    assert torch.equal(out, moe_forward(hidden, experts, topk_weights * 2.5, ids))
    assert torch.equal(hidden, before)
    assert runner.TAKEOVER.taken.total() == 1
    assert "left to SGLang: none" in caplog.text


def test_under_expert_parallelism_ids_are_local() -> None:
    experts, described = weights()
    hidden, topk_weights, ids = call()
    ids[0, 0] = -1
    out = make_runner(num_experts=4 * E).run(dispatched(hidden, topk_weights, ids), TritonMoeQuantInfo(**described))
    assert torch.equal(out.hidden_states, moe_forward(hidden, experts, topk_weights, ids))
    assert "routed_experts=32" in next(iter(runner.TAKEOVER.taken))


def test_a_reload_that_moves_the_weights_is_seen() -> None:
    _, described = weights()
    made, arguments = make_runner(), call()
    first = made.run(dispatched(*arguments), TritonMoeQuantInfo(**described)).hidden_states
    described["w2_weight"] = described["w2_weight"] * 2
    second = made.run(dispatched(*arguments), TritonMoeQuantInfo(**described)).hidden_states
    torch.testing.assert_close(second.float(), 2 * first.float())
    assert runner.TAKEOVER.taken.total() == 1


GATES: dict[str, tuple[dict[str, Any], str, bool]] = {
    "gpt-oss": ({"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0}, "swiglu_oai", True),
    "MiniMax-M3": (
        {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0, "gate_up_interleaved": False}, "swiglu_oai", False,
    ),
    "DeepSeek-V4": ({"swiglu_limit": 10.0}, "swiglu(limit=10)", False),
    "Kimi": ({"activation": "situ", "gemm1_clamp_limit": 25.0}, "swiglu(gate_cap=4,up_cap=25)", False),
    "Gemma": ({"activation": "gelu_tanh"}, "gelu_tanh", False),
}  # fmt: skip


@pytest.mark.parametrize("model", GATES)
def test_gates_are_those_of_the_runner(model: str) -> None:
    options, activation, interleaved = GATES[model]
    experts, described = weights()
    arguments = call()
    out = make_runner(**options).run(dispatched(*arguments), TritonMoeQuantInfo(**described)).hidden_states
    hidden, topk_weights, ids = arguments
    ours = ExpertWeights(experts.gate_up, experts.down, activation=activation, interleaved=interleaved)
    assert torch.equal(out, moe_forward(hidden, ours, topk_weights, ids))


LEFT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "the SiLU is clamped after": ({"gemm1_clamp_limit": 7.0}, {}, "gemm1_clamp_limit=7.0"),
    "no sum": ({"no_combine": True, "inplace": False}, {}, "no_combine of the runner"),
    "weights on the input": ({"apply_router_weight_on_input": True}, {}, "apply_router_weight_on_input of the runner"),
    "int8": ({}, {"use_int8_w8a8": True}, "weights stored for use_int8_w8a8"),
    "static": ({}, {"a13_scale": torch.ones(1)}, "static scales of activations"),
    "a scale per tensor": ({}, {"use_fp8_w8a8": True}, "FP8 with a scale per tensor"),
    "blocks": ({}, {"block_shape": [64, 128]}, "scales of [64, 128] blocks"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_does_not_fit_stays_sglangs_own(case: str) -> None:
    config, quant, reason = LEFT[case]
    _, described = weights()
    out = make_runner(**config).run(dispatched(*call()), TritonMoeQuantInfo(**described, **quant))
    assert out.hidden_states.numel() == 0
    assert reason in next(iter(runner.TAKEOVER.left))


def resolved(monkeypatch: pytest.MonkeyPatch, **values: Any) -> Any:
    """SGLang's arguments, after it has decided these: up to 0.5.18 in the arguments themselves, later beside them."""
    if not hasattr(overrides, "declare_resolution"):
        monkeypatch.setattr(ServerArgs, "__post_init__", lambda self: None)  # decides, and looks for a GPU to do so
        return ServerArgs(model_path="any", **values)
    arguments = ServerArgs(model_path="any")
    overrides.declare_resolution(arguments, "test", **values)
    return arguments


@pytest.mark.parametrize(("chunk", "most_tokens"), [(4096, 4096), (-1, 16384)])
def test_token_counts_are_those_that_sglang_resolves(
    chunk: int, most_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are published; the server arguments go on holding None. -1 cuts no prefill."""
    graphs = CudaGraphConfig(decode=PhaseConfig("full", bs=[4, 1, 2]), prefill=PhaseConfig("breakable", bs=[512]))
    arguments = resolved(monkeypatch, chunked_prefill_size=chunk, cuda_graph_config=graphs)
    monkeypatch.setattr(runtime_context._CONTEXT, "_config_bags", runtime_context._build_config_bags(arguments))
    remembered: list[tuple[object, ...]] = []
    monkeypatch.setattr(runner.TAKEOVER, "remember_engine", lambda *counts: remembered.append(counts))
    runner._remember_engine()
    assert remembered == [({1, 2, 4, 512}, most_tokens)]


def test_a_core_of_another_package_stays_in_use() -> None:
    """From 0.5.19 on one may be registered for the Triton runner."""

    class Foreign(TritonRunnerCore):  # type: ignore[misc]
        __module__ = "another_plugin.cores"

    made = make_runner()
    made.runner_core = Foreign(made.config)
    _, described = weights()
    assert made.run(dispatched(*call()), TritonMoeQuantInfo(**described)).hidden_states.numel() == 0
    assert "Foreign of another_plugin.cores" in next(iter(runner.TAKEOVER.left))


@pytest.mark.parametrize("version", ["0.5.16", "0.5.23.post1", "0.6.0"])
def test_another_version_is_refused_with_the_reason(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    HookRegistry.reset()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    register()
    monkeypatch.setenv(VARIABLE, "0")
    register()
    assert not HookRegistry._hooks.get(runner.TARGET)
    assert f"SGLang {version} is not known" in caplog.text
    assert "Known: 0.5.17 to 0.5.23" in caplog.text
