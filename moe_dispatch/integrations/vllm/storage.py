"""How one of vLLM's methods stores a layer's weights, as one of our dtypes."""

from typing import Any, Final

from moe_dispatch.errors import InvalidInputError
from moe_dispatch.problem import QUANT_BLOCK, DType

_PLAIN: Final[dict[str, DType]] = {"bfloat16": "bf16", "float16": "fp16"}
# Methods whose weights are e4m3 in our layout once `fp8_backend` is Triton's.
_FP8_METHODS: Final = ("Fp8MoEMethod", "CompressedTensorsW8A8Fp8MoEMethod")
# What a log line calls them.
FORMS: Final[dict[str, str]] = {
    "bf16": "bfloat16", "fp16": "float16", "fp8": "block FP8", "fp8_channel": "FP8 scaled by row or tensor",
}  # fmt: skip


def stored_dtype(moe_config: Any, method: Any) -> DType:
    """The dtype of the `ExpertWeights` that a layer's tensors make, by its `FusedMoEConfig` and quantisation method.

    Raises:
        InvalidInputError: They make none; the message says why.
    """
    kind = type(method).__name__
    if kind == "UnquantizedFusedMoEMethod":
        name = str(moe_config.in_dtype).removeprefix("torch.")
        if name not in _PLAIN:
            raise InvalidInputError(f"weights in {name}; ours are {', '.join(FORMS.values())}")
        return _PLAIN[name]
    if kind not in _FP8_METHODS:
        raise InvalidInputError(f"weights stored by {kind} are none of {', '.join(FORMS.values())}")
    static = getattr(method, "static_input_scales", False)
    static |= getattr(getattr(method, "quant_config", None), "activation_scheme", "dynamic") == "static"
    if static:
        raise InvalidInputError("FP8 with static scales of activations, which the backends quantise for each token")
    block = getattr(method, "moe_block_shape", None) or getattr(method, "weight_block_size", None)
    if not block:
        return "fp8_channel"
    if list(block) != [QUANT_BLOCK, QUANT_BLOCK]:
        raise InvalidInputError(f"FP8 weights are scaled by {block}, and ours by {QUANT_BLOCK}×{QUANT_BLOCK} blocks")
    N = moe_config.intermediate_size_per_partition
    if N % QUANT_BLOCK:
        raise InvalidInputError(f"N={N} is no multiple of {QUANT_BLOCK}, so scale blocks straddle the shards")
    return "fp8"
