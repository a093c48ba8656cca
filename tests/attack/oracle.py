"""The right answer of a call, computed in fp64 without any code of the package.

out[m] = Σ_j w[m, j] · (down[e] · act(gate_up[e] · x[m] + bias) + bias) with e = ids[m, j]; an id outside 0…E-1 adds
nothing. The activated intermediate is kept in the dtype of hidden_states. A token with an element beyond its range,
65504 in FP16, may come out infinite or NaN, however small the exact result is.
"""

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_BLOCK: Final = 128
# How far a result may be from the right one, as a share of what the sum of all magnitudes allows.
TOLERANCE: Final = {"fp32": 1e-4, "fp16": 4e-3, "bf16": 2e-2, "fp8": 2e-1, "fp8_channel": 2e-1}
# SwiGLU with parameters: alpha, limit and shift of ``(up + shift) · gate · sigmoid(alpha · gate)``.
SWIGLU: Final = {"swiglu_oai": (1.702, 7.0, 1.0), "swiglu(alpha=1.5,limit=2,shift=0.5)": (1.5, 2.0, 0.5)}


@dataclass(frozen=True)
class Layer:
    """The tensors of a layer, as `ExpertWeights` takes them.

    `scales` and `biases` are of gate_up and of down; scales are per block of 128×128, or per row.
    """

    gate_up: Tensor
    down: Tensor
    scales: tuple[Tensor, Tensor] | None = None
    biases: tuple[Tensor, Tensor] | None = None
    activation: str = "silu"
    interleaved: bool = False


@dataclass(frozen=True)
class Truth:
    """The right answer and how far from it a result may be.

    Attributes:
        out: ``[M, K]`` in fp64.
        magnitude: A bound of every element's magnitude without cancellation, ``[M, K]``.
        overflowing: Tokens with an activated intermediate beyond the range of hidden_states' dtype, ``[M]``.
    """

    out: Tensor
    magnitude: Tensor
    overflowing: Tensor


def truth(hidden_states: Tensor, layer: Layer, topk_weights: Tensor, topk_ids: Tensor) -> Truth:
    """The right answer of a call. Tensors of any dtype; ids may be anything."""
    E = layer.gate_up.shape[0]
    mine = (topk_ids >= 0) & (topk_ids < E)
    e = torch.where(mine, topk_ids, 0).long()  # [M, topk]
    weights = torch.where(mine, topk_weights.double(), 0.0)
    gate_up, down = _weights(layer)
    x = hidden_states.double()
    first = torch.einsum("mk,mjrk->mjr", x, gate_up[e])
    first_size = torch.einsum("mk,mjrk->mjr", x.abs(), gate_up[e].abs())
    if layer.biases is not None:
        first, first_size = first + layer.biases[0].double()[e], first_size + layer.biases[0].double().abs()[e]
    inner, inner_size = _activate(first, first_size, layer)
    beyond = inner.abs() + TOLERANCE["fp16"] * inner_size > torch.finfo(hidden_states.dtype).max  # [M, topk, N]
    second = torch.einsum("mjn,mjkn->mjk", inner, down[e])
    second_size = torch.einsum("mjn,mjkn->mjk", inner_size, down[e].abs())
    if layer.biases is not None:
        second, second_size = second + layer.biases[1].double()[e], second_size + layer.biases[1].double().abs()[e]
    weighted = torch.where(mine[..., None], weights[..., None] * second, 0.0)
    sizes = torch.where(mine[..., None], weights[..., None].abs() * second_size, 0.0)
    return Truth(weighted.sum(1), sizes.sum(1), (beyond & mine[..., None]).flatten(1).any(1))


def assert_right(out: Tensor, right: Truth, dtype: str) -> None:
    """A result is the right one, up to the rounding of its dtype and of the weights' (`dtype`).

    A token that holds NaN or Inf must not come out finite, and no other token may be touched by it.
    """
    assert out.shape == right.out.shape
    largest = torch.finfo(out.dtype).max
    got = out.detach().double()
    tolerance = TOLERANCE[dtype] + (TOLERANCE["fp16"] if out.dtype == torch.float16 else 0.0)
    tolerance += TOLERANCE["bf16"] if out.dtype == torch.bfloat16 else 0.0
    finite = right.magnitude.amax(1, keepdim=True).isfinite() if right.magnitude.numel() else right.magnitude > 0
    finite = finite.expand_as(right.out)
    allowed = tolerance * right.magnitude + _smallest(out.dtype)
    near = (got - right.out).abs() <= allowed
    overflows = (right.out.abs() + allowed > largest) & (got.abs() >= largest)
    overflows |= right.overflowing[:, None] & ~got.isfinite()
    wrong = finite & ~near & ~overflows
    assert not wrong.any(), f"wrong by {(got - right.out).abs()[wrong].max():.3g} of {right.magnitude[wrong].max():.3g}"
    lost = right.out.isnan().any(1) & got.isfinite().all(1)
    assert not lost.any(), f"tokens {lost.nonzero().flatten().tolist()} hold NaN and came out finite"


def _smallest(dtype: torch.dtype) -> float:
    """What rounding of subnormal numbers may lose."""
    return 1e-4 if dtype == torch.float16 else 1e-30


def _weights(layer: Layer) -> tuple[Tensor, Tensor]:
    if layer.scales is None:
        return layer.gate_up.double(), layer.down.double()
    gate_up, down = (_dequantized(*pair) for pair in zip((layer.gate_up, layer.down), layer.scales, strict=True))
    return gate_up, down


def _dequantized(codes: Tensor, scale: Tensor) -> Tensor:
    if scale.dim() == 2:
        return codes.double() * scale.double()[:, :, None]
    rows, columns = (torch.arange(size) // _BLOCK for size in codes.shape[1:])
    return codes.double() * scale.double()[:, rows][:, :, columns]


def _activate(first: Tensor, size: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """The activation, and a bound of its magnitude that grows with that of its inputs."""
    if layer.activation == "relu2":
        return first.clamp(min=0) ** 2, size**2
    if layer.interleaved:
        (gate, up), (gate_size, up_size) = ((each[..., ::2], each[..., 1::2]) for each in (first, size))
    else:
        (gate, up), (gate_size, up_size) = (each.tensor_split(2, dim=-1) for each in (first, size))
    if layer.activation.startswith("swiglu"):
        alpha, limit, shift = SWIGLU[layer.activation]
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + shift) * gate / (1 + torch.exp(-alpha * gate)), (up_size + shift) * gate_size
    if layer.activation == "silu":
        acted = gate / (1 + torch.exp(-gate))
    elif layer.activation == "gelu":
        acted = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    else:
        acted = gate * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    return acted * up, gate_size * up_size
