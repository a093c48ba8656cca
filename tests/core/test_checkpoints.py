"""Experts of checkpoints: what transformers saves is read, other layouts too, and what is wrong is refused by name."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_dispatch import ExpertWeights, InvalidInputError, MoELayer, moe_forward
from moe_dispatch.checkpoint_files import Checkpoint
from moe_dispatch.numerics import FP8, dequantize_blocks, quantize_blocks
from tests.integrations.transformers_models import deepseek_v3, gpt_oss, mixtral, qwen3, transformers

safetensors_torch = pytest.importorskip("safetensors.torch")
PREFIX = "model.layers.1.mlp.experts."
Tensors = dict[str, Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def save(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Path:
    """A checkpoint of one file, with the config where there is one."""
    folder.mkdir(exist_ok=True)
    safetensors_torch.save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "a.safetensors"
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(path: Path, **options: Any) -> ExpertWeights:
    """The experts of layer 1, with SiLU unless another activation is named."""
    return ExpertWeights.from_safetensors(path, **{"layer": 1, "activation": "silu", **options})


def separate(
    E: int = 3, N: int = 4, K: int = 6, names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
) -> Tensors:
    """Separate experts of a layer 1."""
    shapes = [(N, K)] * (len(names) - 1) + [(K, N)]
    return {
        f"{PREFIX}{e}.{name}.weight": random(*shape, seed=10 * e + i)
        for e in range(E)
        for i, (name, shape) in enumerate(zip(names, shapes, strict=True))
    }


def separate_fp8(N: int = 256, scale_dtype: torch.dtype = torch.float32) -> Tensors:
    tensors: Tensors = {}
    for name, weight in separate(2, N, 128).items():
        codes, scale = quantize_blocks(weight[None])
        tensors |= {name: codes[0], f"{name}_scale_inv": scale[0].to(scale_dtype)}
    return tensors


@pytest.mark.parametrize("config", [qwen3, mixtral, deepseek_v3, gpt_oss], ids=lambda config: config.__name__)
def test_reads_what_transformers_saved(config: Callable[[], Any], tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    read = ExpertWeights.from_safetensors(tmp_path, layer=1)
    experts = model.model.layers[1].mlp.experts
    transposed = config is gpt_oss
    for name, tensor in read.tensors():
        saved = getattr(experts, f"{name.removesuffix('_bias')}_proj" + "_bias" * name.endswith("_bias"))
        assert torch.equal(tensor, saved.mT if transposed and tensor.dim() == 3 else saved), name
    assert (read.gate_up_bias is not None) == transposed
    assert (read.activation, read.interleaved) == (("swiglu_oai", True) if transposed else ("silu", False))


def test_reads_block_fp8_that_transformers_saved(tmp_path: Path) -> None:
    described = qwen3(hidden_size=128, moe_intermediate_size=192, num_experts=2)  # gate ends within a block
    model = transformers.AutoModelForCausalLM.from_config(described)
    tensors: Tensors = {}
    for name, tensor in model.state_dict().items():
        if "experts" in name:
            codes, scale = quantize_blocks(tensor)
            tensors |= {name: codes, f"{name}_scale_inv": scale}
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    save(tmp_path, tensors, {**described.to_dict(), "quantization_config": quantization})
    read = ExpertWeights.from_safetensors(tmp_path, layer=0)
    prefix = "model.layers.0.mlp.experts."
    for name, tensor in read.tensors():
        saved = tensors[prefix + name.replace("_scale", "") + "_proj" + "_scale_inv" * name.endswith("_scale")]
        assert torch.equal(tensor.float(), saved.float()), name


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")], ids=str)
def test_separate_experts_are_stacked_gate_first(names: tuple[str, ...], tmp_path: Path) -> None:
    tensors = separate(names=names)
    read = load(save(tmp_path, tensors))
    for e in range(3):
        gate, up, down = (tensors[f"{PREFIX}{e}.{name}.weight"] for name in names)
        assert torch.equal(read.gate_up[e], torch.cat([gate, up]))
        assert torch.equal(read.down[e], down)


def test_separate_gate_and_up_are_not_read_as_alternating_rows(tmp_path: Path) -> None:
    """Rows of gate would be taken for rows of up without a word."""
    path = save(tmp_path, separate())
    with pytest.raises(InvalidInputError, match="tensors of their own, whose rows do not alternate"):
        load(path, interleaved=True)
    state = {name.removeprefix(PREFIX.removesuffix("experts.")): tensor for name, tensor in separate().items()}
    layer = MoELayer(6, 4, 3, 1, interleaved=True)
    with pytest.raises(InvalidInputError, match="tensors of their own, whose rows do not alternate"):
        layer.load_state_dict(state, strict=False)
    apart = MoELayer(6, 4, 3, 1)
    apart.load_state_dict(state, strict=False)
    assert torch.equal(apart.experts.gate_up_proj, load(path, interleaved=False).gate_up)


def test_experts_of_an_ungated_activation(tmp_path: Path) -> None:
    tensors = separate(names=("up_proj", "down_proj"))
    read = load(save(tmp_path, tensors), activation="relu2")
    assert torch.equal(read.gate_up[2], tensors[f"{PREFIX}2.up_proj.weight"])


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_scale_inv_is_the_multiplier(scale_dtype: torch.dtype, tmp_path: Path) -> None:
    read = load(save(tmp_path, separate_fp8(scale_dtype=scale_dtype)))
    assert read.dtype == "fp8"
    assert read.gate_up_scale is not None
    assert read.gate_up_scale.dtype == torch.float32
    back = dequantize_blocks(read.gate_up, read.gate_up_scale)
    plain = separate(2, 256, 128)
    expected = torch.cat([plain[f"{PREFIX}1.{name}.weight"] for name in ("gate_proj", "up_proj")])
    assert (back[1] - expected).norm() / expected.norm() < 0.04


def fused(E: int = 2, N: int = 4, K: int = 6) -> Tensors:
    return {
        f"{PREFIX}gate_up_proj": random(E, 2 * N, K), f"{PREFIX}gate_up_proj_bias": random(E, 2 * N, seed=1),
        f"{PREFIX}down_proj": random(E, K, N, seed=2), f"{PREFIX}down_proj_bias": random(E, K, seed=3),
    }  # fmt: skip


def transposed(tensors: Tensors) -> Tensors:
    return {name: tensor.mT if tensor.dim() == 3 else tensor for name, tensor in tensors.items()}


INTERLEAVED = {"activation": "swiglu_oai", "interleaved": True}
LAYOUTS: dict[str, tuple[Tensors, dict[str, Any]]] = {
    "separate": (separate(2, 4, 6), {}),
    "fused": (fused(), {}),
    "fused, interleaved": (fused(), INTERLEAVED),
    "fused, transposed": (transposed(fused()), {}),
    "fused, transposed, interleaved": (transposed(fused()), INTERLEAVED),
    "block FP8": (separate_fp8(), {}),
}


@pytest.mark.parametrize(("tensors", "options"), LAYOUTS.values(), ids=LAYOUTS)
def test_shares_of_tensor_parallelism_add_up(tensors: Tensors, options: dict[str, Any], tmp_path: Path) -> None:
    path = save(tmp_path, tensors)
    whole = load(path, **options)
    shares = [load(path, tp=(rank, 2), **options) for rank in range(2)]
    assert [share.N for share in shares] == [whole.N // 2] * 2
    hidden, weights, ids = random(5, whole.K), random(5, 2).softmax(1), torch.tensor([[0, 1]] * 5)
    expected = moe_forward(hidden, whole, weights, ids)
    total = sum(moe_forward(hidden, share, weights, ids) for share in shares)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


def test_only_the_share_of_the_layer_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, {**separate(), "model.layers.0.mlp.experts.0.w1.weight": random(4, 6)})
    read: dict[str, tuple[int, ...]] = {}
    original = Checkpoint.read

    def recording(self: Checkpoint, name: str, *index: slice) -> Tensor:
        part = original(self, name, *index)
        read[name] = tuple(part.shape)
        return part

    monkeypatch.setattr(Checkpoint, "read", recording)
    load(path, tp=(1, 2))
    assert set(read) == set(separate())
    assert {shape for name, shape in read.items() if "down" in name} == {(6, 2)}
    assert {shape for name, shape in read.items() if "down" not in name} == {(2, 6)}


def test_an_index_names_the_files(tmp_path: Path) -> None:
    tensors = separate()
    names = sorted(tensors)
    for file, part in (("x.safetensors", names[:4]), ("y.safetensors", names[4:])):
        safetensors_torch.save_file({name: tensors[name] for name in part}, tmp_path / file)
    safetensors_torch.save_file({f"{PREFIX}0.w9.weight": random(1)}, tmp_path / "not_in_the_index.safetensors")
    weight_map = {name: "x.safetensors" if i < 4 else "y.safetensors" for i, name in enumerate(names)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}) + " " * (40 << 20))  # as large as that of many experts
    for path in (tmp_path, index):
        assert load(path).E == 3
    stray = f"{PREFIX}3.up_proj.weight"
    index.write_text(
        json.dumps(
            {"weight_map": weight_map | {stray.replace("up", p): "x.safetensors" for p in ("gate", "up", "down")}}
        )
    )
    with pytest.raises(InvalidInputError, match=r"x\.safetensors does not have .*experts\.3\.gate_proj\.weight"):
        load(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "y.safetensors").unlink()
    with pytest.raises(InvalidInputError, match=r"names files that are missing: y\.safetensors"):
        load(tmp_path)
    index.write_text("[]")
    with pytest.raises(InvalidInputError, match="is no index of safetensors files"):
        load(tmp_path)


def without(name: str) -> Tensors:
    return {each: tensor for each, tensor in separate().items() if name not in each}


WRONG: dict[str, tuple[Tensors, str]] = {
    "a missing projection": (
        without("1.up_proj"),
        r"lacks expert 1: up weight; there is model\.layers\.1\.mlp\.experts\.0\.down_proj\.weight",
    ),
    "a missing expert": (
        without("experts.1."),
        "lacks expert 1: down weight, expert 1: gate weight, expert 1: up weight",
    ),
    "an unknown name": (
        {**separate(), f"{PREFIX}0.middle.weight": random(1)},
        r"unknown names: model\.layers\.1\.mlp\.experts\.0\.middle\.weight; known are EXPERT\.NAME\.KIND",
    ),
    "a number that no expert has": (
        {**separate(), f"{PREFIX}4000000000.up_proj.weight": random(4, 6)},
        r"unknown names: model\.layers\.1\.mlp\.experts\.4000000000\.up_proj\.weight",
    ),
    "scales of weights that are not FP8": (
        {**separate(), **{name.replace("weight", "weight_scale"): random(1) for name in separate()}},
        r"has .*weight_scale.* beside weights that are not float8_e4m3fn",
    ),
    "static scales of activations": (
        {**separate(), f"{PREFIX}0.up_proj.input_scale": random(1)},
        "that is FP8 with static activation scales, which is not read",
    ),
    "another shape": (
        {**separate(), f"{PREFIX}2.up_proj.weight": random(5, 6)},
        r"experts\.2\.up_proj\.weight must be \[4, 6\] to go with the others, got \[5, 6\]",
    ),
    "another dtype": (
        {**separate(), f"{PREFIX}2.up_proj.weight": random(4, 6).half()},
        r"experts\.2\.up_proj\.weight is torch\.float16 and others are torch\.float32",
    ),
    "both layouts": ({**separate(2), **fused()}, r"has fused experts \(.*gate_up_proj.*\) and single ones \(.*0\.down"),
    "fused without down": (
        {f"{PREFIX}gate_up_proj": random(2, 8, 6)},
        r"lacks down weight; there is model\.layers\.1\.mlp\.experts\.gate_up_proj",
    ),
    "fused of other shapes": (
        {**fused(), f"{PREFIX}down_proj": random(2, 6, 5)},
        r"gate_up_proj \[2, 8, 6\] and down_proj \[2, 6, 5\], which do not belong together",
    ),
    "fused of other experts": (
        {**fused(), f"{PREFIX}gate_up_proj": random(3, 8, 6)},
        r"gate_up_proj must be \[2, 8, 6\] to go with the others, got \[3, 8, 6\]",
    ),
    "exponents for multipliers": (
        separate_fp8(scale_dtype=torch.uint8),
        r"0\.gate_proj\.weight_scale_inv must hold multipliers .*, got torch\.uint8; exponents of E8M0 must be stored",
    ),
    "FP8 without scales": (
        {name: tensor for name, tensor in separate_fp8().items() if "0.up_proj.weight_scale" not in name},
        "lacks expert 0: up scale",
    ),
    "FP8 blocks across gate and up": (separate_fp8(N=192), "N=192 rows of gate and up, which is no multiple of 128"),
    "another layer": (
        {"model.layers.0.mlp.experts.0.w1.weight": random(1), "model.layers.1.mlp.gate_proj.weight": random(1)},
        r"no experts of layer 1; layers 0 have\. The layer's tensors are model\.layers\.1\.mlp\.gate_proj\.weight",
    ),
    "an expert of the layer's number": (
        {"model.layers.0.mlp.experts.1.w1.weight": random(1)},
        r"no experts of layer 1; layers 0 have$",
    ),
    "two such layers": (
        {**separate(), "vision.layers.1.experts.0.w1.weight": random(1)},
        r"layer 1 under several names: model\.layers\.1\.mlp\.experts\., vision\.layers\.1\.experts\.",
    ),
}


@pytest.mark.parametrize(("tensors", "message"), WRONG.values(), ids=WRONG)
def test_refuses_a_wrong_checkpoint_by_name(tensors: Tensors, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=message):
        load(save(tmp_path, tensors))


def test_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="must be downloaded first"):
        ExpertWeights.from_safetensors("Qwen/Qwen3-30B-A3B", layer=1)
    with pytest.raises(InvalidInputError, match="~no-such-user/x cannot be expanded"):
        ExpertWeights.from_safetensors("~no-such-user/x", layer=1)
    for path, why in (("a" * 300, "File name too long"), ("/dev/null", "of another kind")):
        with pytest.raises(InvalidInputError, match=rf"neither a file nor a folder \({why}\)"):
            ExpertWeights.from_safetensors(path, layer=1)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(InvalidInputError, match=r"has no \*\.safetensors; there is pytorch_model\.bin"):
        ExpertWeights.from_safetensors(tmp_path, layer=1)
    (tmp_path / "broken.safetensors").write_bytes(b"{}")
    with pytest.raises(InvalidInputError, match=r"broken\.safetensors cannot be read as safetensors"):
        ExpertWeights.from_safetensors(tmp_path, layer=1)


def test_the_config_beside_the_weights_is_held_against_them(tmp_path: Path) -> None:
    tensors = separate()
    with pytest.raises(InvalidInputError, match=r"has no config\.json beside it.*activation= one of silu"):
        ExpertWeights.from_safetensors(save(tmp_path, tensors), layer=1)
    sizes = {"hidden_size": 6, "moe_intermediate_size": 4, "num_local_experts": 4, "num_experts": 4}
    config = {**qwen3().to_dict(), **sizes}
    save(tmp_path, tensors, config)
    with pytest.raises(InvalidInputError, match=r"experts of \{'E': 3, .*its config\.json describes \{'E': 4"):
        ExpertWeights.from_safetensors(tmp_path, layer=1)
    for quantization, message in (
        ({"weight_block_size": [64, 64]}, r"FP8 blocks of \[64, 64\]"),
        ({"weight_block_size": 128}, r"FP8 blocks of 128, and 128×128"),
        ({"activation_scheme": "static"}, "activation_scheme='static'"),
    ):
        save(tmp_path, tensors, {**config, "quantization_config": quantization})
        with pytest.raises(InvalidInputError, match=message):
            ExpertWeights.from_safetensors(tmp_path, layer=1)


@pytest.mark.parametrize(
    ("tensors", "tp", "message"),
    [
        (separate(), (2, 2), r"0 ≤ rank < size, got \(2, 2\)"),
        (separate(), 2, r"tp must be \(rank, size\) with 0 ≤ rank < size, got 2"),
        (separate(), (0, 3), "N=4 cannot be divided among 3 processes"),
        (
            {**fused(N=4), f"{PREFIX}gate_up_proj_bias": random(2, 12)},
            (0, 2),
            r"gate_up_proj_bias must be \[2, 8\] to go with the others, got \[2, 12\]",
        ),
        (separate_fp8(), (0, 4), r"N=256 cannot be divided among 4 processes.*4 × 128"),
    ],
    ids=["rank", "number", "columns", "biases", "blocks"],
)
def test_refuses_a_share_that_cannot_be(tensors: Tensors, tp: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=message):
        load(save(tmp_path, tensors), tp=tp)
    with pytest.raises(InvalidInputError, match="layer must be the layer's number, an integer, got '1'"):
        load(tmp_path, layer="1")


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(6, 4), nn.Linear(6, 4)
        self.down_proj = nn.Linear(4, 6)


def test_experts_from_modules_with_biases() -> None:
    modules = [Expert(), Expert()]
    experts = ExpertWeights.from_experts(modules, activation="gelu")
    hidden = random(3, 6)
    out = moe_forward(hidden, experts, torch.ones(3, 1), torch.ones(3, 1, dtype=torch.int64))
    own = modules[1]
    expected = own.down_proj(nn.functional.gelu(own.gate_proj(hidden)) * own.up_proj(hidden))
    torch.testing.assert_close(out, expected)
    with pytest.raises(InvalidInputError, match=r"the list of 2 experts lacks expert 1: down bias; there is 0\.down"):
        ExpertWeights.from_experts([modules[0], {n: t for n, t in own.state_dict().items() if "down_proj.b" not in n}])
    wrong: dict[str, Any] = {
        "the list of 0 experts holds no experts": [],
        "each expert must be a module or tensors by name, got NoneType": [modules[0], None],
        r"experts must be a sequence, one module .* for each, got Expert; fused tensors .* ExpertWeights\(": own,
        r"tensor 0\.up_proj\.weight must be a torch\.Tensor, got list": [{"up_proj.weight": [1.0]}],
    }
    for message, experts_list in wrong.items():
        with pytest.raises(InvalidInputError, match=message):
            ExpertWeights.from_experts(experts_list)


def test_to_a_device_is_itself_or_a_copy_there() -> None:
    experts = ExpertWeights.from_experts([Expert()], activation="gelu")
    assert experts.to("cpu") is experts
    assert experts.to(torch.device("cpu")) is experts
    codes = ExpertWeights.quantize(random(1, 256, 128), random(1, 128, 128))
    assert codes.gate_up.dtype == FP8
    with pytest.raises(InvalidInputError, match="must be on cpu or cuda, got meta"):
        codes.to("meta")
