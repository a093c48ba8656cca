"""FP8 weights with a multiplier per row: how they are given, quantised, and computed by the reference."""

import copy

import pytest
import torch

from moe_dispatch import ExpertWeights, moe_forward
from moe_dispatch.dispatch.torch_operator import call_tensors
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.modules.stacked_experts import StackedExperts
from moe_dispatch.numerics import FP8, dequantize, quantize_channels
from moe_dispatch.testing import Case, Precision, make_inputs, relative_error

E, K, N = 3, 48, 20
CHANNEL = Precision("fp8_channel", "fp32")


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(E, 2 * N, K).to(FP8), torch.randn(E, K, N).to(FP8)


def test_each_row_keeps_its_own_scale() -> None:
    weight = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1)) * torch.tensor([1e-3, 1.0, 1e3])[:, None]
    weight[1, 1] = 0.0
    codes, scale = quantize_channels(weight)
    assert scale.shape == (2, 3)
    assert torch.allclose(scale, weight.abs().amax(dim=2).clamp(min=1e-10) / 448, rtol=1e-6, atol=0.0)
    error = (dequantize(codes, scale) - weight).abs()
    assert (error <= weight.abs() / 16 + scale[:, :, None] * 2**-10).all()
    assert dequantize(codes, scale)[1, 1].abs().max() == 0


def test_elements_that_are_not_finite_spoil_no_other() -> None:
    weight = torch.ones(1, 2, 8)
    weight[0, 0, 3], weight[0, 0, 4] = torch.nan, torch.inf
    back = dequantize(*quantize_channels(weight))
    assert back[0, 0, 3:5].isnan().all()
    assert back.nan_to_num(1.0).allclose(torch.ones(1, 2, 8))


@pytest.mark.parametrize(
    ("gate_up_shape", "down_shape", "interleaved", "rows"),
    [
        ((E, 2 * N), (E, K), False, None),
        ((E, 2 * N, 1), (E, K, 1), False, None),
        ((E,), (E,), False, lambda scale, e, row: scale[e]),
        ((E, 1), (E, 1), False, lambda scale, e, row: scale[e, 0]),
        ((E, 2), (E,), False, lambda scale, e, row: scale[e, row // N]),
        ((E, 2), (E,), True, lambda scale, e, row: scale[e, row % 2]),
    ],
)
def test_scales_of_tensors_and_of_rows_become_those_of_rows(
    gate_up_shape: tuple[int, ...], down_shape: tuple[int, ...], interleaved: bool, rows: "object"
) -> None:
    gate_up_scale, down_scale = torch.rand(gate_up_shape) + 0.5, torch.rand(down_shape) + 0.5
    experts = ExpertWeights(*weights(), gate_up_scale=gate_up_scale, down_scale=down_scale, interleaved=interleaved)
    assert experts.dtype == "fp8_channel"
    assert experts.gate_up_scale is not None
    assert experts.gate_up_scale.shape == (E, 2 * N)
    assert experts.down_scale is not None
    assert experts.down_scale.shape == (E, K)
    if callable(rows):
        expected = torch.tensor([[rows(gate_up_scale, e, row) for row in range(2 * N)] for e in range(E)])
        assert torch.equal(experts.gate_up_scale, expected)
        assert torch.equal(experts.down_scale, down_scale.view(E, 1).expand(E, K))
    else:
        assert experts.gate_up_scale.data_ptr() == gate_up_scale.data_ptr()
    experts.check_unchanged()
    assert experts.to("cpu") is experts


@pytest.mark.parametrize(
    ("gate_up_shape", "down_shape", "words"),
    [
        ((E, N), (E, K), ("gate_up_scale", f"[{E}, {2 * N}]", "128×128", f"got [{E}, {N}]")),
        ((E, 2 * N), (E, N), ("down_scale", f"[{E}, {K}]", f"got [{E}, {N}]")),
        ((E, 2 * N), (E, 1, 1), ("down_scale", "one form")),
        ((E, 1, 1), (E, K), ("down_scale", "128×128", "one form")),
    ],
)
def test_other_shapes_are_refused_with_those_that_there_are(
    gate_up_shape: tuple[int, ...], down_shape: tuple[int, ...], words: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidInputError) as refusal:
        ExpertWeights(*weights(), gate_up_scale=torch.ones(gate_up_shape), down_scale=torch.ones(down_shape))
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_scales_without_a_shape_are_refused_by_name() -> None:
    for scale in (torch.nn.UninitializedBuffer(), torch.nn.UninitializedParameter()):
        with pytest.raises(InvalidInputError, match="gate_up_scale"):
            ExpertWeights(*weights(), gate_up_scale=scale, down_scale=torch.ones(E, K))


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="'block', 'channel', 'mxfp4', got 'tensor'"):
        ExpertWeights.quantize(torch.ones(1, 2, 2), torch.ones(1, 2, 1), form="tensor")  # type: ignore[arg-type] # wrong


def test_the_forms_are_kinds_of_layers_of_their_own() -> None:
    gate_up, down = torch.randn(E, 2 * N, K), torch.randn(E, K, N)
    block, channel = (ExpertWeights.quantize(gate_up, down, form=form) for form in ("block", "channel"))
    assert block.spec is not channel.spec
    assert "fp8_channel" in repr(channel)


def test_the_reference_multiplies_what_was_stored() -> None:
    """In fp32 from codes and scales, written out: rows of weights, tokens of both products."""
    inputs = make_inputs(Case(M=4, E=2, K=K, N=N), CHANNEL, "cpu")
    hidden, experts, topk_weights, ids = inputs.arguments
    expected = torch.zeros_like(hidden)

    def rounded(row: torch.Tensor) -> torch.Tensor:
        scale = row.abs().max() / torch.tensor(448.0)
        return (row / scale).to(FP8).float() * scale

    stored = dict(experts.tensors())
    gate_ups, downs = (stored[name].float() * stored[f"{name}_scale"][:, :, None] for name in ("gate_up", "down"))
    for token in range(4):
        for choice in range(2):
            e = int(ids[token, choice])
            gate, up = (gate_ups[e] @ rounded(hidden[token])).chunk(2)
            inner = rounded(torch.nn.functional.silu(gate) * up)
            expected[token] += topk_weights[token, choice] * (downs[e] @ inner)
    assert relative_error(inputs.truth, expected) < 1e-3
    assert relative_error(moe_forward(*inputs.arguments, backend="reference"), expected) < 1e-3


def test_a_module_keeps_the_form() -> None:
    inputs = make_inputs(Case(M=3, E=2, K=K, N=N), CHANNEL, "cpu")
    hidden, experts, topk_weights, ids = inputs.arguments
    module = StackedExperts(K, N, 2, dtype=FP8)
    module.assign(experts)
    for each in (module, copy.deepcopy(module).to(torch.bfloat16)):
        assert each.weights().dtype == "fp8_channel"
        assert relative_error(each(hidden, topk_weights, ids), inputs.truth) < 1e-3


@pytest.mark.parametrize("scales", ["rows", "experts"])
def test_compiled_calls_take_the_form(scales: str) -> None:
    """Through the operator, which receives the tensors one by one and wraps them again."""
    gate_up, down = weights()
    shapes = ((E, 2 * N), (E, K)) if scales == "rows" else ((E,), (E,))
    gate_up_scale, down_scale = (torch.rand(shape) + 0.5 for shape in shapes)
    experts = ExpertWeights(gate_up, down, gate_up_scale=gate_up_scale, down_scale=down_scale)
    hidden, topk_weights, ids = torch.randn(2, K), torch.rand(2, 2), torch.tensor([[0, 2], [1, 1]])
    expected = moe_forward(hidden, experts, topk_weights, ids)
    direct = call_tensors(
        hidden, topk_weights, ids, gate_up, down, gate_up_scale=gate_up_scale, down_scale=down_scale,
        activation="silu", interleaved=False, backend=None,
    )  # fmt: skip
    assert torch.equal(direct, expected)
