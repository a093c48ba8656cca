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
from moe_dispatch.numerics import fp8_multiplier, quantize_rows_torch
from moe_dispatch.problem import DType
from moe_dispatch.workloads import ROUTINGS, Workload, make_experts
from tests.attack.oracle import Layer, truth

M, K, N, E, TOPK = 6, 64, 48, 5, 3


def layer(dtype: DType, activation: Activation = "silu", *, bias: bool = False) -> ExpertWeights:
    interleaved = activation == "swiglu_oai"
    shape = Workload("layer", E, TOPK, K, N, activation=activation, bias=bias, interleaved=interleaved)
    return make_experts(shape, dtype, "cpu", act_dtype="fp32" if dtype.startswith("fp8") else dtype)


def formula(hidden: Tensor, experts: ExpertWeights, weights: Tensor, ids: Tensor) -> Tensor:
    """The attack's oracle, which computes in float64 and without any code of the package."""
    scales, biases = (
        None if up is None or down is None else (up, down)
        for up, down in ((experts.gate_up_scale, experts.down_scale), (experts.gate_up_bias, experts.down_bias))
    )
    kind = experts.activation, experts.interleaved
    return truth(hidden, Layer(experts.gate_up, experts.down, scales, biases, *kind), weights, ids).out


def routing() -> tuple[Tensor, Tensor]:
    return ROUTINGS["uniform"].sample(M, E, TOPK, "cpu", torch.Generator().manual_seed(3))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swiglu_oai", "relu2"])
def test_it_is_the_formula(activation: Activation, bias: bool) -> None:
    arguments = 3 * torch.randn(M, K), layer("fp32", activation, bias=bias), *routing()
    out = moe_forward(*arguments, backend="reference")
    torch.testing.assert_close(out.double(), formula(*arguments), rtol=1e-4, atol=1e-4)


def test_on_a_cpu_it_multiplies_bf16_in_fp32() -> None:
    """Products in BF16 end the process on virtual machines that announce AMX and lack it."""
    backend = ReferenceBackend(Machine.inspect("cpu"))
    inputs = torch.randn(M, K).bfloat16(), layer("bf16"), *routing()
    out = backend.run(*inputs, ReferenceConfig())
    assert torch.equal(out, backend.run(*inputs, ReferenceConfig(compute_fp32=True)))


@pytest.mark.parametrize("dtype", ["fp8", "fp8_channel"])
def test_fp8_is_the_formula_up_to_its_rounding(dtype: DType) -> None:
    arguments = torch.randn(M, K), layer(dtype), *routing()
    expected = formula(*arguments)
    error = float((moe_forward(*arguments, backend="reference") - expected).norm() / expected.norm())
    assert 1e-3 < error < 0.06, "activations are rounded twice to three bits, 1/16 at most each time"


@pytest.mark.parametrize("dtype", ["fp32", "fp8", "fp8_channel"])
def test_gradients(dtype: DType) -> None:
    others, start, grads = (layer(dtype), *routing()), torch.randn(M, K), []
    for run in (moe_forward, formula):
        hidden = start.clone().requires_grad_()
        grads.append(torch.autograd.grad(run(hidden, *others).sum(), hidden)[0])
    error = float((grads[0] - grads[1]).norm() / grads[1].norm())
    assert error < (1e-5 if dtype == "fp32" else 0.06)


@pytest.mark.parametrize("tokens", [0, M])
@pytest.mark.parametrize("wants", ["hidden_states", "topk_weights", "gate_up", "down", "gate_up_bias", "down_bias"])
def test_a_rank_without_tokens_stands_in_the_graph(tokens: int, wants: str) -> None:
    """Data parallelism waits for a gradient of every parameter, if only of zeros."""
    leaf: dict[str, Any] = dict(layer("fp32", bias=True).tensors())
    leaf |= {"hidden_states": torch.randn(tokens, K), "topk_weights": torch.ones(tokens, TOPK)}
    leaf[wants].requires_grad_()
    hidden, weights, ids = leaf.pop("hidden_states"), leaf.pop("topk_weights"), torch.full((tokens, TOPK), E)
    out = moe_forward(hidden, ExpertWeights(**leaf), weights, ids)
    assert out.shape == (tokens, K)
    out.sum().backward()
    grad = {"hidden_states": hidden, "topk_weights": weights, **leaf}[wants].grad
    assert grad is not None
    assert not grad.any()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_forward_mode_takes_the_reference() -> None:
    """Forward mode is active under no_grad too, and a kernel would silently drop the tangent."""
    experts, (weights, ids) = layer("fp32"), routing()
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
