"""The activations between an expert's two products, each as a string.

A string is a table's key, an argument of the torch operator and a constant of a kernel alike. It is a name of
`ACTIVATIONS`, or a SwiGLU with parameters of its own, such as ``"swiglu(limit=10)"``. Two strings of the same function
have the same canonical form, which is a name wherever there is one: ``"swiglu(alpha=1.702,limit=7,shift=1)"`` is
``"swiglu_oai"``.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Final, Self

from moe_dispatch.errors import InvalidInputError

FP32_LIMIT: Final = 3.4e38  # Just below the largest fp32 number: every smaller magnitude is finite in fp32.

Activation = str

ACTIVATIONS: Final[tuple[Activation, ...]] = ("silu", "gelu", "gelu_tanh", "swiglu_oai", "relu2")
UNGATED: Final[frozenset[Activation]] = frozenset({"relu2"})
SWIGLU: Final = "swiglu"
# What a backend can declare to compute: the names, and every SwiGLU whose parameters have no name.
KINDS: Final[frozenset[str]] = frozenset({*ACTIVATIONS, SWIGLU})


@dataclass(frozen=True)
class SwiGLU:
    """A gated SiLU with parameters: (cap(up, up_cap) + shift) · cap(gate, gate_cap) · sigmoid(alpha · gate).

    gpt-oss has alpha, limit and shift (openai/gpt-oss, `swiglu`); DeepSeek-V4, GLM-5-next and HY-V4 have a limit alone;
    Inkling2 has the two caps. All arithmetic is in fp32.

    Attributes:
        alpha: Multiplies the gate within the sigmoid; positive.
        limit: The gate is clamped from above, and up from both sides, before all else; None without clamps.
        shift: Is added to up after its cap.
        gate_cap: Caps the gate as a factor, not within the sigmoid: cap(x, c) is c · tanh(x / c); None without a cap.
        up_cap: Caps up likewise.
    """

    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0
    gate_cap: float | None = None
    up_cap: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < FP32_LIMIT:
                raise InvalidInputError(f"{field.name} of {SWIGLU} must be a finite number, got {value!r}")
            if field.name != "shift" and value <= 0:
                raise InvalidInputError(f"{field.name} of {SWIGLU} must be positive, got {value!r}")
            object.__setattr__(self, field.name, float(value))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``swiglu(name=value,…)``; parameters that are left out have their defaults.

        Raises:
            InvalidInputError: It is not of that form, or a value is out of range.
        """
        match = re.fullmatch(rf"{SWIGLU}\((.*)\)", text.strip())
        try:
            pairs = [part.split("=") for part in match[1].split(",") if part.strip()] if match else []
            values = {name.strip(): float(number) for name, number in pairs}
        except ValueError:
            match = None
        if match is None or len(values) < len(pairs) or not values.keys() <= {*_PARAMETERS}:
            raise InvalidInputError(f"activation must be one of {allowed()}, got {text[:80]!r}")
        return cls(**values)

    def __str__(self) -> str:
        """The canonical string; what differs from the defaults is in it, in the order of the attributes."""
        if self in _NAMED:
            return _NAMED[self]
        values = ((field.name, getattr(self, field.name), field.default) for field in dataclasses.fields(self))
        pairs = (f"{name}={repr(value).removesuffix('.0')}" for name, value, default in values if value != default)
        return f"{SWIGLU}({','.join(pairs)})"


SWIGLU_OAI: Final = SwiGLU(alpha=1.702, limit=7.0, shift=1.0)
_NAMED: Final = {SwiGLU(): "silu", SWIGLU_OAI: "swiglu_oai"}
_PARAMETERS: Final = tuple(field.name for field in dataclasses.fields(SwiGLU))

# By what was written: its canonical form. And by the canonical form: its parameters.
_canonical: Final[dict[str, Activation]] = {name: name for name in ACTIVATIONS}
_parameters: Final[dict[Activation, SwiGLU]] = {name: parameters for parameters, name in _NAMED.items()}


def canonical(activation: Activation) -> Activation:
    """The one string of an activation.

    Raises:
        InvalidInputError: It is none of `ACTIVATIONS` and no SwiGLU with parameters; the message lists what is.
    """
    if not isinstance(activation, str):
        raise InvalidInputError(f"activation must be one of {allowed()}, got {activation!r}")
    known = _canonical.get(activation)
    if known is None:
        parameters = SwiGLU.parse(activation)
        known = str(parameters)
        _parameters[known] = parameters
        _canonical[activation] = _canonical[known] = known
    return known


def kind(activation: Activation) -> str:
    """Which of `KINDS` a canonical activation is."""
    return activation if activation in ACTIVATIONS else SWIGLU


def swiglu(activation: Activation) -> SwiGLU | None:
    """The parameters of an activation that is a SwiGLU, by whatever string; None for the others."""
    return _parameters.get(canonical(activation))


def allowed() -> str:
    """All activations, for a message."""
    return f"{', '.join(ACTIVATIONS)} or {SWIGLU}({', '.join(f'{name}=…' for name in _PARAMETERS)})"
