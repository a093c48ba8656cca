"""Generators of calls: layers, routings and tokens that are right, and what may be put in place of each argument.

Tensors are drawn as a few numbers and a seed, and made when the test runs, so that Hypothesis can reduce them.
"""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from moe_dispatch import ExpertWeights
from moe_dispatch.workloads import torch_dtype
from tests.attack.oracle import SWIGLU, Layer
from tests.support.ambient import default_dtype

FP8_FORMS: Final = ("fp8", "fp8_channel")
DTYPES: Final = ("fp32", "fp16", "bf16", *FP8_FORMS)
Make = Callable[[Tensor], object]


@dataclass(frozen=True)
class LayerShape:
    """A layer to be made: the letters of `MoEProblem`, dtype and options, and the seed of its values."""

    dtype: str
    E: int
    K: int
    N: int
    activation: str
    bias: bool
    interleaved: bool
    seed: int

    @property
    def rows(self) -> int:
        """Rows of gate_up."""
        return self.N if self.activation == "relu2" else 2 * self.N


@dataclass(frozen=True)
class CallShape:
    """A call to be made; `ids`, `spoilt` are names of entries of `IDS`, `SPOILT`, and `scale` is of hidden_states."""

    layer: LayerShape
    M: int
    topk: int
    act_dtype: str
    weights_dtype: str
    ids_dtype: torch.dtype
    ids: str
    scale: float
    spoilt: str
    seed: int


@dataclass
class Call:
    """The arguments of a call, and the layer as the oracle takes it."""

    hidden_states: Any
    experts: Any
    topk_weights: Any
    topk_ids: Any
    layer: Layer

    @property
    def arguments(self) -> tuple[Any, Any, Any, Any]:
        return self.hidden_states, self.experts, self.topk_weights, self.topk_ids


seeds = st.integers(0, 1 << 16)


@st.composite
def layer_shapes(draw: st.DrawFn, dtypes: tuple[str, ...] = DTYPES) -> LayerShape:
    """Layers that are valid, with sizes on both sides of what kernels like."""
    activation = draw(st.sampled_from(["silu", "silu", "gelu", "gelu_tanh", "relu2", *SWIGLU]))
    return LayerShape(
        dtype=draw(st.sampled_from(dtypes)),
        E=draw(st.sampled_from([1, 2, 4, 7])),
        K=draw(st.sampled_from([1, 8, 16, 33, 128, 136])),
        N=draw(st.sampled_from([1, 8, 16, 31, 130])),
        activation=activation,
        bias=draw(st.booleans()),
        interleaved=activation != "relu2" and draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )


@st.composite
def call_shapes(draw: st.DrawFn, layers: st.SearchStrategy[LayerShape] | None = None) -> CallShape:
    layer = draw(layers or layer_shapes())
    return CallShape(
        layer=layer,
        M=draw(st.sampled_from([1, 0, 2, 3, 5, 17])),
        topk=draw(st.integers(1, 4)),
        act_dtype=draw(st.sampled_from(["bf16", "fp16", "fp32"])) if layer.dtype in FP8_FORMS else layer.dtype,
        weights_dtype=draw(st.sampled_from(["fp32", "fp32", "bf16", "fp16"])),
        ids_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        ids=draw(st.sampled_from(sorted(IDS))),
        scale=draw(st.sampled_from([1.0, 1e-3, 30.0, 0.0])),
        spoilt=draw(st.sampled_from(["nothing", "nothing", *sorted(SPOILT)])),
        seed=draw(seeds),
    )


@functools.lru_cache(maxsize=512)
def make_layer(shape: LayerShape) -> tuple[ExpertWeights, Layer]:
    """The weights of a layer, for the package and for the oracle."""
    layer = draw_layer(shape)
    return wrap(layer), layer


def draw_layer(shape: LayerShape) -> Layer:
    generator = torch.Generator().manual_seed(shape.seed)

    def normal(*size: int, scale: float) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu") * scale

    gate_up = normal(shape.E, shape.rows, shape.K, scale=shape.K**-0.5)
    down = normal(shape.E, shape.K, shape.N, scale=shape.N**-0.5)
    biases = (normal(shape.E, shape.rows, scale=0.1), normal(shape.E, shape.K, scale=0.1)) if shape.bias else None
    scales = None
    if shape.dtype == "fp8":
        blocks = [(shape.E, -(-tensor.shape[1] // 128), -(-tensor.shape[2] // 128)) for tensor in (gate_up, down)]
        scales = (normal(*blocks[0], scale=0.1).abs() + 0.01, normal(*blocks[1], scale=0.1).abs() + 0.01)
    if shape.dtype == "fp8_channel":
        sizes = [tuple(tensor.shape[:2]) for tensor in (gate_up, down)]
        scales = (normal(*sizes[0], scale=0.1).abs() + 0.01, normal(*sizes[1], scale=0.1).abs() + 0.01)
    dtype = torch_dtype(shape.dtype)  # type: ignore[arg-type]  # one of DTYPES
    return Layer(gate_up.to(dtype), down.to(dtype), scales, biases, shape.activation, shape.interleaved)


def wrap(layer: Layer, **changes: Any) -> ExpertWeights:
    """The layer as the package takes it, with some of the arguments changed."""
    arguments: dict[str, Any] = {
        "gate_up": layer.gate_up, "down": layer.down, "activation": layer.activation, "interleaved": layer.interleaved,
    }  # fmt: skip
    for names, tensors in (
        (("gate_up_scale", "down_scale"), layer.scales),
        (("gate_up_bias", "down_bias"), layer.biases),
    ):
        if tensors is not None:
            arguments |= dict(zip(names, tensors, strict=True))
    return ExpertWeights(**arguments | changes)


def make_call(shape: CallShape) -> Call:
    """Fresh tensors of a call; the layer may be shared with other calls."""
    experts, layer = make_layer(shape.layer)
    generator = torch.Generator().manual_seed(shape.seed)
    size = (shape.M, shape.topk)
    hidden = torch.randn(shape.M, shape.layer.K, generator=generator, dtype=torch.float32, device="cpu") * shape.scale
    weights = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
    ids = IDS[shape.ids](size, shape.layer.E, generator).to(shape.ids_dtype)
    # What a foreign id weighs must not matter.
    weights[(ids < 0) | (ids >= shape.layer.E)] = torch.nan
    if shape.spoilt in SPOILT:
        SPOILT[shape.spoilt](hidden, weights)
    return Call(
        hidden.to(torch_dtype(shape.act_dtype)),  # type: ignore[arg-type]  # of DTYPES
        experts,
        weights.to(torch_dtype(shape.weights_dtype)),  # type: ignore[arg-type]
        ids,
        layer,
    )


SMALL_CALL: Final = CallShape(
    layer=LayerShape("fp32", E=4, K=16, N=16, activation="silu", bias=False, interleaved=False, seed=0),
    M=3, topk=2, act_dtype="fp32", weights_dtype="fp32", ids_dtype=torch.int32, ids="uniform", scale=1.0,
    spoilt="nothing", seed=0,
)  # fmt: skip


def _uniform(size: tuple[int, int], E: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, E, size, generator=generator, device="cpu")


def _foreign(size: tuple[int, int], E: int, generator: torch.Generator) -> Tensor:
    outside = torch.tensor([-1, E, E + 1, -(1 << 31), (1 << 31) - 1], device="cpu")
    return outside[torch.randint(0, 5, size, generator=generator, device="cpu")]


def _mixed(size: tuple[int, int], E: int, generator: torch.Generator) -> Tensor:
    ours = torch.rand(size, generator=generator, device="cpu") < 0.5
    return torch.where(ours, _uniform(size, E, generator), _foreign(size, E, generator))


IDS: Final[Mapping[str, Callable[[tuple[int, int], int, torch.Generator], Tensor]]] = {
    "uniform": _uniform,
    "foreign": _foreign,
    "mixed": _mixed,
    "the first expert": lambda size, *_: torch.zeros(size, dtype=torch.int64, device="cpu"),
    "the last expert": lambda size, E, *_: torch.full(size, E - 1, dtype=torch.int64, device="cpu"),
}


def _fill_first(tensor: Tensor, value: float) -> None:
    tensor[:1, :1] = value


SPOILT: Final[Mapping[str, Callable[[Tensor, Tensor], None]]] = {
    "NaN in a token": lambda hidden, _: _fill_first(hidden, torch.nan),
    "Inf in a token": lambda hidden, _: _fill_first(hidden, torch.inf),
    "NaN for a weight": lambda _, weights: _fill_first(weights, torch.nan),
    "Inf for a weight": lambda _, weights: _fill_first(weights, -torch.inf),
}


# In place of a two-dimensional tensor: the same values in another form, which must give the same answer.


class Subclass(Tensor):
    """A subclass without a dispatch of its own, such as those that carry a name or a loader of weights."""


def _strided(tensor: Tensor) -> Tensor:
    wide = tensor.new_zeros(tensor.shape[0], 2 * tensor.shape[1])
    wide[:, ::2] = tensor
    return wide[:, ::2]


def _offset(tensor: Tensor) -> Tensor:
    flat = tensor.new_zeros(tensor.numel() + 1)
    flat[1:] = tensor.reshape(-1)
    return flat[1:].view(tensor.shape)


def _inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


ALIKE: Final[Mapping[str, Make]] = {
    "itself": lambda tensor: tensor,
    "column-major": lambda tensor: tensor.T.contiguous().T,
    "strided": _strided,
    "offset": _offset,
    "of a larger buffer": lambda tensor: torch.cat([tensor, tensor])[: tensor.shape[0]],
    "a subclass": lambda tensor: tensor.as_subclass(Subclass),
    "a parameter": lambda tensor: torch.nn.Parameter(tensor, requires_grad=False),
    "made in inference mode": _inference,
    "with a gradient": lambda tensor: tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor,
    "read-only from numpy": lambda tensor: (
        torch.from_numpy(tensor.numpy().copy()) if tensor.dtype != torch.bfloat16 else tensor
    ),
}


# In place of any tensor: what must be refused.

FOREIGN: Final[Mapping[str, Make]] = {
    "None": lambda _: None,
    "a number": lambda _: 5,
    "a text": lambda _: "hidden_states",
    "a list": lambda tensor: tensor.tolist(),
    "an array": lambda tensor: tensor.float().numpy(),
    "an empty tuple": lambda _: (),
    "a class": lambda _: Tensor,
    "a structured array": lambda _: np.zeros(3, dtype=[("a", "f4")]),
    "one dimension": lambda tensor: tensor.reshape(-1),
    "no dimension": lambda tensor: torch.zeros((), dtype=tensor.dtype),
    "one dimension more": lambda tensor: tensor[None],
    "one row more": lambda tensor: torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])]),
    "one column more": lambda tensor: torch.cat([tensor, tensor.new_zeros(*tensor.shape[:-1], 1)], dim=-1),
    "no columns": lambda tensor: tensor[:, :0],
    "double": lambda tensor: tensor.double(),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "boolean": lambda tensor: tensor != 0,
    "bytes": lambda tensor: torch.zeros(tensor.shape, dtype=torch.uint8),
    "sparse": lambda tensor: tensor.to_sparse(),
    "compressed": lambda tensor: tensor.float().to_sparse_csr(),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor.float(), tensor.float()]),
    "jagged": lambda tensor: torch.nested.nested_tensor([tensor.float(), tensor.float()], layout=torch.jagged),
    "on the meta device": lambda tensor: tensor.to("meta"),
    "uninitialized": lambda _: torch.nn.UninitializedParameter(),
    "an uninitialized buffer": lambda _: torch.nn.UninitializedBuffer(),
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
    "masked": lambda tensor: torch.masked.masked_tensor(tensor.float(), tensor.float() > 0),
    "a proxy": lambda _: torch.fx.Proxy(torch.fx.Graph().placeholder("x")),
}


# The state that a program has set torch to.


class _Deterministic(AbstractContextManager[object]):
    """Deterministic algorithms alone, and uninitialised memory filled with NaN, for a while."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


AMBIENT: Final[Mapping[str, Callable[[], AbstractContextManager[object]]]] = {
    "none": nullcontext,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "a default device": lambda: torch.device("meta"),
    "double by default": lambda: default_dtype(torch.float64),
    "BF16 by default": lambda: default_dtype(torch.bfloat16),
    "deterministic": _Deterministic,
}


# Values of any type, for arguments that are no tensors.

SCALARS: Final = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 70), 1 << 70), st.floats(), st.text(max_size=20),
    st.binary(max_size=8), st.sampled_from([
        [], {}, (), object, ..., [1], ["reference"], {"a": 1}, 1j, b"", "x" * 5000, "a\0b",
        "\ud800",
    ]),
)  # fmt: skip
