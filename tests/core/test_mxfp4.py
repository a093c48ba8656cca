"""MXFP4 weights: how they are quantised, given, refused, read from checkpoints, and computed."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import ExpertWeights, InvalidInputError, moe_forward
from moe_dispatch.modules.layer import MoELayer
from moe_dispatch.mxfp4 import MAGNITUDES, dequantize_mxfp4, quantize_mxfp4
from moe_dispatch.problem import stored_bytes
from moe_dispatch.testing import Case, Precision, make_inputs, relative_error
from tests.core.test_checkpoints import save
from tests.integrations.transformers_models import gpt_oss

E, K, N = 3, 64, 96
PREFIX = "model.layers.1.mlp.experts."


def layer(interleaved: bool = False) -> ExpertWeights:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(*shape, generator=generator) for shape in ((E, 2 * N, K), (E, K, N), (E, 2 * N), (E, K))]
    return ExpertWeights.quantize(
        draw[0], draw[1], gate_up_bias=draw[2], down_bias=draw[3], form="mxfp4", activation="swiglu_oai",
        interleaved=interleaved,
    )  # fmt: skip


def test_every_code_comes_back_and_the_even_column_has_the_low_half() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    scale = torch.arange(120, 136, dtype=torch.uint8).view(1, 16, 1)
    values = dequantize_mxfp4(codes, scale)
    of_byte = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)])
    for row, s in enumerate(range(120, 136)):
        assert torch.equal(values[0, row, ::2], of_byte * 2.0 ** (s - 127))
        assert values[0, row, 1::2].eq(of_byte[row] * 2.0 ** (s - 127)).all()
    again, scales = quantize_mxfp4(values)
    assert torch.equal(dequantize_mxfp4(again, scales), values)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_codes_are_the_nearest_with_ties_to_even(sign: float) -> None:
    values = torch.zeros(1, 1, 32)
    given = torch.tensor([0.25, 0.26, 0.74, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.01, 6.0, 7.99])
    expected = torch.tensor([0.0, 0.5, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, 6.0])
    values[0, 0, : len(given)] = sign * given
    codes, scale = quantize_mxfp4(values)
    assert scale.item() == 127
    assert torch.equal(dequantize_mxfp4(codes, scale)[0, 0, : len(given)], sign * expected)


def test_blocks_have_their_own_scale_and_spoil_no_other() -> None:
    weight = torch.ones(1, 2, 128) * torch.tensor([2.0**-140, 2.0**100, 1.0, 0.0]).repeat_interleave(32)
    weight[0, 1, 70] = torch.nan
    codes, scale = quantize_mxfp4(weight)
    assert scale.tolist() == [[[0, 225, 125, 0], [0, 225, 255, 0]]]
    back = dequantize_mxfp4(codes, scale)
    assert back[0, 1, 64:96].isnan().all()
    assert torch.equal(back[0, 0, 32:], weight[0, 0, 32:])
    assert back[0, 0, :32].eq(0).all()


@pytest.mark.parametrize("as_e8m0", [False, True])
def test_a_layer_knows_its_form(as_e8m0: bool) -> None:
    made = layer()
    scales: dict[str, Any] = {name: tensor for name, tensor in made.tensors() if name.endswith("scale")}
    if as_e8m0:
        scales = {name: tensor.view(torch.float8_e8m0fnu) for name, tensor in scales.items()}
    experts = ExpertWeights(made.gate_up, made.down, **scales)
    assert (experts.dtype, experts.E, experts.K, experts.N) == ("mxfp4", E, K, N)
    assert experts.quantized
    assert not experts.fp8
    assert experts.to("cpu") is experts
    problem = experts.problem(4, 2, torch.bfloat16, None)
    assert problem.expert_bytes == stored_bytes("mxfp4", 3 * K * N) == 3 * K * N // 2 + 3 * K * N // 32
    assert problem.scale_shapes == ((2 * N, K // 32), (K, N // 32))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"gate_up_scale": None}, r"need gate_up_scale \[3, 192, 2\], the exponents of their scales"),
        ({"down_scale": torch.ones(E, K, 3)}, r"down_scale of MXFP4 weights must be a uint8 .* got torch.float32"),
        ({"down_scale": torch.zeros(E, K, 1, dtype=torch.uint8)}, r"uint8\) .*\[3, 64, 3\]|\[3, 64, 3\].* got"),
        (
            {"down": torch.zeros(E, K, 40, dtype=torch.uint8)},
            r"down has 80 columns, and MXFP4 has one scale for every 32",
        ),
        ({"down": torch.zeros(E, K, N, dtype=torch.uint8)}, r"with K/2 and N/2 bytes in a row"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_is_no_such_layer_is_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        ExpertWeights(**{**dict(layer().tensors()), **changed})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ExpertWeights.quantize(torch.ones(1, 2, 48), torch.ones(1, 48, 1), form="mxfp4"), "gate_up has 48"),
        (lambda: ExpertWeights.quantize(layer().gate_up, layer().down, form="mxfp4"), "uint8 already"),
        (lambda: ExpertWeights.quantize(torch.ones(1, 64, 32), torch.ones(1, 32, 32), form="int4"), "'mxfp4'"),  # type: ignore[arg-type]
    ],
    ids=["columns", "quantised already", "form"],
)
def test_what_cannot_be_quantised_is_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        make()


@pytest.mark.parametrize("backend", ["reference", "torch_grouped", None])
def test_the_layer_is_that_of_its_dequantised_weights(backend: str | None) -> None:
    inputs = make_inputs(Case(K=K, N=N, topk=3, bias=True), Precision("mxfp4", "bf16"), "cpu")
    out = moe_forward(*inputs.arguments, backend=backend)
    assert relative_error(out, inputs.truth) < 1e-2


def test_tokens_and_router_get_their_gradients() -> None:
    hidden, experts, weights, ids = make_inputs(Case(K=K, N=N), Precision("mxfp4", "fp32"), "cpu").arguments
    dense = ExpertWeights(
        *(dequantize_mxfp4(getattr(experts, n), getattr(experts, f"{n}_scale")) for n in ("gate_up", "down"))
    )
    gradients = []
    for each in (experts, dense):
        arguments = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        moe_forward(arguments[0], each, arguments[1], ids).square().sum().backward()  # type: ignore[no-untyped-call] # torch's
        gradients.append([tensor.grad for tensor in arguments])
    for quantized, plain in zip(*gradients, strict=True):
        assert torch.allclose(quantized, plain, rtol=1e-3, atol=1e-4)


def published(experts: ExpertWeights) -> dict[str, Tensor]:
    """The layer's tensors as gpt-oss is published."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in experts.tensors():
        projection = f"{PREFIX}{name.removesuffix('_scale').removesuffix('_bias')}_proj"
        if name.endswith("scale"):
            tensors[f"{projection}_scales"] = tensor
        elif name.endswith("bias"):
            tensors[f"{projection}_bias"] = tensor.bfloat16()
        else:
            tensors[f"{projection}_blocks"] = tensor.view(*tensor.shape[:2], -1, 16)
    return tensors


def config() -> dict[str, Any]:
    described = gpt_oss()
    sizes = {"hidden_size": K, "intermediate_size": N, "num_local_experts": E}
    return {**described.to_dict(), **sizes, "quantization_config": {"quant_method": "mxfp4"}}


def test_reads_gpt_oss_as_it_is_published(tmp_path: Path) -> None:
    experts = layer(interleaved=True)
    folder = save(tmp_path, published(experts), config())
    read = ExpertWeights.from_safetensors(folder, 1)
    assert (read.dtype, read.activation, read.interleaved) == ("mxfp4", "swiglu_oai", True)
    for (name, tensor), (_, saved) in zip(read.tensors(), experts.tensors(), strict=True):
        assert torch.equal(tensor, saved.bfloat16() if name.endswith("bias") else saved), name
    hidden, weights, ids = (
        torch.randn(4, K).bfloat16(),
        torch.rand(4, 2),
        torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2]]),
    )
    whole = moe_forward(hidden, read, weights, ids)
    shares = [moe_forward(hidden, ExpertWeights.from_safetensors(folder, 1, tp=(r, 3)), weights, ids) for r in range(3)]
    assert relative_error(sum(share.float() for share in shares), whole.float()) < 1e-2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "tp", "says"),
    [
        ({f"{PREFIX}down_proj_scales": None}, (0, 1), "lacks down_proj's exponents of MXFP4 experts; there is"),
        (
            {f"{PREFIX}gate_up_proj_blocks": torch.zeros(E, 2 * N, 1, 16, dtype=torch.uint8)},
            (0, 1),
            r"must be \[3, 192, 2, 16\]",
        ),
        ({f"{PREFIX}down_proj": torch.zeros(E, N, K)}, (0, 1), r"down_proj must be .* beside MXFP4"),
        ({}, (0, 2), r"N=96 cannot be divided among 2 processes: it must be a multiple of 2 × 32"),
    ],
    ids=["missing", "shape", "another form", "share"],
)
def test_refuses_by_name_what_is_not_so(
    change: dict[str, Tensor | None], tp: tuple[int, int], says: str, tmp_path: Path
) -> None:
    tensors = {name: tensor for name, tensor in (published(layer()) | change).items() if tensor is not None}
    with pytest.raises(InvalidInputError, match=says):
        ExpertWeights.from_safetensors(save(tmp_path, tensors), 1, activation="swiglu_oai", tp=tp)


def test_a_layer_takes_them_by_assignment_and_says_so() -> None:
    experts = layer(interleaved=True)
    plain = MoELayer(K, N, E, 2, activation="swiglu_oai", interleaved=True, bias=True, dtype=torch.bfloat16)
    state = {f"experts.{name.removeprefix(PREFIX)}": tensor for name, tensor in published(experts).items()}
    with pytest.raises(InvalidInputError, match=r"is MXFP4, and a layer takes that by layer\.experts\.assign"):
        plain.load_state_dict(state, strict=False)
    plain.experts.assign(experts)
    plain.requires_grad_(requires_grad=False)
    assert "N=96" in repr(plain)
    hidden = torch.randn(5, K).bfloat16()
    out = copy.deepcopy(plain).to(torch.float32)(hidden.float())
    assert relative_error(plain(hidden), out) < 2e-2
