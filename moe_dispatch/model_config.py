"""The MoE layer that a model's config.json (Hugging Face) or params.json (Mistral) describes.

Families name the same numbers differently, nest them, list them per layer, and add switches that change the layer.
Whatever might change the experts' shape or activation and is not known here is refused by name: measuring the wrong
layer is worse than an error.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from moe_dispatch.activations import SWIGLU_OAI, Activation, SwiGLU
from moe_dispatch.errors import InvalidInputError

Section = Mapping[str, Any]

DOWNLOAD: Final = "a model of the hub must be downloaded first (huggingface_hub.snapshot_download gives its folder)"
LARGEST: Final = 1 << 31  # No number of a layer is as large.
# Keys for each number, in order of precedence.
EXPERTS: Final = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts", "num_routed_experts")
CHOSEN: Final = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "num_selected_experts", "top_k_experts",
    "moe_topk", "moe_top_k", "moe_k", "moe_router_topk", "top_k",
)  # fmt: skip
# Experts that work on a projection of the hidden state have its size as K (Nemotron 3 Super).
COLUMNS: Final = ("moe_latent_size", "hidden_size", "d_model", "dim")
ROWS: Final = (
    "moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size", "expert_intermediate_size",
    "expert_hidden_dim", "moe_hidden_size",
)  # fmt: skip
# Where a family has none of `ROWS`, its experts have the rows of the dense layers.
DENSE_ROWS: Final = ("intermediate_size", "ffn_hidden_size", "hidden_dim")
DENSE_ROWED: Final = frozenset({
    "", "arctic", "aria", "aria_text", "cohere2_moe", "dbrx", "flex_olmo", "gpt_oss", "granitemoe", "granitemoe_swa",
    "granitemoehybrid", "granitemoeshared", "grok-1", "jamba", "jetmoe", "llama4", "llama4_text", "minimax",
    "minimax_m2", "minimax_m3_vl", "minimax_m3_vl_text", "minimax_text_01", "mixtral", "olmoe", "openai_privacy_filter",
    "phimoe",
})  # fmt: skip
ACTIVATION: Final = (
    "hidden_act", "hidden_activation", "mlp_hidden_act", "activation_function", "ffn_act_fn", "activation",
)  # fmt: skip
NAMES: Final[Mapping[str, Activation]] = {
    "silu": "silu", "swish": "silu", "swiglu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu2": "relu2",
}  # fmt: skip
# Sections of a multimodal config that hold the language model, and parts of a section that hold its MoE layer.
LANGUAGE: Final = ("text_config", "thinker_config", "llm_config", "language_config", "language_model_config")
PARTS: Final = ("ffn_config", "moe", "moe_config")
# The gate of families whose gate has parameters, with the values that a config may leave out because they are the
# defaults of its class. The same key means different things: Step-3.7 clamps what SiLU has made, the others its input.
GATES: Final[Mapping[str, SwiGLU]] = {
    **dict.fromkeys(("gpt_oss", "openai_privacy_filter", "minimax_m3_vl", "minimax_m3_vl_text"), SWIGLU_OAI),
    **dict.fromkeys(
        ("deepseek_v4", "glm5_next", "glm5_next_text", "hy_v4", "hy_v4_vl", "hy_v4_vl_text"), SwiGLU(limit=10.0)
    ),
    **dict.fromkeys(
        ("inkling2", "inkling2_text", "inkling2_loop", "inkling2_loop_text"), SwiGLU(gate_cap=4.0, up_cap=25.0)
    ),
}
PARAMETERS: Final = {
    "swiglu_alpha": "alpha", "swiglu_limit": "limit", "mlp_gate_softcap": "gate_cap", "mlp_up_softcap": "up_cap",
}  # fmt: skip
# Families whose experts do what no backend does, each with what that is.
BEYOND: Final = dict.fromkeys(("muse_spark", "muse_spark_text"), "normalises the output of each expert")
# Keys that look as if they changed the experts and do not: the router, shared experts, dense layers.
HARMLESS: Final = re.compile(
    r"share|router|dense|mlp_|_capacity|jitter|aux|loss|prefix|layer|group|norm|scal|dtype|renorm|dropout|bias"
)
SUSPECT: Final = re.compile(
    r"latent|swiglu|clamp|(expert|moe|ffn).*(size|dim|hidden|inner|rank|width)|(size|dim|hidden|inner|rank).*expert"
)


@dataclass(frozen=True)
class ConfiguredLayer:
    """The MoE layer of a config. The letters are `MoEProblem`'s.

    Attributes:
        name: Name of the model, or its family with E,topk,K,N, for benchmarks tell models of one family apart by their
            names; empty where the config has neither.
    """

    name: str
    E: int
    topk: int
    K: int
    N: int
    activation: Activation
    bias: bool
    interleaved: bool


def configured_layer(config: object, origin: str) -> ConfiguredLayer:
    """Read the MoE layer of a config, which messages call by its `origin`.

    Raises:
        InvalidInputError: It describes no MoE layer, or one that cannot be read with certainty.
    """
    if not isinstance(config, dict):
        raise InvalidInputError(f"{origin} must hold a JSON object, got {type(config).__name__}")
    section = moe_section(config, origin)
    reader = _Reader(section, origin)
    E = reader.number(EXPERTS, "number of experts")
    if E < 2:
        raise InvalidInputError(f"{origin} has one expert: it is not the config of an MoE model")
    topk = reader.number(CHOSEN, "number of experts per token")
    if topk > E:
        raise InvalidInputError(f"{origin} chooses {topk} experts per token of {E}, and must choose distinct ones")
    K = reader.number(COLUMNS, "hidden size")
    N = reader.rows()
    reader.refuse_unknown()
    activation = reader.activation()
    family = reader.family
    biased = family in ("gpt_oss", "openai_privacy_filter")
    own, family_name = (
        next((str(part[key])[:80] for part in (config, section) if part.get(key)), "")
        for key in ("_name_or_path", "model_type")
    )
    name = own or (f"{family_name} {E},{topk},{K},{N}" if family_name else "")
    return ConfiguredLayer(name, E, topk, K, N, activation, bias=biased, interleaved=family == "gpt_oss")


def moe_section(config: Section, origin: str) -> Section:
    """The section that holds the MoE layer, with its parts merged in.

    Raises:
        InvalidInputError: No section describes an MoE layer.
    """
    dense: list[str] = []
    for section in _sections(config):
        merged = dict(section)
        for part in PARTS:
            if isinstance(section.get(part), dict):
                merged = {**section[part], **merged}
        counts = {key: merged[key] for key in EXPERTS if key in merged}
        if any(_present(value) for value in counts.values()):
            return merged
        dense += [f"{key}={value}" for key, value in counts.items()]
    if any(isinstance(config.get(key), dict) for key in LANGUAGE):
        where = f"{origin}, its language model included,"
    else:
        where = origin
    detail = f" above 0 (it has {', '.join(dense)})" if dense else ""
    raise InvalidInputError(f"{where} has no {' or '.join(EXPERTS)}{detail}: it is not the config of an MoE model")


def _sections(config: Section) -> Iterator[Section]:
    """The config and the language models nested in it, outermost first."""
    yield config
    for key in LANGUAGE:
        nested = config.get(key)
        if isinstance(nested, dict):
            yield from _sections(nested)


def _present(value: object) -> bool:
    if isinstance(value, list):
        return any(_present(each) for each in value)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class _Reader:
    """Reads the numbers of one section, and refuses what it cannot read."""

    def __init__(self, section: Section, origin: str) -> None:
        self._section, self._origin = section, origin
        model_type = section.get("model_type")
        self.family = model_type if isinstance(model_type, str) else ""

    def number(self, keys: tuple[str, ...], meaning: str) -> int:
        """The first positive number under any of the keys."""
        for key in keys:
            value = self._section.get(key)
            if value is not None and _present(value):
                number = self._same_in_all_layers(key, value)
                if number >= LARGEST:
                    raise InvalidInputError(f"{self._origin} has a {key} of {LARGEST} or more: no layer is as large")
                return number
        raise InvalidInputError(
            f"{self._origin} has no {meaning} under a known key ({', '.join(keys)}); its MoE keys are "
            f"{self._moe_keys()}. Give the layer as E,topk,K,N"
        )

    def rows(self) -> int:
        """N, where it is certain that the number is that of an expert."""
        if any(_present(self._section.get(key)) for key in ROWS):
            return self.number(ROWS, "intermediate size of an expert")
        if self.family.lower() not in DENSE_ROWED:
            raise InvalidInputError(
                f"{self._origin} has none of {', '.join(ROWS)}, and whether the experts of model_type {self.family!r} "
                f"have the rows of its dense layers is unknown; its MoE keys are {self._moe_keys()}. Give the layer as "
                "E,topk,K,N"
            )
        return self.number(DENSE_ROWS, "intermediate size")

    def activation(self) -> Activation:
        """The activation, with the parameters that the gate of some families has."""
        own = {key: value for key in PARAMETERS if (value := self._section.get(key))}
        limits = self._section.get("swiglu_limits")
        own |= {"swiglu_limits": limits} if any(limits if isinstance(limits, list) else [limits]) else {}
        if self.family in GATES and "swiglu_limits" not in own:
            return str(dataclasses.replace(GATES[self.family], **{PARAMETERS[key]: own[key] for key in own}))
        if own:
            pairs = ", ".join(f"{key}={str(value)[:40]}" for key, value in own.items())
            raise InvalidInputError(
                f"{self._origin} has {pairs}, and how the gate of model_type {self.family!r} applies that is unknown "
                f"here; it is known of {', '.join(GATES)}"
            )
        value = next((self._section[key] for key in ACTIVATION if self._section.get(key)), "silu")
        name = str(value.get("name", "silu") if isinstance(value, dict) else value)
        if name not in NAMES:
            raise InvalidInputError(
                f"{self._origin} asks for activation {name[:80]!r}; known: {', '.join(sorted(NAMES))} "
                f"(as {', '.join(sorted(set(NAMES.values())))})"
            )
        return NAMES[name]

    def refuse_unknown(self) -> None:
        """Refuse keys that may change the experts' shape or activation and that are not read."""
        read = {*EXPERTS, *CHOSEN, *COLUMNS, *ROWS, *DENSE_ROWS, *ACTIVATION}
        read |= {*PARAMETERS, "swiglu_limits"}
        unknown = {
            key: value
            for key, value in self._section.items()
            if key not in read and value and SUSPECT.search(key) and not HARMLESS.search(key)
        }
        if unknown:
            pairs = ", ".join(f"{key}={str(value)[:40]}" for key, value in unknown.items())
            raise InvalidInputError(
                f"{self._origin} has {pairs}, which may change the experts and is unknown here; give the layer as "
                "E,topk,K,N if it does not"
            )
        if self.family in BEYOND:
            raise InvalidInputError(
                f"{self._origin} is of model_type {self.family!r}, which {BEYOND[self.family]}: no backend does so"
            )
        if self._section.get("is_moe") is False or self._section.get("enable_moe_block") is False:
            raise InvalidInputError(f"{self._origin} switches its experts off: it is not the config of an MoE model")

    def _same_in_all_layers(self, key: str, value: int | list[object]) -> int:
        if not isinstance(value, list):
            return value
        if self.family.startswith("ernie4_5_vl"):  # the experts for text, then those for images
            value = value[:1]
        distinct = {each for each in value if isinstance(each, int) and each > 0}
        if len(distinct) != 1:
            raise InvalidInputError(
                f"{self._origin} has {key}={str(sorted(distinct))[:60]}: its layers differ; give one as E,topk,K,N"
            )
        return distinct.pop()

    def _moe_keys(self) -> str:
        keys = [key for key in self._section if re.search("expert|moe|top_?k", key)]
        return ", ".join(f"{key}={str(self._section[key])[:40]}" for key in keys[:20]) or "none"
