"""What only a GPU can show of `MoELayer`: accuracy in BF16 and block FP8, and streams, under capture too."""

import pytest
import torch
from torch import Tensor

from moe_dispatch import ExpertWeights, MoELayer, Router
from moe_dispatch.dispatch.process import reset_dispatchers
from moe_dispatch.measure.verify import relative_error
from moe_dispatch.modules.side_stream import forked
from moe_dispatch.numerics import FP8, dequantize_blocks, quantize_blocks
from moe_dispatch.settings import settings

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def own_kernels(fresh_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the libraries: their layers are not what is tested here, and importing vLLM takes 20 s."""
    monkeypatch.setenv("MOE_DISPATCH_DISABLE", "vllm_fused_moe,deep_gemm")
    settings.cache_clear()
    reset_dispatchers()


def layer_of(dtype: torch.dtype, K: int = 1024, N: int = 512, E: int = 32) -> MoELayer:
    """A layer in the style of DeepSeek-V3 with a gated shared expert, its weights the same for every dtype."""
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
    streams = [torch.cuda.Stream() for _ in range(3)]  # type: ignore[no-untyped-call]
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
    torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]
    value.fill_(1.0)
    with forked(value.device) as side, torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]
        out.copy_(value)
    assert (out == 1.0).all()
