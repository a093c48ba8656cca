"""What only a GPU can show of `MoELayer`: accuracy in BF16 and block FP8, streams under capture, the router's time.

python -m pytest -q -s -p no:cacheprovider tests/gpu/test_moe_layer.py
"""

import functools
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_dispatch import ExpertWeights, MoELayer, Router
from moe_dispatch.backends.stages.router_logits import router_logits
from moe_dispatch.backends.stages.select_experts import select_experts
from moe_dispatch.dispatch.process import reset_dispatchers
from moe_dispatch.measure.verify import relative_error
from moe_dispatch.modules import layer as layer_module
from moe_dispatch.modules.side_stream import forked
from moe_dispatch.numerics import FP8, dequantize_blocks, quantize_blocks
from moe_dispatch.routers import select_experts_torch
from moe_dispatch.settings import settings

pytestmark = pytest.mark.gpu
ALONE = "PYTEST_XDIST_WORKER" not in os.environ  # times mean nothing while other workers use the device
ROUTER_US = 4.0
DEEPSEEK_V3 = Router(8, "sigmoid", scale=2.5, groups=8, topk_groups=4, correction_bias=True)
ROUTERS = {
    "deepseek-v3": (256, 7168, DEEPSEEK_V3),
    "kimi-k2": (384, 7168, Router(8, "sigmoid", scale=2.827, correction_bias=True)),
    "qwen3-30b-a3b": (128, 2048, Router(8)),
    "gpt-oss-120b": (128, 2880, Router(4, bias=True)),
}


@pytest.fixture(autouse=True)
def own_kernels(fresh_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the libraries: their layers are not what is tested here, and importing vLLM takes 20 s."""
    monkeypatch.setenv("MOE_DISPATCH_DISABLE", "vllm_fused_moe,deep_gemm")
    settings.cache_clear()
    reset_dispatchers()


def layer_of(dtype: torch.dtype) -> MoELayer:
    """A layer in the style of DeepSeek-V3 with a gated shared expert, its weights the same for every dtype."""
    K, N, E = 1024, 512, 32
    torch.manual_seed(0)
    router = Router(4, "sigmoid", scale=2.5, groups=4, topk_groups=2, correction_bias=True)
    plain = MoELayer(K, N, E, router, shared_N=2 * N, shared_gate=True, dtype=torch.bfloat16, device="cuda")
    assert plain.gate.e_score_correction_bias is not None
    plain.gate.e_score_correction_bias.normal_(std=0.05)
    if dtype != FP8:
        return plain.to(dtype).requires_grad_(requires_grad=False)
    layer = MoELayer(K, N, E, router, shared_N=2 * N, shared_gate=True, dtype=FP8, device="cuda")
    state = plain.state_dict()
    for module in ("experts", "shared_experts"):
        up, down = f"{module}.gate_up_proj", f"{module}.down_proj"
        experts = ExpertWeights.quantize(state[up], state[down])
        layer.get_submodule(module).assign(experts)  # type: ignore[operator] # both are StackedExperts
        for name in (up, down):
            del state[name]
    layer.load_state_dict(state, strict=False)
    return layer.requires_grad_(requires_grad=False)


def truth(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """The layer of these weights, computed in fp32 on the CPU: FP8 ones have their rounding, activations have none."""
    layer = layer_of(torch.bfloat16).to("cpu", torch.float32)
    if dtype == FP8:
        assert layer.shared_experts is not None
        for module in (layer.experts, layer.shared_experts):
            for weight in (module.gate_up_proj, module.down_proj):
                weight.copy_(dequantize_blocks(*quantize_blocks(weight)))
    out: Tensor = layer(hidden.cpu().float())
    return out


def tokens(M: int, K: int = 1024) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M)).bfloat16().cuda()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (FP8, 5e-2)], ids=["bf16", "fp8"])
@pytest.mark.parametrize("M", [1, 33, 512])
@torch.no_grad()
def test_agrees_with_fp32(M: int, dtype: torch.dtype, tolerance: float) -> None:
    layer, hidden = layer_of(dtype), tokens(M)
    expected = truth(hidden, dtype).cuda()
    out = layer(hidden)
    assert out.dtype == torch.bfloat16
    error = relative_error(out, expected)
    print(f"{dtype} M={M}: error {error:.1e}")
    assert error <= tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("M", [1, 64, 512])
@torch.no_grad()
def test_a_captured_layer_is_right_on_other_tokens(M: int, dtype: torch.dtype) -> None:
    layer, hidden = layer_of(dtype), tokens(M)
    layer.warm_up([M])
    static = hidden.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(static)
    for seed in range(20):
        static.copy_(torch.randn(M, 1024, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        replayed = out.clone()
        assert relative_error(replayed, layer(static)) <= 1e-2


@torch.no_grad()
def test_eager_calls_on_several_streams_do_not_disturb_each_other() -> None:
    layer = layer_of(torch.bfloat16)
    streams = [torch.cuda.Stream() for _ in range(3)]
    inputs = [tokens(M) for M in (1, 8, 64)]
    expected = [layer(hidden) for hidden in inputs]
    torch.cuda.synchronize()
    for _ in range(30):
        outs = []
        for stream, hidden in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                outs.append(layer(hidden))
        torch.cuda.synchronize()
        for out, wanted in zip(outs, expected, strict=True):
            assert relative_error(out, wanted) <= 1e-2


@torch.no_grad()
def test_a_fork_waits_on_both_ends() -> None:
    value, out = torch.zeros(1 << 24, device="cuda"), torch.empty(1 << 24, device="cuda")
    torch.cuda._sleep(50_000_000)
    value.fill_(1.0)
    with forked(value.device) as side, torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        out.copy_(value)
    assert (out == 1.0).all()


def graph_us(call: Callable[[], object], repeats: int = 64) -> float:
    """Time of a call within a CUDA graph that repeats it, in µs; the least of several replays."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    best = float("inf")
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, 1e3 * start.elapsed_time(end) / repeats)
    return best


@pytest.mark.skipif(not ALONE, reason="other workers share the device: run it without -n")
@pytest.mark.parametrize("name", ROUTERS)
@torch.no_grad()
def test_the_routers_time_beside_the_layer(name: str) -> None:
    """What the router adds to the routed experts in one graph: the whole gate, and the choice alone."""
    E, K, router = ROUTERS[name]
    layer = MoELayer(K, 256, E, router, dtype=torch.bfloat16, device="cuda")
    hidden = tokens(1, K)
    layer.warm_up([1])
    topk_weights, topk_ids, logits = layer.gate(hidden)
    experts = graph_us(lambda: layer.experts(hidden, topk_weights, topk_ids))
    logits_us = graph_us(lambda: router_logits(hidden, layer.gate.weight, layer.gate.bias, pdl=True))
    library_us = graph_us(lambda: torch.mm(hidden, layer.gate.weight.t(), out_dtype=torch.float32))
    gate_us = graph_us(lambda: layer.gate(hidden))
    whole = graph_us(lambda: layer(hidden))

    def with_choice() -> None:
        weights, ids = select_experts(logits, router, layer.gate.e_score_correction_bias, pdl=True)
        layer.experts(hidden, weights, ids)

    def with_torch() -> None:
        weights, ids = select_experts_torch(logits, router, layer.gate.e_score_correction_bias)
        layer.experts(hidden, weights, ids)

    chosen, by_torch = graph_us(with_choice) - experts, graph_us(with_torch) - experts
    print(
        f"{name} M=1: experts {experts:.2f} µs; gate +{whole - experts:.2f} µs, of which the choice {chosen:.2f} µs "
        f"(in torch {by_torch:.2f} µs); gate {gate_us:.2f} µs, logits {logits_us:.2f} µs (cuBLAS {library_us:.2f})"
    )
    assert chosen <= ROUTER_US


@pytest.mark.skipif(not ALONE, reason="other workers share the device: run it without -n")
@torch.no_grad()
def test_the_second_streams_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared experts beside the routed ones, and after them; at the sizes of DeepSeek-V3 with 32 of its experts."""
    for dtype in (torch.bfloat16, FP8):
        layer = MoELayer(7168, 2048, 32, Router(8), shared_N=2048, dtype=dtype, device="cuda")
        for M in (1, 64, 256, 512):
            layer.warm_up([M])
            hidden = tokens(M, 7168)
            times = []
            for limit in (0, 1 << 20):
                monkeypatch.setattr(layer_module, "SIDE_STREAM_TOKENS", limit)
                times.append(graph_us(functools.partial(layer, hidden), repeats=8))
            print(f"{dtype} M={M}: one stream {times[0]:.1f} µs, two {times[1]:.1f} µs")
            if M <= 64:
                assert times[1] < 1.02 * times[0]
