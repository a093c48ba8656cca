"""Gradients on a GPU: grouped products and the loop over experts against fp32, their memory, graphs and repetition."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import ExpertWeights, moe_forward
from moe_dispatch.activations import Activation
from moe_dispatch.backends.backward import backward, by_expert, grouped
from moe_dispatch.backends.reference import ReferenceBackend, ReferenceConfig
from moe_dispatch.dispatch.gradients import Gradients, Wanted
from moe_dispatch.machine import Machine
from moe_dispatch.workloads import ROUTINGS, Workload, make_experts

pytestmark = pytest.mark.gpu

EVERYTHING = Wanted(*[True] * len(Wanted._fields))
ROUNDING = 2.0**-7  # of BF16: what is rounded twice on the way


def layer(activation: Activation, *, bias: bool, transposed: bool = False) -> ExpertWeights:
    workload = Workload("gradients", E=24, topk=4, K=512, N=256, activation=activation, bias=bias, interleaved=bias)
    generator = torch.Generator("cuda").manual_seed(0)
    return make_experts(workload, "bf16", "cuda", generator, transposed=transposed)


def call(experts: ExpertWeights, M: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden_states, weights, ids with slots of other ranks and experts without a token, and the output's gradient."""
    generator = torch.Generator().manual_seed(M)
    weights, ids = ROUTINGS["uniform"].sample(M, experts.E, 4, "cpu", generator)
    ids[ids % 5 == 2] = -1
    ids[ids == 7] = experts.E
    hidden, gradient = (torch.randn(M, experts.K, generator=generator).to("cuda", torch.bfloat16) for _ in range(2))
    return hidden, weights.cuda(), ids.cuda(), gradient


def truth(experts: ExpertWeights, hidden: Tensor, weights: Tensor, ids: Tensor, gradient: Tensor) -> list[Tensor]:
    named: dict[str, Any] = {name: tensor.float().requires_grad_() for name, tensor in experts.tensors()}
    kind: dict[str, Any] = {name: getattr(experts, name) for name in ("activation", "interleaved", "transposed")}
    wide = ExpertWeights(**named, **kind)
    leaves = [hidden.float().requires_grad_(), weights.clone().requires_grad_(), *named.values()]
    reference = ReferenceBackend(Machine.inspect("cuda"))
    out = reference.run(leaves[0], wide, leaves[1], ids, ReferenceConfig(compute_fp32=True))
    return list(torch.autograd.grad(out, leaves, gradient.float()))


@pytest.mark.parametrize("module", [grouped, by_expert])
@pytest.mark.parametrize("M", [3, 300])
@pytest.mark.parametrize(
    ("activation", "bias", "transposed"),
    [
        ("silu", False, False),
        ("swiglu_oai", True, False),
        ("swiglu_oai", True, True),
        # Not a clamp that many elements are near: rounding the first product to BF16 moves some across its edge, where
        # the derivative jumps. By that alone a limit of 1 changes gradients by 6 %.
        ("swiglu(gate_cap=2,up_cap=3)", False, False),
    ],
)
def test_they_are_as_near_to_fp32_as_bf16_is(
    activation: Activation, bias: bool, transposed: bool, M: int, module: object
) -> None:
    experts = layer(activation, bias=bias, transposed=transposed)
    if module is grouped and (reasons := grouped.reasons_against(experts, Machine.inspect("cuda"))):
        pytest.skip("; ".join(reasons))
    hidden, weights, ids, gradient = call(experts, M)
    expected = truth(experts, hidden, weights, ids, gradient)
    spoilt = torch.full((64 << 20,), torch.nan, device="cuda")  # the allocator hands this memory out again
    del spoilt
    made: Gradients = module.backward(gradient, (hidden, experts, weights, ids), EVERYTHING)  # type: ignore[attr-defined]
    got = [tensor for tensor in made if tensor is not None]
    assert len(got) == len(expected)
    for name, tensor, want in zip(
        (name for name in Gradients._fields if getattr(made, name) is not None), got, expected, strict=True
    ):
        error = float((tensor.float() - want).norm() / want.norm())
        assert error < ROUNDING, f"{name}: {error:.1e}"
        if name in ("gate_up", "down", "gate_up_bias", "down_bias"):
            assert not tensor[7].any(), f"{name} of an expert without a token"


@pytest.mark.parametrize("bias", [False, True])
def test_the_same_inputs_give_the_same_bits(bias: bool) -> None:
    experts = layer("swiglu_oai" if bias else "silu", bias=bias)
    hidden, weights, ids, gradient = call(experts, 200)
    inputs, machine = (hidden, experts, weights, ids), Machine.inspect("cuda")
    first, second = (backward(gradient, inputs, EVERYTHING, machine) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)


def test_a_training_step_is_captured_in_a_graph() -> None:
    experts = layer("silu", bias=False)
    if reasons := grouped.reasons_against(experts, Machine.inspect("cuda")):
        pytest.skip("; ".join(reasons))
    hidden, weights, ids, _ = call(experts, 128)
    leaf = hidden.requires_grad_()
    gate_up, down = experts.gate_up.requires_grad_(), experts.down.requires_grad_()

    def step() -> list[Tensor]:
        out = moe_forward(leaf, ExpertWeights(gate_up, down), weights, ids)
        return list(torch.autograd.grad(out.float().square().sum(), [leaf, gate_up, down]))

    with torch.cuda.stream(torch.cuda.Stream()):
        expected = [step() for _ in range(4)][-1]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
