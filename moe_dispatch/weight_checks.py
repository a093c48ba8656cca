"""What the tensors of an `ExpertWeights` must be, each by itself; the refusals name the tensor and the remedy."""

from typing import Final

import torch
from torch import Tensor

from moe_dispatch.errors import InvalidInputError
from moe_dispatch.numerics import FP8
from moe_dispatch.problem import MX_BLOCK, QUANT_BLOCK, DType, scale_shape
from moe_dispatch.tensor_memory import address, tensor_fault

DTYPE_NAMES: Final[dict[torch.dtype, DType]] = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    FP8: "fp8",
    torch.uint8: "mxfp4",
}
# Dtypes of scales that checkpoints have beside fp32; float8_e8m0fnu is UE8M0, a power of two.
_EXACT_IN_FP32: Final = (torch.bfloat16, torch.float8_e8m0fnu)


def _check_memory(name: str, tensor: Tensor) -> None:
    if fault := tensor_fault(name, tensor):
        raise InvalidInputError(fault)
    if torch.compiler.is_compiling() or tensor.device.type == "meta" or hasattr(tensor, "fake_mode"):
        return
    if tensor.numel() and address(tensor) == 0:
        raise InvalidInputError(f"{name} has no memory: its storage was freed (offloaded, sharded?); load it again")


def check_weight(name: str, tensor: Tensor, *, transposed: bool = False) -> None:
    """Refuse what is no weight ``[experts, rows, columns]``."""
    _check_memory(name, tensor)
    if tensor.dim() != 3 or 0 in tensor.shape:
        raise InvalidInputError(
            f"{name} must be [experts, rows, columns] with none of them 0, got shape {list(tensor.shape)}"
        )
    if tensor.dtype not in DTYPE_NAMES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES)
        raise InvalidInputError(f"{name} must be one of {allowed}, got {tensor.dtype}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise InvalidInputError(f"{name} must be on cpu or cuda, got {tensor.device}; load the weights before wrapping")
    if tensor.is_cuda and tensor.data_ptr() % 16:
        raise InvalidInputError(
            f"{name} must start on a 16-byte boundary, got an address that ends in {tensor.data_ptr() % 16:x}; a view "
            "into a flat buffer needs an aligned offset, or .clone() once at load"
        )
    if transposed and not tensor.transpose(1, 2).is_contiguous():
        raise InvalidInputError(
            f"{name} must be .transpose(1, 2) of a contiguous tensor where transposed=True, got strides "
            f"{list(tensor.stride())} for shape {list(tensor.shape)}; leave transposed out for contiguous weights"
        )
    if not transposed and not tensor.is_contiguous():
        in_place = tensor.is_floating_point() and tensor.dtype != FP8 and tensor.transpose(1, 2).is_contiguous()
        raise InvalidInputError(
            f"{name} must be contiguous, got strides {list(tensor.stride())} for shape {list(tensor.shape)}; "
            f"call .contiguous() once at load{', or give transposed=True if both weights are so' if in_place else ''}"
        )


def columns_of(name: str, weight: Tensor) -> int:
    """The columns of a checked weight: twice those of the tensor where each byte holds two codes.

    Raises:
        InvalidInputError: They are no whole number of blocks of MXFP4.
    """
    if weight.dtype != torch.uint8:
        return weight.shape[2]
    columns = 2 * weight.shape[2]
    if columns % MX_BLOCK:
        raise InvalidInputError(
            f"{name} has {columns} columns, and MXFP4 has one scale for every {MX_BLOCK}: give a multiple of "
            f"{MX_BLOCK // 2} bytes in each row"
        )
    return columns


def check_alike(name: str, tensor: Tensor, first: Tensor) -> None:
    """Refuse weights of two dtypes, or on two devices."""
    if tensor.dtype != first.dtype:
        raise InvalidInputError(f"{name} is {tensor.dtype} and gate_up is {first.dtype}; they must share a dtype")
    if tensor.device != first.device:
        raise InvalidInputError(f"{name} is on {tensor.device} and gate_up on {first.device}; move them together")


def checked_scales(
    gate_up: Tensor, down: Tensor, gate_up_scale: Tensor | None, down_scale: Tensor | None, parts: int
) -> tuple[DType, Tensor, Tensor]:
    """The form of quantised weights, and their scales as every backend reads them; see `ExpertWeights`.

    Of gate_up, `parts` is 2, or 1 for an activation without a gate.
    """
    dtype = DTYPE_NAMES[gate_up.dtype]
    if gate_up_scale is not None and dtype == "fp8":
        _check_memory("gate_up_scale", gate_up_scale)  # before its shape is asked, which may have to be initialised
        blocks = (gate_up.shape[0], *scale_shape("fp8", *gate_up.shape[1:]))
        if tuple(gate_up_scale.shape) != blocks and tuple(gate_up_scale.shape) in _row_shapes(gate_up, parts):
            dtype = "fp8_channel"
    scales = (
        _checked_scale("gate_up_scale", gate_up_scale, gate_up, dtype, parts),
        _checked_scale("down_scale", down_scale, down, dtype, 1),
    )
    return dtype, *scales


def _check_place(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise InvalidInputError(f"{name} is on {tensor.device} and gate_up on {device}; move them together")
    if not tensor.is_contiguous():
        raise InvalidInputError(f"{name} must be contiguous, got strides {list(tensor.stride())}; call .contiguous()")


def _row_shapes(weight: Tensor, parts: int) -> dict[tuple[int, ...], str]:
    """The shapes in which scales of rows are given, and how many rows share one."""
    E, rows, _ = weight.shape
    each = {(E, rows): "row", (E, rows, 1): "row", (E,): "expert", (E, 1): "expert"}
    return each | ({(E, 2): "expert and projection"} if parts == 2 else {})


def _checked_scale(name: str, scale: Tensor | None, weight: Tensor, dtype: DType, parts: int) -> Tensor:
    E, rows = weight.shape[:2]
    shape = (E, *scale_shape(dtype, rows, columns_of(name, weight)))
    if scale is None:
        kind = "uint8 weights are MXFP4, and" if dtype == "mxfp4" else "float8_e4m3fn weights"
        raise InvalidInputError(
            f"{kind} need {name} [{', '.join(map(str, shape))}] in {'uint8' if dtype == 'mxfp4' else 'fp32'}; "
            "ExpertWeights.quantize makes both from BF16 weights"
        )
    _check_memory(name, scale)
    if dtype == "mxfp4":
        scale = scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale
        if scale.dtype != torch.uint8:
            raise InvalidInputError(f"{name} of MXFP4 must be a uint8 or float8_e8m0fnu tensor, got {scale.dtype}")
    else:
        scale = scale.to(torch.float32) if scale.dtype in _EXACT_IN_FP32 else scale
        if scale.dtype != torch.float32:
            raise InvalidInputError(
                f"{name} must be a float32 tensor of multipliers, or a bfloat16 or float8_e8m0fnu one, which is "
                f"converted, got {scale.dtype}"
            )
    shares = {"fp8": f"{QUANT_BLOCK}×{QUANT_BLOCK} block", "mxfp4": f"{MX_BLOCK} columns"}
    allowed = {shape: shares[dtype]} if dtype in shares else {}
    if dtype == "fp8_channel" or (dtype == "fp8" and name == "gate_up_scale"):  # whose form down's scales follow
        allowed |= _row_shapes(weight, parts)
    if tuple(scale.shape) not in allowed:
        shapes = " or ".join(f"{list(shape)}, one multiplier per {share}," for shape, share in allowed.items())
        raise InvalidInputError(
            f"{name} must be {shapes} got {list(scale.shape)}; both weights have scales of one form"
        )
    _check_place(name, scale, weight.device)
    return scale


def check_bias(name: str, bias: Tensor | None, shape: tuple[int, int], device: torch.device) -> None:
    """Refuse what is neither None nor a bias of this shape."""
    if bias is None:
        return
    _check_memory(name, bias)
    if bias.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise InvalidInputError(f"{name} must be a bfloat16, float16 or float32 tensor, got {bias.dtype}")
    if tuple(bias.shape) != shape:
        raise InvalidInputError(f"{name} must be {list(shape)}, one value per output row, got {list(bias.shape)}")
    _check_place(name, bias, device)


def scales_of_rows(scale: Tensor, rows: int, *, interleaved: bool = False) -> Tensor:
    """Checked scales of rows, experts or projections as ``[E, rows]``: the tensor itself, a view of it, or a copy."""
    E = scale.shape[0]
    if scale.dim() == 2 and scale.shape[1] == rows:
        return scale
    if scale.dim() == 3 and scale.shape[1] == rows:
        return scale.view(E, rows)
    each = scale.view(E, -1)
    if interleaved:
        return each.repeat(1, rows // each.shape[1])
    return each.repeat_interleave(rows // each.shape[1], dim=1)
