"""One MoE layer call as data, without its tensors.

The shape letters, used everywhere and defined here:

    M     tokens in the call
    K     hidden size: columns of ``hidden_states`` and of the output
    N     intermediate size of one expert
    E     experts held by this process
    topk  experts chosen per token, by a router that may know more experts than these
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, get_args

from moe_dispatch.activations import UNGATED, Activation, canonical
from moe_dispatch.errors import InvalidInputError

DType = Literal["bf16", "fp16", "fp32", "fp8", "fp8_channel", "mxfp4"]
Mode = Literal["eager", "graph"]

DTYPES: Final[tuple[DType, ...]] = get_args(DType)
FP8_DTYPES: Final[frozenset[DType]] = frozenset({"fp8", "fp8_channel"})  # e4m3 weights with multipliers
QUANTIZED_DTYPES: Final[frozenset[DType]] = FP8_DTYPES | {"mxfp4"}  # weights that are codes with multipliers
QUANT_BLOCK: Final = 128  # DeepSeek's block FP8: one scale per 128×128 weights, per 1×128 activations
MX_BLOCK: Final = 32  # MXFP4: one scale per 32 weights of a row
ELEMENT_BYTES: Final[dict[DType, int]] = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1, "fp8_channel": 1}


def stored_bytes(dtype: DType, elements: int) -> int:
    """Bytes of weights; with their scales in MXFP4, where those are a byte for 32 weights, and without elsewhere."""
    return elements * (MX_BLOCK // 2 + 1) // MX_BLOCK if dtype == "mxfp4" else elements * ELEMENT_BYTES[dtype]


@dataclass(frozen=True)
class MoEProblem:
    """One MoE layer call as the policies and backends see it: hashable, tensor-free.

    Attributes:
        M: Tokens.
        K: Hidden size.
        N: Intermediate size per expert.
        E: Experts.
        topk: Experts per token.
        dtype: The weights' dtype. ``"fp8"`` is DeepSeek's block FP8: e4m3 with a scale per 128×128 weights, and per
            token and 128 columns of activations. ``"fp8_channel"`` is e4m3 with a scale per output row of a weight, and
            per token of activations. ``"mxfp4"`` is the OCP's: E2M1 codes of four bits with a power of two per 32
            weights of a row, and activations that are not quantised.
        act_dtype: The dtype of ``hidden_states`` and the output. Equal to ``dtype`` unless the weights are quantised.
        activation: ``"silu"``, ``"gelu"`` and ``"gelu_tanh"`` gate as act(gate) * up; ``"swiglu_oai"`` is gpt-oss's
            clamped (up + 1) * gate * sigmoid(1.702 * gate); ``"relu2"`` has no gate (Nemotron). A gate with parameters
            of its own is a string such as ``"swiglu(limit=10)"``, see `moe_dispatch.activations.SwiGLU`.
        bias: Whether both projections add a bias.
        interleaved: Whether gate and up rows alternate (gpt-oss) instead of gate rows first.
        transposed: Whether each expert's matrices are stored by columns, as ``[K, 2N]`` and ``[N, K]`` (the checkpoints
            of gpt-oss), and to be read in place.
        device: ``"cuda"`` or ``"cpu"``.
        capability: CUDA compute capability, None on a CPU.
        mode: ``"graph"`` while a CUDA graph is captured.
        needs_grad: Whether torch must be able to differentiate the backend's own operations, as forward mode and second
            derivatives do. A call that is recorded for a backward is a problem without.
        routed_experts: Experts among which the router chooses, where the E experts here are a part of them, as under
            expert parallelism; None where they are all. Of the M·topk slots only the part E / routed_experts is
            expected to have an expert here.
    """

    M: int
    K: int
    N: int
    E: int
    topk: int
    dtype: DType = "bf16"
    act_dtype: DType = "bf16"
    activation: Activation = "silu"
    bias: bool = False
    interleaved: bool = False
    transposed: bool = False
    device: str = "cuda"
    capability: tuple[int, int] | None = (9, 0)
    mode: Mode = "eager"
    needs_grad: bool = False
    routed_experts: int | None = None

    def __post_init__(self) -> None:
        for letter, least in (("M", 0), ("K", 1), ("N", 1), ("E", 1), ("topk", 1)):
            self._check_size(letter, least)
        if self.dtype not in DTYPES:
            raise InvalidInputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.act_dtype not in DTYPES or self.act_dtype in QUANTIZED_DTYPES:
            raise InvalidInputError(f"act_dtype must be bf16, fp16 or fp32, got {self.act_dtype!r}")
        if self.dtype != self.act_dtype and not self.quantized:
            raise InvalidInputError(
                f"hidden_states ({self.act_dtype}) and weights ({self.dtype}) must share a dtype unless the weights "
                "are FP8 or MXFP4; convert one of them"
            )
        object.__setattr__(self, "activation", canonical(self.activation))
        for name in ("bias", "interleaved", "transposed", "needs_grad"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInputError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.interleaved and not self.gated:
            raise InvalidInputError(f"interleaved rows need a gate, and {self.activation!r} has none")
        if self.mode not in get_args(Mode):
            raise InvalidInputError(f"mode must be eager or graph, got {self.mode!r}")
        if self.device not in ("cuda", "cpu"):
            raise InvalidInputError(f"device must be cuda or cpu, got {self.device!r}")
        if self.routed_experts is not None and (type(self.routed_experts) is not int or self.routed_experts < self.E):
            raise InvalidInputError(
                f"routed_experts must be None or an integer of at least E={self.E}, got {self.routed_experts!r}"
            )
        if self.capability is not None and not _is_capability(self.capability):
            raise InvalidInputError(f"capability must be a pair such as (9, 0), or None, got {self.capability!r}")

    def _check_size(self, letter: str, least: int) -> None:
        value = getattr(self, letter)
        if type(value) is not int or value < least:
            raise InvalidInputError(f"{letter} must be an integer of at least {least}, got {letter}={value!r}")

    @property
    def fp8(self) -> bool:
        """Whether the weights are FP8 in any form."""
        return self.dtype in FP8_DTYPES

    @property
    def quantized(self) -> bool:
        """Whether the weights are codes with multipliers: FP8 or MXFP4."""
        return self.dtype in QUANTIZED_DTYPES

    @property
    def has_fp8_products(self) -> bool:
        """Whether the device multiplies e4m3, as from compute capability 8.9 on; True where it is not known."""
        return self.capability is None or self.capability >= (8, 9)

    @property
    def gated(self) -> bool:
        """Whether ``gate_up`` holds gate and up rows (2N) or up rows only (N)."""
        return self.activation not in UNGATED

    @property
    def gate_up_rows(self) -> int:
        """Rows of one expert's first projection: 2N, or N where there is no gate."""
        return 2 * self.N if self.gated else self.N

    @property
    def slots(self) -> int:
        """Token-expert pairs, M·topk, those of experts elsewhere included: any of them may have its expert here."""
        return self.M * self.topk

    @cached_property
    def expected_slots(self) -> float:
        """Slots whose expert is one of the E under uniform routing: M·topk·E / routed_experts."""
        slots = self.M * self.topk
        return slots if self.routed_experts is None else slots * self.E / self.routed_experts

    @cached_property
    def layer(self) -> "MoEProblem":
        """The same layer with M=1, eager, without gradients: the part that is fixed while a model serves."""
        return self._with(M=1, mode="eager", needs_grad=False)

    @property
    def bucket(self) -> "MoEProblem":
        """The same problem with M rounded up to a power of two, for which a quarantine holds."""
        bucket = self.eager_bucket
        return bucket if self.mode == "eager" else bucket._with(mode=self.mode)

    @property
    def eager_bucket(self) -> "MoEProblem":
        """The bucket of eager calls. A first run is one, so what it proves or kills holds for CUDA graphs as well."""
        rounded, buckets = 1 << max(self.M - 1, 0).bit_length(), self.layer._buckets
        key = rounded, self.needs_grad
        if (bucket := buckets.get(key)) is None:
            bucket = buckets.setdefault(key, self._with(M=rounded, mode="eager"))
        return bucket

    @cached_property
    def _buckets(self) -> "dict[tuple[int, bool], MoEProblem]":
        """Of a layer: the buckets of eager calls through it."""
        return {}

    @cached_property
    def met(self) -> set[object]:
        """Of a layer: what its calls are known to meet whatever their M, such as a backend's `Requirements`."""
        return set()

    def __reduce__(self) -> "tuple[type[MoEProblem], tuple[object, ...]]":
        """The fields alone: what is known about them stays in this process."""
        return MoEProblem, tuple(self._fields.values())

    def with_tokens(self, M: int) -> "MoEProblem":
        """The same call with M tokens. It shares what is the same for every token count, so that this costs little."""
        other = object.__new__(MoEProblem)
        vars(other).update(self._fields, M=M, layer=self.layer)
        if type(M) is not int or M < 0:
            other._check_size("M", 0)
        return other

    @cached_property
    def whole_layer(self) -> "MoEProblem":
        """A call to a layer of all its experts that has the load which this call expects; itself if it holds them all.

        Each token has the experts that it is expected to have here. Where those are no whole number, topk is rounded
        down to one, at least 1, and M follows.
        """
        if self.routed_experts is None:
            return self
        topk = max(1, self.topk * self.E // self.routed_experts)
        M = math.ceil(self.expected_slots / topk)
        return dataclasses.replace(self, M=M, topk=topk, routed_experts=None)

    def _with(self, **values: object) -> "MoEProblem":
        """A copy with other valid values of some fields: they are not checked again, which `replace` would do."""
        other = object.__new__(MoEProblem)
        vars(other).update(self._fields, **values)
        return other

    @cached_property
    def _fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights as `stored_bytes` counts them."""
        return stored_bytes(self.dtype, (self.gate_up_rows + self.N) * self.K)

    @property
    def rows_bytes(self) -> int:
        """Bytes of the rows that a layer computes for its slots: of both products and, between them, the activation."""
        return self.slots * (self.gate_up_rows + self.N + self.K) * ELEMENT_BYTES[self.act_dtype]

    @property
    def flops(self) -> float:
        """Multiply-adds of the two products, counted as two operations each, for the expected slots."""
        return 2 * self.expected_slots * self.K * (self.gate_up_rows + self.N)

    @cached_property
    def expected_experts(self) -> float:
        """Experts that get a token under uniform routing: E·(1 − (1 − topk/routed_experts)^M)."""
        share = min(1.0, self.topk / (self.routed_experts or self.E))
        return self.E * (1.0 - (1.0 - share) ** self.M)

    def roofline_us(self, bandwidth: float, flops: float, experts: float | None = None) -> float:
        """The roofline in µs: reading the hit experts' weights once, or the arithmetic, whichever takes longer.

        Args:
            bandwidth: Sustained bytes per second.
            flops: Sustained operations per second for this dtype.
            experts: Experts that were hit; the expectation under uniform routing if None.
        """
        hit = self.expected_experts if experts is None else experts
        return 1e6 * max(hit * self.expert_bytes / bandwidth, self.flops / flops)

    @property
    def scale_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of one expert's scales where the weights are quantised: (gate_up, down)."""
        return scale_shape(self.dtype, self.gate_up_rows, self.K), scale_shape(self.dtype, self.K, self.N)


def scale_shape(dtype: DType, rows: int, columns: int) -> tuple[int, ...]:
    """Shape of the scales of one expert's quantised weight of so many rows and columns."""
    if dtype == "mxfp4":
        return rows, columns // MX_BLOCK
    if dtype == "fp8_channel":
        return (rows,)
    return math.ceil(rows / QUANT_BLOCK), math.ceil(columns / QUANT_BLOCK)


def _is_capability(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(type(part) is int for part in value)
