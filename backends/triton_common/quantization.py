"""What a product with quantised weights reads on a device: codes on both sides, or codes and plain activations.

Imports no Triton, so that a machine without it can still ask.
"""

import functools
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from moe_dispatch.backends.triton_common.features import fp8_products
from moe_dispatch.numerics import FP8
from moe_dispatch.problem import ELEMENT_BYTES, DType, MoEProblem

Scales = Literal["none", "block", "channel", "mx"]


@dataclass(frozen=True)
class Quantization:
    """How the operands of both products are stored.

    Attributes:
        scales: Which weights share a multiplier: ``"block"`` for 128×128 of them, ``"channel"`` for an output row,
            ``"mx"`` for 32 of a row (MXFP4, whose activations are never quantised), ``"none"`` where the weights are
            not quantised. Activations share one alike, where they are quantised: per token and 128 columns, or per
            token.
        activations: Whether activations are quantised too, so that the product itself is one of e4m3 codes (W8A8).
            Where they are not (W8A16), the kernel turns codes of weights into the activations' dtype, which is exact.
    """

    scales: Scales = "none"
    activations: bool = False

    @property
    def dequantizes(self) -> bool:
        """Whether the kernel turns codes of weights into the activations' dtype before it multiplies (W8A16)."""
        return self.scales != "none" and not self.activations

    @property
    def per_token(self) -> bool:
        """Whether a token's quantised activations have one multiplier, instead of one per 128 columns."""
        return self.activations and self.scales == "channel"

    def stored(self, plain: torch.dtype) -> torch.dtype:
        """The dtype in which activations of dtype `plain` are multiplied."""
        return FP8 if self.activations else plain

    def activation_bytes(self, act_dtype: DType) -> int:
        """Bytes of one element of the activations as they are multiplied."""
        return 1 if self.activations else ELEMENT_BYTES[act_dtype]

    def readable(self, weight: Tensor) -> Tensor:
        """The weight as a kernel reads it: FP8 as bytes where it dequantises, for Triton has no e4m3 before sm_89.

        MXFP4 is read as int16, four codes in each.
        """
        if self.scales == "mx":
            return weight.view(torch.int16)
        return weight.view(torch.uint8) if self.dequantizes else weight


_PLAIN: Final = Quantization()
_MXFP4: Final = Quantization("mx")


@functools.cache
def quantization(dtype: DType, *, fp8: bool) -> Quantization:
    """How weights of a dtype are multiplied, on a device with products of e4m3 or without."""
    if dtype == "mxfp4":
        return _MXFP4
    scales: dict[DType, Scales] = {"fp8": "block", "fp8_channel": "channel"}
    return Quantization(scales[dtype], activations=fp8) if dtype in scales else _PLAIN


def quantization_of(problem: MoEProblem) -> Quantization:
    """How the weights of a problem are multiplied on its device."""
    return quantization(problem.dtype, fp8=fp8_products(problem.capability))
