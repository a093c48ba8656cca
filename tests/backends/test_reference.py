"""The reference against formulas in another form, and its gradients."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import ExpertWeights, moe_forward
from moe_dispatch.activations import Activation
from moe_dispatch.backends.reference import ReferenceBackend, ReferenceConfig
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.machine import Machine
from moe_dispatch.numerics import dequantize_blocks, fp8_multiplier, quantize_rows_torch
from moe_dispatch.problem import DType
from moe_dispatch.workloads import ROUTINGS, Workload, make_experts, torch_dtype

M, K, N, E, TOPK = 6, 64, 48, 5, 3


def dense(
    hidden: Tensor, gate_up: Tensor, down: Tensor, experts: ExpertWeights, weights: Tensor, ids: Tensor
) -> Tensor:
    """Every token through every expert in float64, then weighted; nothing is gathered or looped over."""
    inner = torch.einsum("mk,enk->men", hidden.double(), gate_up.double())
    if experts.gate_up_bias is not None:
        inner = inner + experts.gate_up_bias.double()
    gate, up = (inner[..., ::2], inner[..., 1::2]) if experts.interleaved else inner.tensor_split(2, dim=-1)
    if experts.activation == "relu2":
        middle = inner.clamp(min=0) ** 2
    elif experts.activation == "silu":
        middle = gate / (1 + torch.exp(-gate)) * up
    elif experts.activation == "gelu":
        middle = gate * 0.5 * (1 + torch.erf(gate / 2**0.5)) * up
    elif experts.activation == "gelu_tanh":
        middle = gate * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
    else:
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        middle = (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
    out = torch.einsum("men,ekn->mek", middle, down.double())
    if experts.down_bias is not None:
        out = out + experts.down_bias.double()
    share = torch.zeros(M, E, dtype=torch.float64).scatter_add(1, ids.long(), weights.double())
    return torch.einsum("me,mek->mk", share, out)


def routing() -> tuple[Tensor, Tensor]:
    return ROUTINGS["uniform"].sample(M, E, TOPK, "cpu", torch.Generator().manual_seed(3))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swiglu_oai", "relu2"])
def test_it_is_the_formula(activation: Activation, bias: bool) -> None:
    layer = Workload("layer", E, TOPK, K, N, activation=activation, bias=bias, interleaved=activation == "swiglu_oai")
    experts = make_experts(layer, "fp32", "cpu")
    hidden, (weights, ids) = 3 * torch.randn(M, K), routing()
    out = moe_forward(hidden, experts, weights, ids, backend="reference")
    torch.testing.assert_close(out.double(), dense(hidden, experts.gate_up, experts.down, experts, weights, ids),
                               rtol=1e-4, atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_on_a_cpu_it_multiplies_in_fp32(dtype: DType) -> None:
    """Products in BF16 end the process on virtual machines that announce AMX and lack it."""
    backend = ReferenceBackend(Machine.inspect("cpu"))
    experts = make_experts(Workload("layer", E, TOPK, K, N), dtype, "cpu")
    inputs = torch.randn(M, K).to(torch_dtype(dtype)), experts, *routing()
    out = backend.run(*inputs, ReferenceConfig())
    assert torch.equal(out, backend.run(*inputs, ReferenceConfig(compute_fp32=True)))


def test_block_fp8_is_the_formula_up_to_its_rounding() -> None:
    experts = make_experts(Workload("layer", E, TOPK, K, N), "fp8", "cpu", act_dtype="fp32")
    assert experts.gate_up_scale is not None
    assert experts.down_scale is not None
    gate_up = dequantize_blocks(experts.gate_up, experts.gate_up_scale)
    down = dequantize_blocks(experts.down, experts.down_scale)
    hidden, (weights, ids) = torch.randn(M, K), routing()
    out = moe_forward(hidden, experts, weights, ids, backend="reference")
    expected = dense(hidden, gate_up, down, experts, weights, ids)
    error = float((out - expected).norm() / expected.norm())
    assert 1e-3 < error < 0.06, "activations are rounded twice to three bits, 1/16 at most each time"


@pytest.mark.parametrize("dtype", ["fp32", "fp8"])
def test_gradients(dtype: str) -> None:
    layer = Workload("layer", E, TOPK, K, N)
    experts = make_experts(layer, dtype, "cpu", act_dtype="fp32")  # type: ignore[arg-type]
    gate_up, down = experts.gate_up.float(), experts.down.float()
    if experts.gate_up_scale is not None and experts.down_scale is not None:
        gate_up = dequantize_blocks(experts.gate_up, experts.gate_up_scale)
        down = dequantize_blocks(experts.down, experts.down_scale)
    weights, ids = routing()
    grads = []
    start = torch.randn(M, K)
    for run in (
        lambda h: moe_forward(h, experts, weights, ids),
        lambda h: dense(h, gate_up, down, experts, weights, ids),
    ):
        hidden = start.clone().requires_grad_()
        out: Tensor = run(hidden)  # type: ignore[no-untyped-call]
        out.sum().backward()  # type: ignore[no-untyped-call]
        assert hidden.grad is not None
        grads.append(hidden.grad)
    error = float((grads[0] - grads[1]).norm() / grads[1].norm())
    assert error < (1e-5 if dtype == "fp32" else 0.06)


@pytest.mark.parametrize("tokens", [0, M])
@pytest.mark.parametrize("wants", ["hidden_states", "topk_weights", "gate_up", "down", "gate_up_bias", "down_bias"])
def test_a_rank_without_tokens_stands_in_the_graph(tokens: int, wants: str) -> None:
    """Data parallelism waits for a gradient of every parameter, if only of zeros."""
    layer = make_experts(Workload("layer", E, TOPK, K, N, bias=True), "fp32", "cpu")
    leaf: dict[str, Any] = {
        "hidden_states": torch.randn(tokens, K), "topk_weights": torch.ones(tokens, TOPK), "gate_up": layer.gate_up,
        "down": layer.down, "gate_up_bias": layer.gate_up_bias, "down_bias": layer.down_bias,
    }  # fmt: skip
    leaf[wants].requires_grad_()
    hidden, weights, ids = leaf.pop("hidden_states"), leaf.pop("topk_weights"), torch.full((tokens, TOPK), E)
    out = moe_forward(hidden, ExpertWeights(**leaf), weights, ids)
    assert out.shape == (tokens, K)
    out.sum().backward()  # type: ignore[no-untyped-call]
    grad = {"hidden_states": hidden, "topk_weights": weights, **leaf}[wants].grad
    assert grad is not None
    assert not grad.any()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_forward_mode_takes_the_reference() -> None:
    """Forward mode is active under no_grad too, and a kernel would silently drop the tangent."""
    experts = make_experts(Workload("layer", E, TOPK, K, N), "fp32", "cpu")
    weights, ids = ROUTINGS["uniform"].sample(M, E, TOPK, "cpu")
    hidden, tangent = torch.randn(M, K, requires_grad=True), torch.randn(M, K)
    (gradient,) = torch.autograd.grad(moe_forward(hidden, experts, weights, ids).sum(), hidden)
    with torch.no_grad():
        moe_forward(hidden, experts, weights, ids)
        run = functools.partial(moe_forward, experts=experts, topk_weights=weights, topk_ids=ids)
        along = torch.func.jvp(run, (hidden.detach(),), (tangent,))[1].sum()
    assert along.item() == pytest.approx((gradient * tangent).sum().item(), rel=1e-4)
    assert not get_dispatcher("cpu").quarantine.entries()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_multipliers_are_correctly_rounded_on_every_device(device: str) -> None:
    """Every mantissa that a BF16 magnitude can have; the product with 1/448 is off for a third of them."""
    amax = (1 + torch.arange(128) / 128).to(device)
    exact = (amax.double() / 448).float()  # a quotient rounded to 53 bits rounds to 24 as the exact one does
    assert torch.equal(fp8_multiplier(amax), exact)
    reciprocal = torch.tensor(1 / 448, device=device)
    assert not torch.equal(amax * reciprocal, exact)


@pytest.mark.gpu
def test_a_gpu_quantises_ties_as_a_cpu_does() -> None:
    x = torch.randn(2048, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    (codes, scale), (other_codes, other_scale) = quantize_rows_torch(x), quantize_rows_torch(x.cuda())
    assert torch.equal(scale, other_scale.cpu())
    assert torch.equal(codes.view(torch.uint8), other_codes.cpu().view(torch.uint8))
