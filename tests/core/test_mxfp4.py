"""MXFP4 weights: how they are quantised, given, refused, read from checkpoints, and computed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import ExpertWeights, InvalidInputError, moe_forward
from moe_dispatch.backends.stages.dequantize import dequantize_mxfp4_into, dequantize_mxfp4_into_torch
from moe_dispatch.backends.triton_common.features import interpreting
from moe_dispatch.modules.layer import MoELayer
from moe_dispatch.mxfp4 import MAGNITUDES, dequantize_mxfp4, quantize_mxfp4
from moe_dispatch.testing import relative_error
from tests.core.test_checkpoints import PREFIX, load, save
from tests.integrations.transformers_models import gpt_oss

E, K, N = 3, 64, 96


def layer() -> ExpertWeights:
    draw = [torch.randn(shape) for shape in ((E, 2 * N, K), (E, K, N), (E, 2 * N), (E, K))]
    biases = {"gate_up_bias": draw[2].bfloat16(), "down_bias": draw[3].bfloat16()}
    return ExpertWeights.quantize(*draw[:2], **biases, form="mxfp4", activation="swiglu_oai", interleaved=True)


def test_every_code_comes_back_and_the_even_column_has_the_low_half() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    scale = torch.arange(120, 136, dtype=torch.uint8).view(1, 16, 1)
    values = dequantize_mxfp4(codes, scale)
    multipliers = 2.0 ** torch.arange(-7, 9)[:, None]
    of_half = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)])
    assert torch.equal(values[0, :, ::2], of_half * multipliers)
    assert torch.equal(values[0, :, 1::2], (of_half[:, None] * multipliers).expand(16, 16))
    assert torch.equal(dequantize_mxfp4(*quantize_mxfp4(values)), values)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_codes_are_the_nearest_with_ties_to_even(sign: float) -> None:
    values = torch.tensor([0.25, 0.26, 0.74, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.01, 6.0, 7.99] + [0.0] * 20)
    nearest = torch.tensor([0.0, 0.5, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, 6.0] + [0.0] * 20)
    codes, scale = quantize_mxfp4(sign * values[None, None])
    assert scale.item() == 127
    assert torch.equal(dequantize_mxfp4(codes, scale)[0, 0], sign * nearest)


def test_blocks_have_their_own_scale_and_spoil_no_other() -> None:
    weight = torch.ones(1, 2, 128) * torch.tensor([2.0**-140, 2.0**100, 1.0, 0.0]).repeat_interleave(32)
    weight[0, 1, 70] = torch.nan
    codes, scale = quantize_mxfp4(weight)
    assert scale.tolist() == [[[0, 225, 125, 0], [0, 225, 255, 0]]]
    back = dequantize_mxfp4(codes, scale)
    assert back[0, 1, 64:96].isnan().all()
    assert torch.equal(back[0, 0, 32:], weight[0, 0, 32:])


def test_a_layer_knows_its_form() -> None:
    made = dict(layer().tensors())
    e8m0: dict[str, Any] = {name: made[name].view(torch.float8_e8m0fnu) for name in ("gate_up_scale", "down_scale")}
    experts = ExpertWeights(**(made | e8m0))
    assert (experts.dtype, experts.E, experts.K, experts.N) == ("mxfp4", E, K, N)
    problem = experts.problem(4, 2, torch.bfloat16, None)
    assert problem.expert_bytes == 3 * K * N // 2 + 3 * K * N // 32
    assert problem.scale_shapes == ((2 * N, K // 32), (K, N // 32))


@pytest.mark.skipif(not interpreting(), reason="on a GPU, gluon_hopper runs it")
def test_the_kernel_writes_what_torch_does() -> None:
    experts = layer()
    written, expected = torch.empty(2, E, K, N, dtype=torch.float16)
    dequantize_mxfp4_into(experts.down, dict(experts.tensors())["down_scale"], written)
    dequantize_mxfp4_into_torch(experts.down, dict(experts.tensors())["down_scale"], expected)
    assert torch.equal(written, expected)


def given(**changed: Tensor | None) -> ExpertWeights:
    return ExpertWeights(**{**dict(layer().tensors()), **changed})  # type: ignore[arg-type] # some are wrong


def bytes_of(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: given(gate_up_scale=None), r"MXFP4, and need gate_up_scale \[3, 192, 2\] in uint8"),
        (lambda: given(down_scale=torch.ones(E, K, 3)), "down_scale of MXFP4 must be a uint8 .* got torch.float32"),
        (lambda: given(down_scale=bytes_of(E, K, 1)), r"must be \[3, 64, 3\], one multiplier per 32 col.* got"),
        (lambda: given(down=bytes_of(E, K, 40)), "down has 80 columns, and MXFP4 has one scale for every 32"),
        (lambda: given(down=bytes_of(E, K, N)), "with K/2 and N/2 bytes in a row"),
        (lambda: ExpertWeights.quantize(torch.ones(1, 2, 48), torch.ones(1, 48, 1), form="mxfp4"), "gate_up has 48"),
        (lambda: ExpertWeights.quantize(layer().gate_up, layer().down, form="mxfp4"), "uint8 already"),
    ],
)  # fmt: skip
def test_what_is_no_such_layer_is_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        make()


def published(experts: ExpertWeights) -> dict[str, Tensor]:
    """The layer's tensors as gpt-oss is published."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in experts.tensors():
        target, _, kind = name.replace("gate_up", "gateup").partition("_")
        projection = f"{PREFIX}{target.replace('gateup', 'gate_up')}_proj"
        suffix = {"": "_blocks", "scale": "_scales", "bias": "_bias"}[kind]
        tensors[projection + suffix] = tensor if kind else tensor.view(*tensor.shape[:2], -1, 16)
    return tensors


def test_reads_gpt_oss_as_it_is_published(tmp_path: Path) -> None:
    experts = layer()
    sizes = {"hidden_size": K, "intermediate_size": N, "num_local_experts": E}
    config = {**gpt_oss().to_dict(), **sizes, "quantization_config": {"quant_method": "mxfp4"}}
    folder = save(tmp_path, published(experts), config)
    read = ExpertWeights.from_safetensors(folder, 1)
    assert (read.dtype, read.activation, read.interleaved) == ("mxfp4", "swiglu_oai", True)
    for (name, tensor), (_, saved) in zip(read.tensors(), experts.tensors(), strict=True):
        assert torch.equal(tensor, saved), name
    hidden, weights, ids = torch.randn(4, K).bfloat16(), torch.rand(4, 2), torch.tensor([[0, 1], [2, 0]] * 2)
    whole = moe_forward(hidden, read, weights, ids)
    shares = [moe_forward(hidden, ExpertWeights.from_safetensors(folder, 1, tp=(r, 3)), weights, ids) for r in range(3)]
    assert relative_error(torch.stack(shares).float().sum(0), whole.float()) < 1e-2


@pytest.mark.parametrize(
    ("change", "tp", "says"),
    [
        ({"down_proj_scales": None}, (0, 1), "lacks down_proj's exponents of MXFP4 experts; there is"),
        ({"down_proj_scales": bytes_of(E, K)}, (0, 1), r"down_proj_scales must be \[E, K, N/32\], got \[3, 64\]"),
        ({"gate_up_proj_blocks": bytes_of(E, 2 * N, 1, 16)}, (0, 1), r"must be \[3, 192, 2, 16\]"),
        ({"down_proj": torch.zeros(E, N, K)}, (0, 1), r"down_proj must be .* beside MXFP4"),
        ({}, (0, 2), r"N=96 cannot be divided among 2 processes: it must be a multiple of 2 × 32"),
    ],
    ids=["missing", "dimensions", "shape", "another form", "share"],
)
def test_refuses_by_name_what_is_not_so(
    change: dict[str, Tensor | None], tp: tuple[int, int], says: str, tmp_path: Path
) -> None:
    tensors = published(layer()) | {PREFIX + name: tensor for name, tensor in change.items()}
    folder = save(tmp_path, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(InvalidInputError, match=says):
        load(folder, activation="swiglu_oai", tp=tp)


def test_a_layer_takes_them_by_assignment_and_says_so() -> None:
    experts = layer()
    plain = MoELayer(K, N, E, 2, activation="swiglu_oai", interleaved=True, bias=True, dtype=torch.bfloat16)
    state = {f"experts.{name.removeprefix(PREFIX)}": tensor for name, tensor in published(experts).items()}
    with pytest.raises(InvalidInputError, match=r"is MXFP4, and a layer takes that by layer\.experts\.assign"):
        plain.load_state_dict(state, strict=False)
    plain.experts.assign(experts)
    assert "N=96" in repr(plain)
    hidden = torch.randn(5, K).bfloat16()
    weights, ids, _ = plain.gate(hidden)
    assert torch.equal(plain(hidden), moe_forward(hidden, experts, weights, ids))
