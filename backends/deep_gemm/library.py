"""Finding DeepGEMM, and saying what is wrong with the one that was found."""

import importlib
import inspect
import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch

from moe_dispatch.errors import BackendUnavailableError

# DeepGEMM's own package, then the copy inside vLLM's wheel: the order in which vLLM looks.
MODULES: Final = ("deep_gemm", "vllm.third_party.deep_gemm")
INSTALL_HINT: Final = (
    "pip install the sgl-deep-gemm made for your torch (0.1.3 for 2.11, 0.2.1 for 2.13, 0.2.5 for 2.14), or vllm "
    "0.20.2, which holds a copy; it compiles its kernels with nvcc, so a CUDA toolkit must be there too"
)
# Releases of sgl-deep-gemm, from and to, and the torch whose ABI each is built for. A wheel for another torch may
# import all the same, and then reads tensors wrongly.
_WHEELS: Final = (
    ((0, 1, 3), (0, 1, 3), "2.11", "0.1.3"),
    ((0, 1, 5, 2), (0, 2, 1), "2.13", "0.2.1"),
    ((0, 2, 2), (0, 2, 5), "2.14", "0.2.5"),
)
_PSUM_SINCE: Final = "2.3"


@dataclass(frozen=True)
class Library:
    """The functions of DeepGEMM that are called; by keyword only, since positions moved between releases.

    Attributes:
        module: Where they came from.
        bf16_contiguous: Grouped GEMM over rows of experts one after another.
        bf16_masked: Grouped GEMM over a fixed number of rows per expert.
        fp8_contiguous: The same in block FP8.
        fp8_masked: The same in block FP8.
        alignment: Rows that each expert's first row must be a multiple of; process-global, so it is asked every time.
    """

    module: str
    bf16_contiguous: Callable[..., None]
    bf16_masked: Callable[..., None]
    fp8_contiguous: Callable[..., None]
    fp8_masked: Callable[..., None]
    alignment: Callable[[], int]


_lock = threading.Lock()
_library: Library | None = None


def load() -> Library:
    """The library, imported once per process.

    Raises:
        BackendUnavailableError: None was found that works; each one's reason, and the remedy.
    """
    global _library
    if _library is None:
        with _lock:
            _library = _library or _load()
    return _library


def wheel_reasons(version: str, torch_version: str) -> tuple[str, ...]:
    """What is known to be wrong with an installed wheel. Imports nothing.

    Args:
        version: As in `Machine.libraries`: ``"0.1.3 (sgl-deep-gemm)"``, or a bare version for vLLM's copy.
        torch_version: ``"2.11.0+cu130"``.
    """
    number, _, distribution = version.partition(" ")
    if distribution == "(deep-gemm)" and number == "1.0.0":
        return (
            f"deep-gemm 1.0.0 from PyPI lacks its CUDA headers and cannot compile; uninstall it and {INSTALL_HINT}",
        )
    if distribution != "(sgl-deep-gemm)":
        return ()
    release = tuple(int(part) for part in re.findall(r"\d+", number))
    built_for = next((made_for for first, last, made_for, _ in _WHEELS if first <= release <= last), None)
    running = ".".join(torch_version.split(".")[:2])
    if built_for is None or built_for == running:
        return ()
    right = next((f"install sgl-deep-gemm=={best}" for *_, made_for, best in _WHEELS if made_for == running), None)
    remedy = right or f"no release for torch {running} is known: use torch {built_for}"
    return (f"sgl-deep-gemm {number} is built for torch {built_for}, and this is torch {running}; {remedy}",)


def _load() -> Library:
    reasons = _device_reasons()
    if not reasons:
        for name in MODULES:
            try:
                library = _bind(importlib.import_module(name))
            except Exception as error:  # noqa: BLE001 - a missing CUDA toolkit is an AssertionError, a bad ABI anything
                reasons.append(_import_reason(name, error))
                continue
            if reason := _compiler_reason():
                reasons = [reason]
                break
            return library
    raise BackendUnavailableError("deep_gemm", reasons)


def _bind(module: ModuleType) -> Library:
    names = {
        "bf16_contiguous": "m_grouped_bf16_gemm_nt_contiguous",
        "bf16_masked": "m_grouped_bf16_gemm_nt_masked",
        "fp8_contiguous": "m_grouped_fp8_gemm_nt_contiguous",
        "fp8_masked": "m_grouped_fp8_gemm_nt_masked",
        "alignment": "get_mk_alignment_for_contiguous_layout",
    }
    found: dict[str, Any] = {field: getattr(module, name, None) for field, name in names.items()}
    missing = [names[field] for field, function in found.items() if function is None]
    if missing:
        raise _TooOldError(f"it has no {', '.join(missing)}")
    for field in ("bf16_contiguous", "fp8_contiguous"):
        if not _takes(found[field], "use_psum_layout"):
            raise _TooOldError(f"its {names[field]} has no use_psum_layout")
    return Library(module=module.__name__, **found)


class _TooOldError(Exception):
    """The library was imported, and lacks something."""


def _takes(function: Callable[..., Any], keyword: str) -> bool:
    try:
        return keyword in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return keyword in (function.__doc__ or "")  # pybind11 writes the signature there and nowhere else


def _import_reason(name: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and name.startswith(error.name):
        return f"{name} is not installed: {INSTALL_HINT}"
    if isinstance(error, _TooOldError):
        return f"{name} is too old: {error}; DeepGEMM {_PSUM_SINCE} or newer does: {INSTALL_HINT}"
    text = f"{name} does not import: {type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, AssertionError):
        return f"{text}; it found no CUDA toolkit: install one with nvcc and set CUDA_HOME to it"
    return f"{text}; a wheel built for another torch or Python fails like this: {INSTALL_HINT}"


def _compiler_reason() -> str:
    if os.environ.get("DG_JIT_USE_NVRTC", "0") not in ("", "0"):
        return ""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    named = os.environ.get("DG_JIT_NVCC_COMPILER")
    candidates = [named] if named else [str(Path(home, "bin", "nvcc"))]
    if any(Path(path).is_file() for path in candidates):
        return ""
    if not (named or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")) and shutil.which("nvcc"):
        return ""
    return (
        f"needs nvcc even where its kernels are cached, and there is none at {candidates[0]}; install a CUDA toolkit "
        "and set CUDA_HOME to it"
    )


def _device_reasons() -> list[str]:
    """Whether several kinds of GPU are visible: it remembers the properties of the first one for the whole process."""
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    kinds = {(device.name, device.multi_processor_count) for device in properties}
    if len(kinds) < 2:
        return []
    names = ", ".join(sorted(f"{name} with {sms} SMs" for name, sms in kinds))
    return [
        f"remembers the first GPU's properties for the whole process, and several kinds are visible: {names}; make one "
        "kind visible with CUDA_VISIBLE_DEVICES"
    ]
