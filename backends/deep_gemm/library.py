"""Finding DeepGEMM, binding its functions by whatever names a release gives them, and saying what is wrong.

Interfaces read: vLLM's copies 2.5.0 (pybind11 functions) and 2.8.1 (Python functions over torch operators), and
sgl-deep-gemm 0.1.3 and 0.2.1 (Python functions over tvm-ffi) and 0.2.5 (over torch operators).
"""

import functools
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
from typing import Any, Final, NamedTuple

import torch

from moe_dispatch.errors import BackendUnavailableError
from moe_dispatch.system.libraries import install_hint, unusable_wheel

# DeepGEMM's own package, then the copy inside vLLM's wheel: the order in which vLLM looks.
MODULES: Final = ("deep_gemm", "vllm.third_party.deep_gemm")
INSTALL_HINT: Final = (
    f"{install_hint('deep_gemm', 'sgl-deep-gemm')}, or vllm, which holds a copy; DeepGEMM compiles its kernels with "
    "nvcc, so a CUDA toolkit must be there too"
)


class _Function(NamedTuple):
    """A function of DeepGEMM: its names, the preferred one first, and the keyword arguments it is called with."""

    names: tuple[str, ...]
    arguments: tuple[str, ...]


_OPERANDS: Final = ("a", "b", "d")
_PSUM: Final = (*_OPERANDS, "grouped_layout", "use_psum_layout", "expected_m_for_psum_layout")
_MASKED: Final = (*_OPERANDS, "masked_m", "expected_m")
# The functions named fp8_fp4 take any pair of the two types; the shorter names are aliases where a release has both.
_FUNCTIONS: Final = {
    "bf16_contiguous": _Function(("m_grouped_bf16_gemm_nt_contiguous",), _PSUM),
    "bf16_masked": _Function(("m_grouped_bf16_gemm_nt_masked", "bf16_m_grouped_gemm_nt_masked"), _MASKED),
    "fp8_contiguous": _Function(
        ("m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_fp4_gemm_nt_contiguous"), (*_PSUM, "disable_ue8m0_cast")
    ),
    "fp8_masked": _Function(
        ("m_grouped_fp8_gemm_nt_masked", "m_grouped_fp8_fp4_gemm_nt_masked", "fp8_m_grouped_gemm_nt_masked"),
        (*_MASKED, "disable_ue8m0_cast"),
    ),
    "alignment": _Function(("get_mk_alignment_for_contiguous_layout",), ()),
}
# Arguments of newer releases, which change nothing that is read here: rows between one expert's last and the next
# expert's first need not be zero.
_OPTIONS: Final = {"ensure_zero_padding": False}


@dataclass(frozen=True)
class Library:
    """The functions of DeepGEMM that are called; by keyword only, since positions moved between releases.

    Attributes:
        module: Where they came from.
        bf16_contiguous: Grouped GEMM over rows of experts one after another.
        bf16_masked: Grouped GEMM over a fixed number of rows per expert.
        fp8_contiguous: `bf16_contiguous` in block FP8.
        fp8_masked: `bf16_masked` in block FP8.
        alignment: Returns the number of rows that each expert's first row must be a multiple of. It is process-global
            and vLLM changes it for a while, so it is called every time.
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

    From then on DeepGEMM launches its kernels as programmatic dependents, in the whole process. The switch is global,
    off by default, and vLLM 0.26.0 and later set it on the first use of DeepGEMM: without this, a time would depend on
    which of the two was loaded first.

    Raises:
        BackendUnavailableError: No copy works; the message has each one's reasons and the remedy.
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
    if version == "1.0.0 (deep-gemm)":
        return (
            f"deep-gemm 1.0.0 from PyPI lacks its CUDA headers and cannot compile; uninstall it and {INSTALL_HINT}",
        )
    fault = unusable_wheel("deep_gemm", version, torch_version)
    return (fault,) if fault else ()


def _load() -> Library:
    reasons = _device_reasons()
    if not reasons:
        for name in MODULES:
            try:
                module = importlib.import_module(name)
                library = _bind(module)
                _launch_as_dependents(module)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a wrong ABI may raise anything
                reasons.append(_import_reason(name, error))
                continue
            if reason := _compiler_reason():
                reasons = [reason]
                break
            return library
    raise BackendUnavailableError("deep_gemm", reasons)


class _OtherInterfaceError(Exception):
    """DeepGEMM was imported and lacks something that is called."""


def _bind(module: ModuleType) -> Library:
    functions: dict[str, Any] = {}
    lacking: list[str] = []
    for field, wanted in _FUNCTIONS.items():
        name = next((name for name in wanted.names if callable(getattr(module, name, None))), None)
        if name is None:
            lacking.append(f"it has no {' or '.join(wanted.names)}")
            continue
        function = getattr(module, name)
        parameters = _parameters(function)
        if parameters is not None:
            lacking += [
                f"its {name} takes no {argument}" for argument in wanted.arguments if argument not in parameters
            ]
        options = {option: value for option, value in _OPTIONS.items() if option in (parameters or ())}
        functions[field] = functools.partial(function, **options) if options else function
    if lacking:
        raise _OtherInterfaceError(", ".join(lacking))
    return Library(module=module.__name__, **functions)


def _parameters(function: Callable[..., Any]) -> frozenset[str] | None:
    """The names of a function's parameters; None where it does not say, as a torch operator does not."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        # pybind11 writes the signature into the docstring and nowhere else.
        return frozenset(re.findall(r"(\w+): ", function.__doc__ or "")) or None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return frozenset(parameters)


def _launch_as_dependents(module: ModuleType) -> None:
    switch = getattr(module, "set_pdl", None) or getattr(getattr(module, "_C", None), "set_pdl", None)
    if switch is not None:
        switch(True)


def _import_reason(name: str, error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and name.startswith(error.name):
        return f"{name} is not installed: {INSTALL_HINT}"
    if isinstance(error, _OtherInterfaceError):
        return f"{name} is too old or too new: {error}; {INSTALL_HINT}"
    text = f"{name} does not import: {type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, ModuleNotFoundError) and error.name and not name.startswith(error.name.partition(".")[0]):
        return f"{text}; install it with what it depends on: {INSTALL_HINT}"
    if isinstance(error, AssertionError):
        return f"{text}; DeepGEMM sees no CUDA toolkit: install one with nvcc and set CUDA_HOME to it"
    return f"{text}; a wheel built for another torch or Python fails like this: {INSTALL_HINT}"


def _compiler_reason() -> str:
    if os.environ.get("DG_JIT_USE_NVRTC", "0") not in ("", "0"):
        return ""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    named = os.environ.get("DG_JIT_NVCC_COMPILER")
    candidates = [named] if named else [str(Path(home, "bin", "nvcc"))]
    if any(map(os.path.isfile, candidates)):
        return ""
    if not (named or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")) and shutil.which("nvcc"):
        return ""
    return (
        f"needs nvcc even where its kernels are cached, and there is none at {candidates[0]}; install a CUDA toolkit "
        "and set CUDA_HOME to it"
    )


def _device_reasons() -> list[str]:
    """DeepGEMM remembers the properties of the first GPU for the whole process, so all visible ones must be alike."""
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
