"""FP8 checkpoints with a scale per row or per tensor are read, in shares too; other ones are refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import ExpertWeights, InvalidInputError
from moe_dispatch.numerics import dequantize, quantize_channels
from tests.core.test_checkpoints import PREFIX, Tensors, load, random, save, separate

pytest.importorskip("safetensors.torch")
E, N, K = 2, 20, 12


def single(form: str, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensors, Tensors]:
    """Experts one by one with their scales, and the weights that they stand for."""
    tensors: Tensors = {}
    exact: Tensors = {}
    for name, weight in separate(E, N, K).items():
        codes, scale = quantize_channels(weight[None])
        scale = scale[0].to(scale_dtype)[:, None] if form == "channel" else scale[0].max().to(scale_dtype)
        if form == "tensor [1]":
            scale = scale[None]
        tensors |= {name: codes[0], f"{name}_scale": scale}
        exact[name] = codes[0].float() * scale.float()
    return tensors, exact


def of_projections(exact: Tensors, *names: str) -> Tensor:
    return torch.stack([torch.cat([exact[f"{PREFIX}{e}.{name}.weight"] for name in names]) for e in range(E)])


def weights_of(experts: ExpertWeights) -> tuple[Tensor, Tensor]:
    assert experts.gate_up_scale is not None
    assert experts.down_scale is not None
    return dequantize(experts.gate_up, experts.gate_up_scale), dequantize(experts.down, experts.down_scale)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("form", ["channel", "tensor", "tensor [1]"])
def test_scales_of_rows_and_of_tensors_are_read(form: str, scale_dtype: torch.dtype, tmp_path: Path) -> None:
    tensors, exact = single(form, scale_dtype)
    read = load(save(tmp_path, tensors))
    assert read.dtype == "fp8_channel"
    gate_up, down = weights_of(read)
    assert torch.equal(gate_up, of_projections(exact, "gate_proj", "up_proj"))
    assert torch.equal(down, of_projections(exact, "down_proj"))
    stacked = ExpertWeights.from_experts([
        {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
        for prefix in (f"{PREFIX}{e}." for e in range(E))
    ])  # fmt: skip
    for (name, tensor), (_, other) in zip(stacked.tensors(), read.tensors(), strict=True):
        assert torch.equal(tensor.float(), other.float()), name


@pytest.mark.parametrize("form", ["channel", "tensor"])
def test_shares_of_all_processes_are_the_whole(form: str, tmp_path: Path) -> None:
    tensors, exact = single(form)
    folder = save(tmp_path, tensors)
    parts = [weights_of(load(folder, tp=(rank, 2))) for rank in (0, 1)]
    half = N // 2
    gates, ups = ([gate_up[:, rows] for gate_up, _ in parts] for rows in (slice(0, half), slice(half, None)))
    assert torch.equal(torch.cat([*gates, *ups], 1), of_projections(exact, "gate_proj", "up_proj"))
    assert torch.equal(torch.cat([down for _, down in parts], 2), of_projections(exact, "down_proj"))


@pytest.mark.parametrize("tp", [(0, 1), (1, 2)])
@pytest.mark.parametrize("shape", ["[E, rows, 1]", "[E, rows]", "[E, 1, rows]", "[E]"])
def test_fused_experts_with_scales_of_rows(shape: str, tp: tuple[int, int], tmp_path: Path) -> None:
    gate_up, down = random(E, 2 * N, K), random(E, K, N)
    (gate_up_codes, gate_up_scale), (down_codes, down_scale) = quantize_channels(gate_up), quantize_channels(down)
    transposed = shape == "[E, 1, rows]"

    def stored(scale: Tensor) -> Tensor:
        if shape == "[E]":
            return scale.amax(1)
        return {"[E, rows]": scale, "[E, rows, 1]": scale[:, :, None], "[E, 1, rows]": scale[:, None]}[shape]

    tensors = {
        "gate_up_proj": gate_up_codes.mT if transposed else gate_up_codes,
        "down_proj": down_codes.mT if transposed else down_codes,
        "gate_up_proj_scale": stored(gate_up_scale), "down_proj.weight_scale": stored(down_scale),
    }  # fmt: skip
    folder = save(tmp_path, {PREFIX + name: tensor for name, tensor in tensors.items()})
    read = load(folder, tp=tp)
    if shape == "[E]":
        gate_up_scale, down_scale = (stored(scale)[:, None].expand_as(scale) for scale in (gate_up_scale, down_scale))
    whole_gate_up, whole_down = dequantize(gate_up_codes, gate_up_scale), dequantize(down_codes, down_scale)
    half = N // 2 if tp[1] == 2 else 0
    rows = torch.cat([torch.arange(half, N), torch.arange(N + half, 2 * N)])
    gate_up_read, down_read = weights_of(read)
    assert torch.equal(gate_up_read, whole_gate_up[:, rows])
    assert torch.equal(down_read, whole_down[:, :, half:])


def test_a_scale_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    tensors, _ = single("channel")
    tensors[f"{PREFIX}1.up_proj.weight_scale"] = torch.ones(N // 2, 1)
    message = rf"1\.up_proj\.weight_scale must be \[{N}, 1\], .* got \[{N // 2}, 1\]"
    with pytest.raises(InvalidInputError, match=message):
        load(save(tmp_path, tensors))
    tensors[f"{PREFIX}1.up_proj.weight_scale"] = torch.ones(N, 1, dtype=torch.uint8)
    with pytest.raises(InvalidInputError, match=r"1\.up_proj\.weight_scale must hold multipliers"):
        load(save(tmp_path, tensors))


def test_fused_experts_without_a_scale_are_refused_by_name(tmp_path: Path) -> None:
    (gate_up, _), (down, down_scale) = quantize_channels(random(E, 2 * N, K)), quantize_channels(random(E, K, N))
    tensors = {
        "gate_up_proj": gate_up, "down_proj": down,
        "gate_up_proj_scale": torch.ones(0, 1), "down_proj_scale": down_scale,
    }  # fmt: skip
    with pytest.raises(InvalidInputError, match=r"gate_up_scale .* got \[0, 1\]"):
        load(save(tmp_path, {PREFIX + name: tensor for name, tensor in tensors.items()}))


def test_a_config_with_static_scales_of_activations_is_refused(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "model_type": "qwen3_moe", "hidden_size": K, "moe_intermediate_size": N, "num_experts": E,
        "num_experts_per_tok": 1, "hidden_act": "silu",
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"input_activations": {"dynamic": True, "strategy": "token"}}},
        },
    }  # fmt: skip
    tensors, _ = single("channel")
    assert ExpertWeights.from_safetensors(save(tmp_path / "dynamic", tensors, config), 1).dtype == "fp8_channel"
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["dynamic"] = False
    with pytest.raises(InvalidInputError, match="input_activations with dynamic=False"):
        ExpertWeights.from_safetensors(save(tmp_path / "static", tensors, config), 1)
