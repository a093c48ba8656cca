"""vLLM's activations, with the parameters that a model gives them, as ours."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from moe_dispatch.activations import SwiGLU, swiglu
from moe_dispatch.errors import InvalidInputError

# Attributes of vLLM's `FusedMoEConfig`, those that the release has, and the parameters of `SwiGLU` that they are.
_PARAMETERS: Final[Mapping[str, str]] = {
    "swiglu_limit": "limit", "swiglu_alpha": "alpha", "swiglu_beta": "shift",
    "activation_situ_beta": "gate_cap", "activation_situ_linear_beta": "up_cap",
}  # fmt: skip


@dataclass(frozen=True)
class _Gate:
    """What vLLM computes under one of its names (`apply_moe_activation` of vLLM).

    Attributes:
        activation: Ours, without the parameters.
        interleaved: Whether gate and up rows alternate.
        reads: The attributes of `_PARAMETERS` that vLLM reads for it.
        needs: The one among them without which vLLM computes nothing.
    """

    activation: str
    interleaved: bool = False
    reads: tuple[str, ...] = ()
    needs: str = ""


_GATES: Final[Mapping[str, _Gate]] = {
    "silu": _Gate("silu", reads=("swiglu_limit",)),
    "gelu": _Gate("gelu"),
    "gelu_tanh": _Gate("gelu_tanh"),
    "swigluoai": _Gate("swiglu_oai", interleaved=True),
    "swigluoai_uninterleave": _Gate(
        "silu", reads=("swiglu_limit", "swiglu_alpha", "swiglu_beta"), needs="swiglu_limit"
    ),
    "situ": _Gate("silu", reads=("activation_situ_beta", "activation_situ_linear_beta"), needs="activation_situ_beta"),
    "relu2_no_mul": _Gate("relu2"),
}
VLLM_ACTIVATIONS: Final = frozenset(_GATES)


def gate_of(moe_config: Any) -> tuple[str, bool]:
    """Our activation for vLLM's `FusedMoEConfig` of a layer, and whether its gate and up rows alternate.

    Raises:
        InvalidInputError: None of ours computes the same; the message says which parameter stands against it.
    """
    name = moe_config.activation.value
    gate = _GATES.get(name)
    if gate is None:
        raise InvalidInputError(f"activation {name!r}; ours are {', '.join(sorted(_GATES))}")
    values = {key: value for key in _PARAMETERS if (value := getattr(moe_config, key, None)) is not None}
    built_in = swiglu(gate.activation)
    for key, value in values.items():
        if key not in gate.reads and value != getattr(built_in, _PARAMETERS[key], None):
            raise InvalidInputError(f"{key}={value} is not built into activation {name!r}")
    if gate.needs and gate.needs not in values:
        raise InvalidInputError(f"activation {name!r} needs {gate.needs}")
    parameters = {_PARAMETERS[key]: values[key] for key in gate.reads if key in values}
    return (str(SwiGLU(**parameters)) if parameters else gate.activation), gate.interleaved
