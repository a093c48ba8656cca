"""Activations of every BF16 number, as the kernels compute them, beside fp64."""

import math

import pytest
import torch
from torch import Tensor

from moe_dispatch.activations import swiglu
from moe_dispatch.numerics import activate_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GATES = ("silu", "gelu_tanh", "swiglu_oai", "swiglu(alpha=1.5,limit=6,shift=0.5,gate_cap=4,up_cap=25)")
SIZE = 1 << 10


@pytest.mark.parametrize("activation", GATES)
def test_of_every_number(activation: str) -> None:
    pytest.importorskip("triton")
    from tests.support.activation_kernel import _moe_activated_values_kernel

    bits = torch.arange(1 << 16, dtype=torch.int32, device=DEVICE)
    gate = bits.to(torch.int16).view(torch.bfloat16).float()
    up, out = torch.full_like(gate, 0.75), torch.empty_like(gate)
    _moe_activated_values_kernel[(len(gate) // SIZE,)](gate, up, out, ACTIVATION=activation, SIZE=SIZE)
    truth = _in_fp64(gate.double(), up.double(), activation)
    assert torch.equal(out.isnan(), truth.isnan())
    assert torch.equal(out.isinf(), truth.abs() > torch.finfo(torch.float32).max)
    finite = out.isfinite()
    gate, out, truth = gate[finite].double(), out[finite].double(), truth[finite]
    error = (out - truth).abs()
    # An exponential's relative error grows with its exponent, of which fp32 has 24 bits: 88 · 2^-23 is 1e-5. Where a
    # sigmoid is below 2^-126, the smallest normal number, it may be zero.
    assert (error <= 1.2e-5 * truth.abs() + 100 * 2.0**-126).all()
    near = gate.abs() < 4
    assert (error <= 2e-6 * truth.abs() + 2.0**-126)[near].all()


def _in_fp64(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if activation == "gelu_tanh":
        # 1 + tanh(z) leaves nothing of small values; 2 · sigmoid(2z) does.
        z = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        return gate * torch.sigmoid(2 * z) * up
    assert swiglu(activation) is not None
    return activate_torch(torch.cat([gate, up]), activation)
