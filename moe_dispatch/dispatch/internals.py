"""The private names of torch that a call depends on, each with a public question in reserve.

The private question costs a fraction of the public one, and is asked on every call. `READ_IN` lists the versions of
torch in which the names were read; tests/core/test_internals.py fails where another version lacks one of them, while
calls go on by the public question.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    from torch._subclasses.fake_tensor import FakeTensor
except ImportError:
    FakeTensor = None  # type: ignore[assignment, misc]  # the name is only read in `is_fake`

READ_IN: Final = ("2.11", "2.13")

# Whether autocast is enabled for any device type. The reserve leaves the answer to the question that follows it:
# `torch.is_autocast_enabled` for the layer's device type.
any_autocast_enabled: Final[Callable[[], bool]] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)

# Whether the current stream is being captured into a CUDA graph.
is_capturing: Final[Callable[[], bool]] = getattr(
    torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing
)

# Whether torch.jit.trace is at work, under which the sizes of tensors are tensors. A torch without the name lacks both.
is_tracing: Final[Callable[[], bool]] = getattr(torch._C, "_is_tracing", lambda: False)

# Whether a transform of torch.func is at work. The reserve leaves it open.
transforms_active: Final[Callable[[], bool]] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)

# How many modes of torch see every operator, such as tracers and counters. The reserve says that one may.
dispatch_modes: Final[Callable[[], int]] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def recording_in_modes() -> AbstractContextManager[object]:
    """Autograd records here although a mode of torch, which sees operators below autograd, is at work around."""
    try:
        key = torch._C.DispatchKey.AutogradFunctionality
        return torch._C._SetExcludeDispatchKeyGuard(key, False)
    except AttributeError:
        return nullcontext()


_LEVEL_IS_KNOWN: Final = isinstance(getattr(forward_ad, "_current_level", None), int)


def forward_mode_entered(*tensors: Tensor) -> bool:
    """Whether forward-mode differentiation is at work. `no_grad` does not end it, and a kernel would drop tangents.

    Args:
        *tensors: In reserve: they are asked for tangents where torch no longer tells the dual level.
    """
    if _LEVEL_IS_KNOWN:
        return forward_ad._current_level >= 0
    duals = (forward_ad.unpack_dual(tensor) for tensor in tensors)
    return any(dual.tangent is not None for dual in duals)


def is_fake(tensor: object) -> bool:
    """Whether a tensor has shape, dtype and device but no memory, like those that trace a model or size its memory."""
    return hasattr(tensor, "fake_mode") if FakeTensor is None else isinstance(tensor, FakeTensor)


def kind_check(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """A function that says whether other tensors are of the same kind as these; None where torch has none to offer.

    torch.compile guards its graphs by it. Of one kind are different tensors of the same class, shape, strides, dtype,
    device and `requires_grad` (as it is set, whether or not autograd records), met in the same state of autocast,
    inference mode and torch.func's transforms.
    """
    try:
        guards: Any = torch._C._dynamo.guards
        sizes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
        kind = guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        check: Callable[..., bool] = kind.check
        return check if check(*tensors) else None
    except (AttributeError, RuntimeError, SystemError, TypeError):
        return None
