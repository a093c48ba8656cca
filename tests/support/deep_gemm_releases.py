"""What each release of DeepGEMM exports of what the backend calls, as read in its own ``__init__.py``.

A change of these tables is a change of facts: read the release before.
"""

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Implementations = Mapping[str, Callable[..., Any]]

_RECIPES: Final = "recipe recipe_a recipe_b compiled_dims disable_ue8m0_cast"
_FP8_NAMES: Final = {
    "m_grouped_fp8_gemm_nt_contiguous": "m_grouped_fp8_fp4_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked": "m_grouped_fp8_fp4_gemm_nt_masked",
}
_ALL_NAMES: Final = _FP8_NAMES | {
    "fp8_m_grouped_gemm_nt_masked": "m_grouped_fp8_fp4_gemm_nt_masked",
    "bf16_m_grouped_gemm_nt_masked": "m_grouped_bf16_gemm_nt_masked",
}


@dataclass(frozen=True)
class Release:
    """A release's functions, and how it takes its arguments.

    Attributes:
        form: ``"pybind"``: the signature stands in the docstring only. ``"dlpack"``: Python functions over tvm-ffi,
            which refuse tensors that require a gradient. ``"operators"``: Python functions over torch operators.
        functions: Parameters by name of function.
        aliases: Further names, and the functions that they stand for.
        pdl: Where the switch for programmatic dependent launch is: in the package or in its extension module.
    """

    form: Literal["pybind", "dlpack", "operators"]
    functions: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    pdl: Literal["package", "extension"] = "package"

    def module(self, implementations: Implementations, name: str = "deep_gemm") -> types.ModuleType:
        """The release as a module, doing what the implementations of `_kind`, "alignment" and "set_pdl" do."""
        made, extension = types.ModuleType(name), types.ModuleType(f"{name}._C")
        contents: dict[str, Any] = {
            function: _Bound(self.form, function, parameters.split(), implementations[_kind(function)])
            for function, parameters in self.functions.items()
        }
        contents |= {alias: contents[function] for alias, function in self.aliases.items()}
        contents |= {"get_mk_alignment_for_contiguous_layout": implementations["alignment"], "_C": extension}
        vars(made).update(contents)
        vars(made if self.pdl == "package" else extension)["set_pdl"] = implementations["set_pdl"]
        return made


class _Bound:
    """A function that takes keyword arguments only, for a position may be another argument in another release."""

    def __init__(self, form: str, name: str, parameters: list[str], implementation: Callable[..., Any]) -> None:
        self._form, self._parameters, self._implementation = form, parameters, implementation
        self.__signature__: Any = "pybind11 gives none that inspect understands"
        if form == "pybind":
            self.__doc__ = f"{name}({', '.join(f'{parameter}: object' for parameter in parameters)}) -> None"
        else:
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
            self.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in parameters])

    def __call__(self, **arguments: Any) -> None:
        assert arguments.keys() <= set(self._parameters), arguments.keys()
        # By default these write zeros between the experts, which nothing reads.
        assert arguments.pop("ensure_zero_padding", True) is ("ensure_zero_padding" not in self._parameters)
        if self._form == "dlpack":
            assert not any(tensor.requires_grad for tensor in _tensors(arguments.values()))
        self._implementation(**arguments)


def _kind(function: str) -> str:
    return f"{'bf16' if 'bf16' in function else 'fp8'}_{'masked' if 'masked' in function else 'contiguous'}"


def _tensors(arguments: Any) -> Any:
    import torch

    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


def _functions(*, zero_padding: bool, epilogue: bool) -> dict[str, str]:
    """The functions of a release, which differ in two parameters."""
    psum = f"use_psum_layout {'ensure_zero_padding ' if zero_padding else ''}expected_m_for_psum_layout"
    functions = {
        "m_grouped_bf16_gemm_nt_contiguous": f"a b d grouped_layout compiled_dims {psum}",
        "m_grouped_bf16_gemm_nt_masked": "a b d masked_m expected_m compiled_dims",
        "m_grouped_fp8_fp4_gemm_nt_contiguous": f"a b d grouped_layout {_RECIPES} {psum}",
        "m_grouped_fp8_fp4_gemm_nt_masked": f"a b d masked_m expected_m {_RECIPES}",
    }
    return {name: f"{parameters} epilogue" if epilogue else parameters for name, parameters in functions.items()}


_OLD: Final = _functions(zero_padding=False, epilogue=False)
_NEW: Final = _functions(zero_padding=True, epilogue=True)
RELEASES: Final[dict[str, Release]] = {
    "vLLM's 2.5.0": Release("pybind", _OLD, _ALL_NAMES),  # vLLM 0.20.2 and 0.26.0
    "vLLM's 2.8.1": Release("operators", _NEW, _FP8_NAMES),  # vLLM 0.33.0
    "sgl-deep-gemm 0.1.3": Release(
        "dlpack",
        _OLD,
        {name: function for name, function in _ALL_NAMES.items() if name != "m_grouped_fp8_gemm_nt_masked"},
        pdl="extension",
    ),
    "sgl-deep-gemm 0.2.1": Release("dlpack", _functions(zero_padding=True, epilogue=False), _ALL_NAMES),
    "sgl-deep-gemm 0.2.5": Release("operators", _NEW, _ALL_NAMES),
}
