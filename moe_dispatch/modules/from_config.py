"""The arguments of `MoELayer` from a model's config: shapes by `model_config`, router and shared experts by family."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from moe_dispatch.errors import InvalidInputError
from moe_dispatch.model_config import DOWNLOAD, LARGEST, configured_layer, moe_section
from moe_dispatch.routers import Router, Scoring
from moe_dispatch.system.files import read_json

# Routers by model_type, as in the families' modules of transformers 5.17: those that score by softmax, with whether
# weights are renormalised where the config does not say; and those of DeepSeek-V3's kind.
_SOFTMAX: Final = {
    "mixtral": True, "qwen2_moe": False, "qwen3_moe": False, "qwen3_next": True, "olmoe": False, "gpt_oss": True,
}  # fmt: skip
_SIGMOID: Final = frozenset({"deepseek_v3", "kimi_k2", "glm4_moe"})
# Families whose shared experts have a gate.
_SHARED_GATE: Final = frozenset({"qwen2_moe", "qwen3_next"})


def layer_arguments(config: object) -> dict[str, Any]:
    """The arguments of `MoELayer`; see `MoELayer.from_config`."""
    described, origin = _loaded(config)
    layer = configured_layer(described, origin)
    section = moe_section(described, origin)
    return {
        "K": layer.K, "N": layer.N, "E": layer.E, "router": _router(section, layer.topk, origin),
        "activation": layer.activation, "interleaved": layer.interleaved, "bias": layer.bias,
        **_shared(section, layer.N, origin),
    }  # fmt: skip


def _loaded(config: object) -> tuple[dict[str, Any], str]:
    if isinstance(config, str | Path):
        path = Path(os.path.expanduser(config))
        path = path / "config.json" if os.path.isdir(path) else path
        try:
            config, origin = read_json(path), str(path)
        except (OSError, ValueError) as error:
            why = f"{error.strerror}; {DOWNLOAD}" if isinstance(error, FileNotFoundError) else error
            raise InvalidInputError(f"{path} cannot be read as a config: {why}") from error
    else:
        origin = "the config"
        config = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(config, Mapping):
        raise InvalidInputError(f"{origin} must be a mapping, a path or a config of transformers, got {type(config)}")
    return dict(config), origin


def _router(section: Mapping[str, Any], topk: int, origin: str) -> Router:
    family = str(section.get("model_type"))
    scoring: Scoring
    if family in _SOFTMAX:
        scoring = "softmax"
    elif family in _SIGMOID:
        scoring = "sigmoid"
    else:
        raise InvalidInputError(
            f"{origin} is of model_type {family!r}, whose router is unknown; known: "
            f"{', '.join(sorted({*_SOFTMAX, *_SIGMOID}))}. Give MoELayer a Router"
        )
    for key, expected in (("scoring_func", scoring), ("topk_method", "noaux_tc")):
        if section.get(key, expected) != expected:
            raise InvalidInputError(f"{origin} has {key}={section[key]!r}, and {expected!r} is known of {family}")
    if scoring == "softmax":
        renormalize = True if family in ("mixtral", "gpt_oss") else section.get("norm_topk_prob", _SOFTMAX[family])
        return Router(topk, renormalize=bool(renormalize), bias=family == "gpt_oss")
    return Router(
        topk,
        "sigmoid",
        renormalize=bool(section.get("norm_topk_prob", True)),
        scale=section.get("routed_scaling_factor", 1.0),
        groups=section.get("n_group") or 1,
        topk_groups=section.get("topk_group") or 1,
        correction_bias=True,
    )


def _shared(section: Mapping[str, Any], N: int, origin: str) -> dict[str, Any]:
    family = str(section.get("model_type"))
    if family in _SHARED_GATE:
        return {"shared_N": _count(section, "shared_expert_intermediate_size", origin), "shared_gate": True}
    return {"shared_N": N * _count(section, "n_shared_experts", origin)} if family in _SIGMOID else {}


def _count(section: Mapping[str, Any], key: str, origin: str) -> int:
    """A number that may be missing or null, which stand for 0."""
    count = section.get(key) or 0
    if type(count) is not int or not 0 <= count < LARGEST:
        raise InvalidInputError(
            f"{origin} has {key}={str(count)[:40]}, and it must be an integer from 0 to {LARGEST - 1}"
        )
    return count
