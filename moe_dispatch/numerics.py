"""The arithmetic that all backends agree on, in torch: the activations, and quantisation to FP8.

Block FP8 is DeepSeek-V3's: e4m3 codes with one fp32 multiplier per 128×128 block of a weight, and per row and 128
columns of an activation. Per-channel FP8 is llm-compressor's: one per row of a weight, which is an output channel, and
per row of an activation, which is a token. A value is its code times its multiplier.

The kernels' device functions (backends/triton_common/device.py) do the same and take their constants from here.
"""

import math
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dispatch.activations import UNGATED, Activation, SwiGLU, swiglu
from moe_dispatch.mxfp4 import dequantize_mxfp4
from moe_dispatch.problem import QUANT_BLOCK

FP8: Final = torch.float8_e4m3fn
FP8_MAX: Final = 448.0
# The least maximum that a group is quantised by, so that the multiplier of zeros is not 0; vLLM's quantisation has the
# same.
SMALLEST_AMAX: Final = 1e-10


class QuantizedRows(NamedTuple):
    """Activations as block FP8 multiplies them, such as another rank sends them.

    Attributes:
        codes: e4m3 ``[M, K]``, contiguous.
        scale: fp32 multipliers ``[M, ⌈K/128⌉]``, contiguous.
        act_dtype: The dtype that they had before, which is that of the layer's output.
    """

    codes: Tensor
    scale: Tensor
    act_dtype: torch.dtype

    def dequantized(self) -> Tensor:
        """The values in fp32, ``[M, K]``."""
        return self.codes.float() * self.scale.repeat_interleave(QUANT_BLOCK, dim=1)[:, : self.codes.shape[1]]


def activate_torch(gate_up: Tensor, activation: Activation, *, interleaved: bool = False) -> Tensor:
    """Apply the activation along the last dimension.

    Args:
        gate_up: ``[…, 2N]``, gate first or alternating; ``[…, N]`` for an ungated activation.
        activation: See `MoEProblem`.
        interleaved: Whether gate and up columns alternate.

    Returns:
        ``[…, N]`` in the same dtype.
    """
    if activation in UNGATED:
        return F.relu(gate_up).square()
    if interleaved:
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    else:
        gate, up = gate_up.chunk(2, dim=-1)
    if parameters := swiglu(activation):
        return _swiglu_torch(gate, up, parameters)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def _swiglu_torch(gate: Tensor, up: Tensor, parameters: SwiGLU) -> Tensor:
    if parameters.limit is not None:
        gate, up = gate.clamp(max=parameters.limit), up.clamp(-parameters.limit, parameters.limit)
    if parameters.up_cap is not None:
        up = parameters.up_cap * torch.tanh(up / parameters.up_cap)
    if parameters.shift:
        up = up + parameters.shift
    if parameters.alpha == 1.0 and parameters.gate_cap is None:
        return F.silu(gate) * up
    factor = gate if parameters.gate_cap is None else parameters.gate_cap * torch.tanh(gate / parameters.gate_cap)
    return factor * torch.sigmoid(parameters.alpha * gate) * up


def fp8_multiplier(amax: Tensor) -> Tensor:
    """amax/448 in fp32, correctly rounded: the multiplier of a group whose greatest magnitude is `amax`.

    The divisor is a tensor because CUDA divides a tensor by a Python number as a product with its rounded reciprocal.
    One unit in the last place of the multiplier moves every code of a group whose values lie on ties, as BF16 values
    often do.
    """
    return amax.clamp(min=SMALLEST_AMAX) / torch.full_like(amax, FP8_MAX)


def quantize_rows_torch(rows: Tensor, *, per_token: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise activations per row and 128 columns, or per row.

    Args:
        rows: ``[R, C]`` of any float dtype and any C.
        per_token: Whether a row has one multiplier.

    Returns:
        e4m3 ``[R, C]`` and fp32 multipliers ``[R, ⌈C/128⌉]``, or ``[R, 1]`` per token.
    """
    R, C = rows.shape
    width = C if per_token else QUANT_BLOCK
    groups = math.ceil(C / width)
    padded = F.pad(rows.float(), (0, groups * width - C)).view(R, groups, width)
    scale = fp8_multiplier(padded.abs().amax(dim=2))
    codes = (padded / scale[:, :, None]).clamp(-FP8_MAX, FP8_MAX)
    return codes.view(R, groups * width)[:, :C].to(FP8).contiguous(), scale


def round_rows_through_fp8(rows: Tensor, *, per_token: bool = False) -> Tensor:
    """Activations as a product with FP8 weights reads them: quantised by `quantize_rows_torch`, and back.

    Its gradient is straight-through: rounding has no useful derivative, and autograd would round the gradient to e4m3.

    Args:
        rows: fp32 ``[R, C]``.
        per_token: As for `quantize_rows_torch`.

    Returns:
        fp32 ``[R, C]``.
    """
    codes, scale = quantize_rows_torch(rows.detach(), per_token=per_token)
    width = rows.shape[1] if per_token else QUANT_BLOCK
    rounded = codes.float() * scale.repeat_interleave(width, dim=1)[:, : rows.shape[1]]
    return rows + (rounded - rows).detach() if rows.requires_grad else rounded


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise weights per 128×128 block; blocks at the edges cover what is left.

    Args:
        weight: ``[E, R, C]`` of any float dtype. A NaN or infinite element becomes NaN and changes no other.

    Returns:
        e4m3 ``[E, R, C]`` and fp32 multipliers ``[E, ⌈R/128⌉, ⌈C/128⌉]``.
    """
    E, R, C = weight.shape
    quantized = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    scale = torch.empty(
        E, math.ceil(R / QUANT_BLOCK), math.ceil(C / QUANT_BLOCK), dtype=torch.float32, device=weight.device
    )
    # One expert at a time: the fp32 copy of a whole DeepSeek-V3 layer would not fit into the memory beside it.
    for e in range(E):
        values = _pad_to_blocks(weight[e].float())
        blocks = values.view(values.shape[0] // QUANT_BLOCK, QUANT_BLOCK, -1, QUANT_BLOCK)
        finite = torch.where(blocks.isfinite(), blocks, 0.0)
        block_scale = fp8_multiplier(finite.abs().amax(dim=(1, 3)))
        codes = (blocks / block_scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX)
        # e4m3fn has no infinity, so an infinite element becomes NaN instead of a plausible 448.
        codes = torch.where(blocks.isinf(), torch.nan, codes)
        quantized[e] = codes.view_as(values)[:R, :C].to(FP8)
        scale[e] = block_scale
    return quantized, scale


def quantize_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise weights per row.

    Args:
        weight: ``[E, R, C]`` of any float dtype. A NaN or infinite element becomes NaN and changes no other.

    Returns:
        e4m3 ``[E, R, C]`` and fp32 multipliers ``[E, R]``.
    """
    quantized = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    scale = torch.empty(weight.shape[:2], dtype=torch.float32, device=weight.device)
    for e in range(weight.shape[0]):
        values = weight[e].float()
        scale[e] = fp8_multiplier(torch.where(values.isfinite(), values, 0.0).abs().amax(dim=1))
        codes = (values / scale[e, :, None]).clamp(-FP8_MAX, FP8_MAX)
        quantized[e] = torch.where(values.isinf(), torch.nan, codes).to(FP8)
    return quantized, scale


def dequantize(quantized: Tensor, scale: Tensor) -> Tensor:
    """Undo `quantize_blocks`, `quantize_channels` or `quantize_mxfp4`, for one expert or all.

    Args:
        quantized: e4m3 ``[…, R, C]``, or the bytes of MXFP4.
        scale: fp32 multipliers ``[…, ⌈R/128⌉, ⌈C/128⌉]`` or ``[…, R]``, whose shape says the form, or those of MXFP4.

    Returns:
        fp32 ``[…, R, C]``.
    """
    if quantized.dtype == torch.uint8:
        return dequantize_mxfp4(quantized, scale)
    if scale.dim() == quantized.dim():
        return dequantize_blocks(quantized, scale)
    return quantized.float() * scale.unsqueeze(-1)


def dequantize_blocks(quantized: Tensor, scale: Tensor) -> Tensor:
    """Undo `quantize_blocks`, for one expert or all.

    Args:
        quantized: e4m3 ``[…, R, C]``.
        scale: fp32 multipliers ``[…, ⌈R/128⌉, ⌈C/128⌉]``.

    Returns:
        fp32 ``[…, R, C]``.
    """
    R, C = quantized.shape[-2:]
    full = scale.repeat_interleave(QUANT_BLOCK, dim=-2).repeat_interleave(QUANT_BLOCK, dim=-1)
    return quantized.float() * full[..., :R, :C]


def _pad_to_blocks(matrix: Tensor) -> Tensor:
    rows, columns = matrix.shape
    return F.pad(matrix, (0, -columns % QUANT_BLOCK, 0, -rows % QUANT_BLOCK))
