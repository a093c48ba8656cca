"""Named models and routing distributions, shared by tests, benchmarks and calibration."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from moe_dispatch.activations import UNGATED, Activation
from moe_dispatch.errors import InvalidInputError, UnknownNameError
from moe_dispatch.model_config import LARGEST, configured_layer
from moe_dispatch.problem import QUANTIZED_DTYPES, DType, Mode, MoEProblem
from moe_dispatch.system.files import read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moe_dispatch.experts import ExpertWeights
    from moe_dispatch.machine import Machine


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

    def problem(self, M: int, dtype: DType, machine: "Machine", mode: Mode = "eager") -> MoEProblem:
        """The problem of M tokens through this layer on a machine; activations are BF16 where weights are quantised."""
        return MoEProblem(
            M=M, K=self.K, N=self.N, E=self.E, topk=self.topk, dtype=dtype,
            act_dtype="bf16" if dtype in QUANTIZED_DTYPES else dtype, activation=self.activation, bias=self.bias,
            interleaved=self.interleaved, device=machine.device, capability=machine.capability, mode=mode,
        )  # fmt: skip

    def sharded(self, tp: int) -> "Workload":
        """The layer as each GPU has it under tensor parallelism: a `tp`-th of the columns of every expert.

        Raises:
            InvalidInputError: `tp` does not divide N.
        """
        if tp < 1 or self.N % tp:
            raise InvalidInputError(f"tensor parallelism must divide the {self.N} columns of {self.name}, got tp={tp}")
        return self if tp == 1 else dataclasses.replace(self, name=f"{self.name}-tp{tp}", N=self.N // tp)


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

# Files that describe a model, in its folder.
CONFIGS: Final = ("config.json", "params.json")

# The form of `ExpertWeights.quantize` that makes weights of a dtype.
_FORMS: Final[dict[DType, Literal["block", "channel", "mxfp4"]]] = {
    "fp8": "block", "fp8_channel": "channel", "mxfp4": "mxfp4",
}  # fmt: skip


def workload(text: str) -> Workload:
    """Find a workload by name, by ``E,topk,K,N``, or from a model's config.json or params.json.

    Args:
        text: ``"qwen3-30b-a3b"``, or a name as the Hugging Face hub writes it, in any case and with any suffix
            (``"Qwen/Qwen3-30B-A3B-Instruct-2507"``); four numbers; or the path of a config or of the folder that holds
            it.

    Raises:
        UnknownNameError: It is none of these.
        InvalidInputError: It is a path or numbers and does not describe an MoE layer; a path that cannot be read says
            why.
    """
    if exact := WORKLOADS.get(text.strip().lower()):
        return exact
    if path := _config_path(text):
        return _from_config(path)
    if variant := _variant(text):
        return variant
    numbers = [number.strip() for number in text.split(",")]
    if len(numbers) == 4 and all(number.isascii() and number.isdecimal() for number in numbers):
        if max(map(len, numbers)) < 12:
            E, topk, K, N = map(int, numbers)
            if min(E, topk, K, N) >= 1 and topk <= E and max(E, K, N) < LARGEST:
                return Workload(text, E=E, topk=topk, K=K, N=N)
        raise InvalidInputError(f"E,topk,K,N must be from 1 to {LARGEST - 1} with topk ≤ E, got {text[:80]}")
    if fault := _path_fault(text):
        raise InvalidInputError(f"{text[:300]} {fault}")
    raise UnknownNameError("model", text[:80], (*WORKLOADS, "E,topk,K,N", "path/to/config.json"))


def _variant(text: str) -> Workload | None:
    """A named workload by a hub name, without owner and suffixes: the variants of a model have the same layer."""
    name = text.strip().lower().rpartition("/")[2]
    layers = (layer for known, layer in WORKLOADS.items() if f"{name}-".startswith(f"{known}-"))
    return next(layers, None)


def _config_path(text: str) -> Path | None:
    """The file that a path means: itself, or the config in a folder; None where there is none that can be seen."""
    try:
        path = Path(os.path.expanduser(text))
        if text.endswith(".json"):
            return path
        if path.is_dir():
            return next((path / name for name in CONFIGS if (path / name).exists()), None)
        return path if path.exists() else None
    except (OSError, ValueError):  # a name that is too long, or a NUL byte
        return None


def _path_fault(text: str) -> str:
    """Why a path, which `_config_path` finds no file for, describes no layer; empty where the text is no path."""
    if not text:
        return ""
    try:
        path = os.path.expanduser(text)
        there = sorted(os.listdir(path))
    except (OSError, ValueError) as error:
        is_path = isinstance(error, PermissionError) or path.startswith(("/", "."))
        return f"cannot be read: {getattr(error, 'strerror', '') or error}" if is_path else ""
    return f"is a folder without {' or '.join(CONFIGS)}; there is {', '.join(there[:8]) or 'nothing'}"


def _from_config(path: Path) -> Workload:
    origin = str(path)[:300]
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else "") or error  # without a path, which may be long
        raise InvalidInputError(f"{origin} is not a readable config: {why}") from error
    layer = configured_layer(config, origin)
    name = layer.name or path.parent.name or path.stem
    return Workload(
        name, E=layer.E, topk=layer.topk, K=layer.K, N=layer.N, activation=layer.activation, bias=layer.bias,
        interleaved=layer.interleaved,
    )  # fmt: skip


def make_experts(
    layer: Workload | MoEProblem,
    dtype: DType,
    device: "torch.device | str",
    generator: "torch.Generator | None" = None,
    act_dtype: DType | None = None,
    *,
    transposed: bool = False,
) -> "ExpertWeights":
    """Random expert weights of a layer, scaled so that the output is of the input's size.

    Args:
        layer: The layer, whose shape, activation and biases count.
        dtype: Dtype of the weights, which may be a quantised one.
        device: Device of the weights.
        generator: A generator on `device`; torch's default if None.
        act_dtype: Dtype of the biases where the weights are quantised; BF16 if None.
        transposed: Whether to store them by columns, see `ExpertWeights`; quantised ones never are.
    """
    import torch

    from moe_dispatch.experts import ExpertWeights

    plain = torch_dtype((act_dtype or "bf16") if dtype in QUANTIZED_DTYPES else dtype)
    rows = layer.N if layer.activation in UNGATED else 2 * layer.N

    def draw(*shape: int, scale: float) -> "Tensor":
        out = torch.empty(shape, dtype=plain, device=device)
        for e in range(shape[0]):  # one expert at a time: the fp32 draw of a whole layer would not fit beside it
            out[e] = torch.randn(shape[1:], generator=generator, device=device, dtype=torch.float32) * scale
        return out

    gate_up = draw(layer.E, rows, layer.K, scale=layer.K**-0.5)
    down = draw(layer.E, layer.K, layer.N, scale=layer.N**-0.5)
    biases = (
        (draw(layer.E, rows, scale=0.1), draw(layer.E, layer.K, scale=0.1)) if layer.bias else (None, None)
    )  # fmt: skip
    kind: dict[str, Any] = {
        "gate_up_bias": biases[0], "down_bias": biases[1], "activation": layer.activation,
        "interleaved": layer.interleaved,
    }  # fmt: skip
    if form := _FORMS.get(dtype):
        return ExpertWeights.quantize(gate_up, down, **kind, form=form)
    if transposed:
        gate_up, down = (weight.mT.contiguous().mT for weight in (gate_up, down))
    return ExpertWeights(gate_up, down, **kind, transposed=transposed)


def torch_dtype(name: DType) -> "torch.dtype":
    """``"bf16"`` -> ``torch.bfloat16``; of MXFP4 that of the bytes."""
    import torch

    dtypes: dict[DType, torch.dtype] = {
        "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn,
        "fp8_channel": torch.float8_e4m3fn, "mxfp4": torch.uint8,
    }  # fmt: skip
    return dtypes[name]


@dataclass(frozen=True)
class RoutingDistribution:
    """How tokens spread over experts.

    Attributes:
        name: A name such as ``"uniform"``, ``"dirichlet-4"`` or ``"one-hot"``.
        skew: The factor f: expert shares are drawn from the symmetric Dirichlet distribution whose expected effective
            number of experts, 1/Σp², is E/f. 1 is uniform.
        hot: Whether one expert is chosen by every token.
        zipf: The exponent s: the share of the expert at rank r, in an order drawn anew, is proportional to r^-s. 0 is
            uniform.
        dead: The part of the experts that no token chooses; at least topk of them are left.
    """

    name: str
    skew: float = 1.0
    hot: bool = False
    zipf: float = 0.0
    dead: float = 0.0

    def sample(
        self, M: int, E: int, topk: int, device: "torch.device | str", generator: "torch.Generator | None" = None
    ) -> "tuple[Tensor, Tensor]":
        """Draw a routing: fp32 weights ``[M, topk]`` that sum to 1, int32 ids ``[M, topk]``, distinct in each row.

        Raises:
            InvalidInputError: There are fewer experts than are to be chosen.
        """
        import torch

        if topk > E:
            raise InvalidInputError(f"topk={topk} distinct experts cannot be drawn from E={E}")
        # Drawn on the CPU: the same seed gives the same routing on every device.
        on_host: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        logits = self._log_shares(E, generator)
        if self.dead:
            drawn = torch.randperm(E, generator=generator, device="cpu")
            logits[drawn[: min(int(self.dead * E), E - topk)]] = -torch.inf
        logits = logits.expand(M, E)
        noise = torch.rand(M, E, generator=generator, **on_host).clamp_(min=1e-20).log_().neg_().log_().neg_()  # Gumbel
        scores = logits + noise
        if self.hot:
            scores[:, 0] = torch.inf
        ids = scores.topk(topk, dim=1).indices
        if self.hot:
            ids = ids[:, torch.randperm(topk, generator=generator, device="cpu")]
        weights = torch.rand(M, topk, generator=generator, **on_host) + 0.1
        weights /= weights.sum(dim=1, keepdim=True)
        return weights.to(device), ids.to(device=device, dtype=torch.int32)

    def _log_shares(self, E: int, generator: "torch.Generator | None") -> "Tensor":
        import torch

        if self.zipf:
            ranks = torch.randperm(E, generator=generator, device="cpu") + 1
            return ranks.log() * -self.zipf
        if self.skew <= 1.0 or E == 1:
            return torch.zeros(E, dtype=torch.float32, device="cpu")
        # E[Σp²] of a symmetric Dirichlet is (α + 1)/(E·α + 1), and its inverse is to be E/f.
        alpha = max((E / self.skew - 1) / (E * (1 - 1 / self.skew)), 1e-3)
        gamma = torch._standard_gamma(torch.full((E,), alpha, dtype=torch.float32, device="cpu"), generator=generator)
        return (gamma / gamma.sum()).clamp_(min=1e-30).log_()


ROUTINGS: Final[dict[str, RoutingDistribution]] = {
    routing.name: routing
    for routing in (
        RoutingDistribution("uniform"),
        RoutingDistribution("dirichlet-2", skew=2.0),
        RoutingDistribution("dirichlet-4", skew=4.0),
        RoutingDistribution("one-hot", hot=True),
        RoutingDistribution("zipf", zipf=1.0),
        RoutingDistribution("half-dead", dead=0.5),
    )
}
