"""Classification of exceptions from backends: out of memory, a lost device, or the backend's own failure."""

from typing import Final

import torch

# CUDA errors after which every later call in the process fails too.
_LOST_DEVICE: Final = (
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
    "misaligned address",
    "illegal instruction",
    "invalid program counter",
    "hardware stack error",
    "uncorrectable ecc error",
    "launch timed out and was terminated",
)

# The last of them is a status of CUDA's libraries, such as CUBLAS_STATUS_ALLOC_FAILED.
_NO_MEMORY: Final = ("out of memory", "can't allocate memory", "status_alloc_failed")


def out_of_memory(error: BaseException) -> bool:
    """Whether device or host memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = _text(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _NO_MEMORY)


def broken_capture(error: BaseException) -> bool:
    """Whether the capture of a CUDA graph had failed before this call, so that the call is not to blame."""
    return "previous error during capture" in _text(error).lower()


def lost_device(error: BaseException) -> bool:
    """Whether the CUDA context is lost."""
    text = _text(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _LOST_DEVICE)


def summary(error: BaseException) -> str:
    """Type and first line of an exception, short enough for a warning."""
    lines = _text(error).strip().splitlines()
    first = lines[0] if lines else "no message"
    return f"{type(error).__name__}: {first[:300]}"


def _text(error: BaseException) -> str:
    """The message of an exception, as text that can be stored: a path in it may have bytes that are no UTF-8."""
    try:
        return str(error).encode("utf-8", "backslashreplace").decode()
    except Exception:  # noqa: BLE001 - an exception of another package may fail to print itself
        return ""
