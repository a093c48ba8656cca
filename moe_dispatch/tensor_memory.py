"""Whether a kernel could read a tensor's memory as it is, where that lies, and whether it stays."""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter, is_lazy

_PLAIN: Final = (Tensor, Parameter)


def tensor_fault(name: str, tensor: object) -> str:
    """Why a kernel could not read a tensor's memory as it is; empty if it could. Shape and dtype are not looked at."""
    if not isinstance(tensor, Tensor):
        return f"{name} must be a torch.Tensor, got {type(tensor).__name__}"
    if tensor.is_nested:
        return f"{name} must be a plain tensor, got a nested one; .values() holds its rows"
    if tensor.layout != torch.strided:
        return f"{name} must be strided, got layout {tensor.layout}; .to_dense() converts it"
    if type(tensor) in _PLAIN:
        return ""
    if is_lazy(tensor):
        return f"{name} is an uninitialized parameter; run its module once, or load a checkpoint"
    # A class with a dispatch of its own keeps its elements elsewhere. A fake tensor has none, and only a trace uses it.
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not hasattr(tensor, "fake_mode"):
        remedy = ".to_local() gives this rank's part" if hasattr(tensor, "to_local") else "unwrap or dequantize it"
        return f"{name} must be a plain tensor, got a {type(tensor).__name__}; {remedy}"
    return ""


def offloaded(module: nn.Module) -> bool:
    """Whether an accelerate hook of the module itself brings the weights before each call and frees them after it."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(each, "offload", False) for each in (hook, *getattr(hook, "hooks", ())))


def address(tensor: Tensor) -> int | None:
    """Where a tensor's elements lie; None for one without memory: fake, or inside of torch.func's transforms."""
    if type(tensor) not in _PLAIN and hasattr(tensor, "fake_mode"):  # torch warns of asking it
        return None
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return None
