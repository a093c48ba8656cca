"""Named models and routing distributions, shared by tests, benchmarks and calibration."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypedDict

import torch
from torch import Tensor

from moe_dispatch.errors import InvalidInputError, UnknownNameError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine
from moe_dispatch.problem import ACTIVATIONS, UNGATED, Activation, DType, Mode, MoEProblem


@dataclass(frozen=True)
class Workload:
    """The MoE layer of a model. The letters are `MoEProblem`'s."""

    name: str
    E: int
    topk: int
    K: int
    N: int
    activation: Activation = "silu"
    bias: bool = False
    interleaved: bool = False

    def problem(self, M: int, dtype: DType, machine: Machine, mode: Mode = "eager") -> MoEProblem:
        """The problem of M tokens through this layer on a machine; activations are BF16 where the weights are FP8."""
        return MoEProblem(
            M=M, K=self.K, N=self.N, E=self.E, topk=self.topk, dtype=dtype,
            act_dtype="bf16" if dtype == "fp8" else dtype, activation=self.activation, bias=self.bias,
            interleaved=self.interleaved, device=machine.device, capability=machine.capability, mode=mode,
        )  # fmt: skip


WORKLOADS: Final[dict[str, Workload]] = {
    workload.name: workload
    for workload in (
        Workload("deepseek-v3", E=256, topk=8, K=7168, N=2048),
        Workload("qwen3-30b-a3b", E=128, topk=8, K=2048, N=768),
        Workload("mixtral-8x7b", E=8, topk=2, K=4096, N=14336),
        Workload("gpt-oss-120b", E=128, topk=4, K=2880, N=2880, activation="swiglu_oai", bias=True, interleaved=True),
        Workload("kimi-k2-tp8", E=384, topk=8, K=7168, N=256),
        Workload("qwen3-235b", E=128, topk=8, K=4096, N=1536),
        Workload("deepseek-v2-lite", E=64, topk=6, K=2048, N=1408),
    )
}

# The keys under which Hugging Face configurations say the same thing.
_CONFIG_KEYS: Final[dict[str, tuple[str, ...]]] = {
    "E": ("num_experts", "n_routed_experts", "num_local_experts"),
    "topk": ("num_experts_per_tok", "experts_per_token", "moe_topk", "top_k"),
    "K": ("hidden_size",),
    "N": ("moe_intermediate_size", "intermediate_size"),
}
_CONFIG_ACTIVATIONS: Final[dict[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}


def workload(text: str) -> Workload:
    """Find a workload by name, by ``E,topk,K,N``, or from the path of a Hugging Face config.json.

    Raises:
        UnknownNameError: It is none of the three.
        InvalidInputError: It is the second or third and does not describe an MoE layer.
    """
    if text in WORKLOADS:
        return WORKLOADS[text]
    if text.endswith(".json") or Path(text).is_file():
        return _from_config(Path(text))
    numbers = text.split(",")
    if len(numbers) == 4 and all(number.strip().isdecimal() for number in numbers):
        E, topk, K, N = (int(number) for number in numbers)
        if min(E, topk, K, N) < 1 or topk > E:
            raise InvalidInputError(f"E,topk,K,N must be positive with topk ≤ E, got {text}")
        return Workload(text, E=E, topk=topk, K=K, N=N)
    raise UnknownNameError("workload", text, (*WORKLOADS, "E,topk,K,N", "path/to/config.json"))


def _from_config(path: Path) -> Workload:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} is not a readable config.json: {error}") from error
    if isinstance(config, dict):
        config = config.get("text_config") or config
    if not isinstance(config, dict):
        raise InvalidInputError(f"{path} must hold a JSON object, got {type(config).__name__}")
    found: dict[str, int] = {}
    for letter, keys in _CONFIG_KEYS.items():
        value = next((config[key] for key in keys if isinstance(config.get(key), int) and config[key] > 0), None)
        if value is None:
            raise InvalidInputError(f"{path} has no {' or '.join(keys)} above 0: it is not the config of an MoE model")
        found[letter] = value
    name = str(config.get("_name_or_path") or config.get("model_type") or path.parent.name or path.stem)
    E, topk = found["E"], found["topk"]
    if topk > E:
        raise InvalidInputError(f"{path} chooses {topk} experts per token of {E}, and must choose distinct ones")
    plain = Workload(name, E=E, topk=topk, K=found["K"], N=found["N"])
    if config.get("model_type") == "gpt_oss":
        return dataclasses.replace(plain, activation="swiglu_oai", bias=True, interleaved=True)
    return dataclasses.replace(plain, activation=_config_activation(path, config))


def _config_activation(path: Path, config: Mapping[str, Any]) -> Activation:
    given = str(config.get("hidden_act") or config.get("mlp_hidden_act") or "silu")
    if given not in _CONFIG_ACTIVATIONS:
        raise InvalidInputError(
            f"{path} asks for activation {given!r}; known: {', '.join(sorted(_CONFIG_ACTIVATIONS))} "
            f"(as {', '.join(ACTIVATIONS)})"
        )
    return _CONFIG_ACTIVATIONS[given]


def make_experts(
    layer: Workload | MoEProblem,
    dtype: DType,
    device: torch.device | str,
    generator: torch.Generator | None = None,
    act_dtype: DType | None = None,
) -> ExpertWeights:
    """Random expert weights of a layer, scaled so that the output is of the input's size.

    Args:
        layer: Its shape, activation and biases.
        dtype: Of the weights; ``"fp8"`` quantises.
        device: Where they go.
        generator: On `device`; torch's default if None.
        act_dtype: Of the biases where the weights are FP8; BF16 if None.
    """
    plain = _TORCH_DTYPES[(act_dtype or "bf16") if dtype == "fp8" else dtype]
    rows = layer.N if layer.activation in UNGATED else 2 * layer.N

    def draw(*shape: int, scale: float) -> Tensor:
        out = torch.empty(shape, dtype=plain, device=device)
        for e in range(shape[0]):  # one expert at a time: the fp32 draw of a whole layer would not fit beside it
            out[e] = torch.randn(shape[1:], generator=generator, dtype=torch.float32, device=device) * scale
        return out

    gate_up = draw(layer.E, rows, layer.K, scale=layer.K**-0.5)
    down = draw(layer.E, layer.K, layer.N, scale=layer.N**-0.5)
    biases = (
        (draw(layer.E, rows, scale=0.1), draw(layer.E, layer.K, scale=0.1)) if layer.bias else (None, None)
    )  # fmt: skip
    build = ExpertWeights.quantize if dtype == "fp8" else ExpertWeights
    return build(
        gate_up, down, gate_up_bias=biases[0], down_bias=biases[1], activation=layer.activation,
        interleaved=layer.interleaved,
    )  # fmt: skip


_TORCH_DTYPES: Final[dict[str, torch.dtype]] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}


def torch_dtype(name: DType) -> torch.dtype:
    """``"bf16"`` -> ``torch.bfloat16``."""
    return _TORCH_DTYPES[name]


class _Place(TypedDict):
    dtype: torch.dtype
    device: str


_ON_CPU: Final[_Place] = {"dtype": torch.float32, "device": "cpu"}


@dataclass(frozen=True)
class RoutingDistribution:
    """How tokens spread over experts.

    Attributes:
        name: ``"uniform"``, ``"dirichlet-4"``, ``"one-hot"``.
        skew: f: expert shares are drawn from the symmetric Dirichlet distribution whose expected effective number of
            experts, 1/Σp², is E/f. 1 is uniform.
        hot: Whether one expert is chosen by every token.
    """

    name: str
    skew: float = 1.0
    hot: bool = False

    def sample(
        self, M: int, E: int, topk: int, device: torch.device | str, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw a routing: fp32 weights ``[M, topk]`` that sum to 1, int32 ids ``[M, topk]``, distinct in each row."""
        if topk > E:
            raise InvalidInputError(f"topk={topk} distinct experts cannot be drawn from E={E}")
        # Drawn on the CPU and in fp32, whatever torch's defaults: the same seed gives the same routing everywhere.
        logits = self._log_shares(E, generator).expand(M, E)
        noise = torch.rand(M, E, generator=generator, **_ON_CPU).clamp_(min=1e-20).log_().neg_().log_().neg_()  # Gumbel
        scores = logits + noise
        if self.hot:
            scores[:, 0] = torch.inf
        ids = scores.topk(topk, dim=1).indices
        if self.hot:
            ids = ids[:, torch.randperm(topk, generator=generator, device="cpu")]
        weights = torch.rand(M, topk, generator=generator, **_ON_CPU) + 0.1
        weights /= weights.sum(dim=1, keepdim=True)
        return weights.to(device), ids.to(device=device, dtype=torch.int32)

    def _log_shares(self, E: int, generator: torch.Generator | None) -> Tensor:
        if self.skew <= 1.0 or E == 1:
            return torch.zeros(E, **_ON_CPU)
        # E[Σp²] of a symmetric Dirichlet is (α + 1)/(E·α + 1), and its inverse is to be E/f.
        alpha = max((E / self.skew - 1) / (E * (1 - 1 / self.skew)), 1e-3)
        gamma = torch._standard_gamma(torch.full((E,), alpha, **_ON_CPU), generator=generator)
        return (gamma / gamma.sum()).clamp_(min=1e-30).log_()


ROUTINGS: Final[dict[str, RoutingDistribution]] = {
    routing.name: routing
    for routing in (
        RoutingDistribution("uniform"),
        RoutingDistribution("dirichlet-2", skew=2.0),
        RoutingDistribution("dirichlet-4", skew=4.0),
        RoutingDistribution("one-hot", hot=True),
    )
}
