"""Models by name and by their configs: as real ones are written, as transformers builds them, and hostile ones."""

import copy
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dispatch.activations import Activation
from moe_dispatch.errors import InvalidInputError, UnknownNameError
from moe_dispatch.model_config import ConfiguredLayer, configured_layer
from moe_dispatch.modules.from_config import layer_arguments
from moe_dispatch.workloads import WORKLOADS, workload


@dataclass(frozen=True)
class Real:
    """What a published config says of its experts, in the keys that matter, and the layer that it means."""

    name: str
    config: dict[str, Any]
    layer: tuple[int, int, int, int]
    activation: Activation = "silu"
    bias: bool = False
    interleaved: bool = False

    def __str__(self) -> str:
        return self.name


SILU = {"hidden_act": "silu"}
DENSE = {"intermediate_size": 9999, **SILU}
VISION = {"model_type": "some_vision", "hidden_size": 1152, "intermediate_size": 4304, "hidden_act": "quick_gelu"}

REAL = (
    Real("ernie-4.5-vl", {"model_type": "ernie4_5_moe_vl", "moe_num_experts": [64, 64], "moe_k": 6,
         "hidden_size": 2560, "moe_intermediate_size": [1536, 1536], "vision_config": VISION, **DENSE}, (64, 6, 2560,
         1536)),
    Real("kimi-linear-48b-a3b", {"model_type": "kimi_linear", "num_experts": 256, "num_experts_per_token": 8,
         "hidden_size": 2304, "moe_intermediate_size": 1024, "moe_renormalize": True, **DENSE}, (256, 8, 2304, 1024)),
    Real("gemma-4-26b-a4b", {"model_type": "gemma4", "vision_config": VISION,
         "text_config": {"model_type": "gemma4_text", "num_experts": 128, "top_k_experts": 8, "hidden_size": 2816,
         "moe_intermediate_size": 704, "intermediate_size": 2112, "enable_moe_block": True,
         "hidden_activation": "gelu_pytorch_tanh"}}, (128, 8, 2816, 704), "gelu_tanh"),
    Real("hunyuan-a13b", {"model_type": "hunyuan_v1_moe", "num_experts": 64, "moe_topk": [8] * 32,
         "hidden_size": 4096, "moe_intermediate_size": [3072] * 32, "num_shared_expert": [1] * 32,
         "moe_layer_num_skipped": 0, **DENSE}, (64, 8, 4096, 3072)),
    Real("qwen3-omni-30b-a3b", {"model_type": "qwen3_omni_moe", "code2wav_config": {"hidden_size": 1024,
         "num_experts": 7}, "talker_config": {"text_config": {"num_experts": 128, "num_experts_per_tok": 6,
         "hidden_size": 1024}}, "thinker_config": {"vision_config": VISION, "text_config": {"num_experts": 128,
         "num_experts_per_tok": 8, "hidden_size": 2048, "moe_intermediate_size": 768, **DENSE}}}, (128, 8, 2048, 768)),
    Real("nemotron-3-super", {"model_type": "nemotron_h", "n_routed_experts": 512, "num_experts_per_tok": 22,
         "hidden_size": 4096, "moe_latent_size": 1024, "moe_intermediate_size": 2688,
         "moe_shared_expert_intermediate_size": 5376, "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu",
         "intermediate_size": 2688}, (512, 22, 1024, 2688), "relu2"),
    Real("nemotron-3-nano", {"model_type": "nemotron_h", "n_routed_experts": 128, "num_experts_per_tok": 6,
         "hidden_size": 2688, "moe_latent_size": None, "moe_intermediate_size": 1856, "mlp_hidden_act": "relu2",
         "intermediate_size": 1856}, (128, 6, 2688, 1856), "relu2"),
    Real("minimax-m3", {"model_type": "minimax_m3_vl", "vision_config": VISION,
         "text_config": {"model_type": "minimax_m3_vl_text", "num_local_experts": 128, "num_experts_per_tok": 4,
         "hidden_size": 6144, "intermediate_size": 3072, "dense_intermediate_size": 12288,
         "shared_intermediate_size": 3072, "swiglu_alpha": 1.702, "swiglu_limit": 7.0, **SILU}}, (128, 4, 6144, 3072),
         "swiglu_oai"),
    Real("deepseek-v4 with another limit", {"model_type": "deepseek_v4", "n_routed_experts": 256,
         "num_experts_per_tok": 6, "hidden_size": 4096, "moe_intermediate_size": 2048, "swiglu_limit": 12.5, **SILU},
         (256, 6, 4096, 2048), "swiglu(limit=12.5)"),
    Real("hy-v4, its limit left out", {"model_type": "hy_v4", "num_experts": 64, "num_experts_per_tok": 8,
         "hidden_size": 4096, "moe_intermediate_size": 1536, **SILU}, (64, 8, 4096, 1536), "swiglu(limit=10)"),
    Real("a gpt-oss with its own alpha", {"model_type": "gpt_oss", "num_local_experts": 32, "num_experts_per_tok": 4,
         "hidden_size": 2880, "intermediate_size": 2880, "swiglu_alpha": 1.5, **SILU}, (32, 4, 2880, 2880),
         "swiglu(alpha=1.5,limit=7,shift=1)", bias=True, interleaved=True),
    Real("inkling2", {"model_type": "inkling2_text", "n_routed_experts": 128, "num_experts_per_tok": 8,
         "hidden_size": 2048, "moe_intermediate_size": 768, "mlp_gate_softcap": 4.0, "mlp_up_softcap": 25.0, **SILU},
         (128, 8, 2048, 768), "swiglu(gate_cap=4,up_cap=25)"),
    Real("dbrx", {"model_type": "dbrx", "d_model": 6144, "ffn_config": {"ffn_act_fn": {"name": "silu"},
         "ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4, "moe_jitter_eps": 0,
         "moe_loss_weight": 0.05}}, (16, 4, 6144, 10752)),
    Real("llama-4-scout", {"model_type": "llama4", "vision_config": VISION,
         "text_config": {"model_type": "llama4_text", "num_local_experts": 16, "num_experts_per_tok": 1,
         "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384, **SILU,
         "interleave_moe_layer_step": 1}}, (16, 1, 5120, 8192)),
    Real("mixtral, params.json", {"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32,
         "moe": {"num_experts_per_tok": 2, "num_experts": 8}}, (8, 2, 4096, 14336)),
    Real("mistral-large-3, params.json", {"dim": 7168, "hidden_dim": 16384, "moe": {"expert_parallel": 1,
         "num_experts": 128, "num_experts_per_tok": 4, "expert_hidden_dim": 4096, "num_shared_experts": 1,
         "route_every_n": 1}}, (128, 4, 7168, 4096)),
)  # fmt: skip


@pytest.mark.parametrize("real", REAL, ids=str)
def test_a_real_config_is_read_as_it_is_meant(real: Real) -> None:
    layer = configured_layer(real.config, "config.json")
    assert (layer.E, layer.topk, layer.K, layer.N) == real.layer
    assert (layer.activation, layer.bias, layer.interleaved) == (real.activation, real.bias, real.interleaved)


BASE = {"num_experts": 64, "num_experts_per_tok": 8, "hidden_size": 2048, "moe_intermediate_size": 768}

# Configs that must not be read, and what the refusal must name.
REFUSED: dict[str, tuple[Any, str]] = {
    "dense": ({"hidden_size": 4096}, "has no n_routed_experts or .*: it is not the config of an MoE model"),
    "dense Qwen": ({"num_experts": 0, "hidden_size": 4096}, r"above 0 \(it has num_experts=0\)"),
    "dense vision model": ({"text_config": {"hidden_size": 1}}, "its language model included, has no"),
    "text_config of another type": ({"text_config": [1]}, "not the config of an MoE model"),
    "a list": ([1], "must hold a JSON object, got list"),
    "one expert": (BASE | {"num_experts": 1}, "has one expert"),
    "topk above E": (BASE | {"num_experts": 4}, "8 experts per token of 4"),
    "no topk": (BASE | {"num_experts_per_tok": None, "moe_choose": 3}, "experts per token.*moe_choose=3"),
    "layers that differ": (BASE | {"moe_intermediate_size": [512, 768]}, r"\[512, 768\]: its layers differ"),
    "rows of an unknown family": (
        BASE | {"model_type": "new_moe", "moe_intermediate_size": None, "intermediate_size": 64},
        "model_type 'new_moe' have the rows of its dense layers is unknown",
    ),
    "an unknown size": (BASE | {"expert_inner_rank": 64}, "expert_inner_rank=64, which may change the experts"),
    "an unknown latent": (BASE | {"moe_latent_dim": 512}, "moe_latent_dim=512, which may change the experts"),
    "clamped silu": (BASE | {"swiglu_limit": 10.0}, "swiglu_limit=10.0, and how the gate"),
    "clamps of some layers": (BASE | {"swiglu_limits": [0, 16.0]}, r"swiglu_limits=\[0, 16.0\], and how"),
    "caps of an unknown gate": (BASE | {"mlp_gate_softcap": 4.0}, "mlp_gate_softcap=4.0, and how the gate"),
    "alpha of an unknown gate": (BASE | {"swiglu_alpha": 1.5, "swiglu_limit": 7.0}, "swiglu_alpha=1.5"),
    "a parameter that is no number": (BASE | {"model_type": "hy_v4", "swiglu_limit": "x"}, "limit of swiglu"),
    "a norm after each expert": (BASE | {"model_type": "muse_spark_text"}, "normalises the output of each"),
    "unknown activation": (BASE | {"hidden_act": "mish"}, "activation 'mish'"),
    "experts switched off": (BASE | {"enable_moe_block": False}, "switches its experts off"),
    "a size that no layer has": (BASE | {"num_experts": 10**400}, "has a num_experts of 2147483648 or more"),
    "a limit that is no float": (BASE | {"model_type": "gpt_oss", "swiglu_limit": 10**400}, "must be a finite number"),
    "truth values for numbers": (BASE | {"num_experts": True}, "not the config of an MoE model"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "says"), REFUSED.values(), ids=REFUSED)
def test_a_config_that_cannot_be_read_with_certainty_is_refused_by_name(config: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(InvalidInputError, match=says):
        workload(str(path))


# transformers' own classes: default configs, and the experts that the models build from them.


def _families() -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Every config class of transformers whose default has experts, as JSON data and as an object."""
    transformers = pytest.importorskip("transformers", minversion="5.17")
    transformers.logging.set_verbosity_error()
    for model_type, config_class in transformers.CONFIG_MAPPING.items():
        if "expert" not in inspect.getsource(sys.modules[config_class.__module__]):
            continue  # a few of the others ask the hub for their defaults
        try:
            config = config_class()
            data = json.loads(config.to_json_string(use_diff=False))
        except Exception:  # noqa: BLE001, S112 - several classes have no default that is valid
            continue
        if "expert" in json.dumps(data):
            yield model_type, data, config


def _shortened(config: Any) -> Any:
    """The config with five layers, of which the last has experts in nearly every family."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        values = vars(part)
        most = values.get("num_hidden_layers")
        if not isinstance(most, int) or most <= 5:
            continue
        for key, value in values.items():
            if isinstance(value, list) and len(value) == most:
                values[key] = value[:5]
        part.num_hidden_layers = 5
    return config


def _expert_shapes(config: Any) -> set[tuple[tuple[int, ...], ...]]:
    """Shapes of the experts' weights in the model of a config, built without memory; empty where it cannot be built."""
    import transformers

    for mapping in (transformers.MODEL_MAPPING, transformers.MODEL_FOR_CAUSAL_LM_MAPPING):
        model_class = mapping.get(type(config), None)
        if model_class is None:
            continue
        try:
            with torch.device("meta"):
                model = model_class(config)
        except Exception:  # noqa: BLE001 - several defaults lack what their model needs
            return set()
        shapes: set[tuple[tuple[int, ...], ...]] = set()
        for name, module in model.named_modules():
            own = {key: tuple(weight.shape) for key, weight in module.named_parameters(recurse=False)}
            if "shared" not in name and len(own.get("down_proj", ())) == 3:
                shapes.add((own.get("gate_up_proj", own.get("up_proj", ())), own["down_proj"]))
        return shapes
    return set()


def _shapes_of(layer: ConfiguredLayer) -> set[tuple[tuple[int, ...], ...]]:
    """The shapes that a layer's weights may have: transformers transposes those of some families."""
    rows = layer.N if layer.activation == "relu2" else 2 * layer.N
    straight = ((layer.E, rows, layer.K), (layer.E, layer.K, layer.N))
    transposed = ((layer.E, layer.K, rows), (layer.E, layer.N, layer.K))
    return {straight, transposed}


@pytest.mark.slow
def test_every_family_of_transformers_is_read_as_its_model_is_built_or_refused() -> None:
    compared: list[str] = []
    refused: dict[str, str] = {}
    wrong: list[str] = []
    for model_type, data, config in _families():
        try:
            layer = configured_layer(data, model_type)
        except InvalidInputError as error:
            refused[model_type] = str(error)
            continue
        chosen = re.findall(r'"\w*(?:per_tok|top_?k|moe_k)\w*": \[?(\d+)', json.dumps(data))
        assert str(layer.topk) in chosen, f"{model_type}: read {layer}"
        shapes = _expert_shapes(_shortened(config)) or _expert_shapes(config)
        if model_type == "longcat_flash":  # its first projection has rows for the experts that do nothing, too
            shapes = {((layer.E, *up[1:]), down) for up, down in shapes}
        if shapes:
            compared.append(model_type)
            if not shapes & _shapes_of(layer):
                wrong.append(f"{model_type}: read {layer}, built {shapes}")
    assert not wrong, "\n".join(wrong)
    assert len(compared) >= 45, compared
    # A refusal is right where the default has no experts, no topk, or a gate that no activation here computes.
    expected = (
        "not the config of an MoE model", "and how the gate", "no number of experts per token", "which normalises",
    )  # fmt: skip
    unexplained = {name: why for name, why in refused.items() if not any(text in why for text in expected)}
    assert set(unexplained) <= {"doge"}, unexplained


# Names and paths, as a user types them.


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("deepseek-v3", "deepseek-v3"),
        ("DeepSeek-V3", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-V3-0324", "deepseek-v3"),
        ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"),
        ("Qwen/Qwen3-235B-A22B", "qwen3-235b"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
        ("openai/gpt-oss-120b", "gpt-oss-120b"),
        (" deepseek-v2-lite ", "deepseek-v2-lite"),
    ],
)
def test_names_are_found_as_the_hub_writes_them(text: str, name: str) -> None:
    assert workload(text) is WORKLOADS[name]


@pytest.mark.parametrize(
    ("text", "suggested"),
    [("deepseek-v9", "deepseek-v3"), ("Qwen/Qwen3-30B", "qwen3-30b-a3b"), ("mixtral", "mixtral-8x7b"),
     ("gptoss-120b", "gpt-oss-120b")],
)  # fmt: skip
def test_an_unknown_name_gets_suggestions(text: str, suggested: str) -> None:
    with pytest.raises(UnknownNameError, match=f"did you mean .*{suggested}"):
        workload(text)


@pytest.mark.parametrize("text", ["", "x" * 300, "x" * 5000, "a\0b", "8,2,64", "8,2,64,x", "²,1,1,1", "~no-such-user"])
def test_nonsense_is_an_unknown_name(text: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        workload(text)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ["0,1,64,32", "4,8,64,32", "9" * 5000 + ",1,1,1", f"{1 << 40},2,64,32"])
def test_numbers_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="must be from 1 to"):
        workload(text)
    assert workload("8, 2, 64, 32").N == 32


def test_a_path_without_a_config_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInputError, match=r"folder without config.json or params.json; there is nothing"):
        workload(str(tmp_path))
    (tmp_path / "model.safetensors").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    with pytest.raises(InvalidInputError, match=r"^~/.* folder without .*; there is model.safetensors"):
        workload(f"~/{tmp_path.name}")
    for missing in (str(tmp_path / "gone"), "./gone", "~/gone/gone"):
        with pytest.raises(InvalidInputError, match=r"gone cannot be read: No such file or directory"):
            workload(missing)
    with pytest.raises(UnknownNameError):
        workload("owner/gone")
    (tmp_path / "config.json").write_text(json.dumps(BASE | {"model_type": "qwen3_moe"}))
    assert layer_arguments(f"~/{tmp_path.name}")["E"] == workload(f"~/{tmp_path.name}").E
    if os.geteuid():
        return  # the rest is not for those that cannot become another user
    tmp_path.chmod(0o700)
    script = (
        "import os; from moe_dispatch.workloads import workload; os.setuid(12345)\n"
        f"for path in ({str(tmp_path)!r}, {str(tmp_path / 'inner')!r}):\n"
        "    try: workload(path)\n"
        "    except ValueError as error: print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd="/")
    assert said.stdout.count("cannot be read: Permission denied") == 2, said


def test_models_of_one_family_have_names_of_their_own(tmp_path: Path) -> None:
    names = []
    changes: list[dict[str, object]] = [{}, {"num_experts": 32}, {"_name_or_path": "org/model"}]
    for i, change in enumerate(changes):
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(BASE | {"model_type": "qwen3_moe"} | change))
        names.append(workload(str(path)).name)
    assert names == ["qwen3_moe 64,8,2048,768", "qwen3_moe 32,8,2048,768", "org/model"]


@pytest.mark.parametrize("name", ["config.json", "params.json"])
def test_a_folder_or_a_file_with_a_byte_order_mark_will_do(name: str, tmp_path: Path) -> None:
    path = tmp_path / "Some-Model" / name
    path.parent.mkdir()
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(BASE).encode())
    for text in (str(path), str(path.parent)):
        layer = workload(text)
        assert (layer.E, layer.topk, layer.K, layer.N, layer.name) == (64, 8, 2048, 768, "Some-Model")
