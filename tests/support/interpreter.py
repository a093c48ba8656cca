"""Triton's interpreter in tests: quicker, corrected where a release is wrong, left out where it is not the point."""

import contextlib
import dataclasses
import functools
import inspect
import os
from types import ModuleType
from typing import Any

import pytest

from moe_dispatch.backend import BackendConfig
from moe_dispatch.backends.triton_common import features
from moe_dispatch.backends.triton_vector.config import TritonVectorConfig
from moe_dispatch.errors import MoEDispatchError
from moe_dispatch.registry import BACKENDS
from moe_dispatch.system.libraries import library_version


def leave_out_the_interpreter(patch: pytest.MonkeyPatch) -> None:
    """Let Triton's backends refuse a CPU, and the stages run in torch, as on any CPU outside of the tests.

    Backends are loaded before: what a module decides on import holds for the tests that follow in this process.
    """
    for name in BACKENDS.names():
        with contextlib.suppress(MoEDispatchError):
            backend = BACKENDS.load(name)
            if name.startswith("triton"):
                patch.setattr(backend, "requirements", dataclasses.replace(backend.requirements, cpu=False))
    patch.setattr(features, "interpreting", lambda: False)


def with_few_programs(config: BackendConfig) -> BackendConfig:
    """The configuration, with the largest tiles where Triton interprets the vector kernels, program by program."""
    if features.interpreting() and isinstance(config, TritonVectorConfig):
        return config.model_copy(update={"rows": 32, "down_rows": 32})
    return config


def correct_interpreter() -> None:
    """Triton 3.9 broadcasts a scalar comparison in the type of its operands, and then refuses it as a mask."""
    if os.environ.get("TRITON_INTERPRET") != "1" or not library_version("triton").startswith("3.9."):
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    splat = InterpreterBuilder.create_splat

    def create_splat(self: Any, ret_ty: Any, arg: Any) -> Any:
        block = splat(self, ret_ty, arg)
        return TensorHandle(block.data.astype(bool), tl.int1) if arg.data.dtype == bool else block

    InterpreterBuilder.create_splat = create_splat


def quicken_interpreter() -> None:
    """Keep what Triton's interpreter computes anew at every call of a device function.

    It searches Triton's language for functions to replace at each launch and again at each call of a device function,
    builds the table of NumPy's dtypes at each operation, and computes every sum and product of indices a second time in
    int64 to see whether it overflows, which no index of a test's small tensors does. Together that is more than half of
    an interpreted test's time. Written for Triton 3.6 to 3.9; with names changed, a release runs as it is.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "_patch_attr", "_get_np_dtype")):
        return
    patch_language, patch_attribute, numpy_dtype = (
        interpreter._patch_lang, interpreter._patch_attr, interpreter._get_np_dtype,
    )  # fmt: skip
    under_way = _Launch()

    @functools.cache
    def builtins(package: Any) -> list[tuple[str, Any]]:
        return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def patch_builtins(package: Any, builder: Any, scope: Any) -> None:
        for name, member in builtins(package):
            patch_attribute(package, name, member, builder, scope)

    @functools.cache
    def languages(function: Any) -> frozenset[ModuleType]:
        return frozenset(value for value in function.__globals__.values() if value is tl or value is tl.core)

    def patch_once(function: Any) -> Any:
        wanted = languages(function)
        if under_way.scope is None:
            under_way.scope, under_way.patched = patch_language(function), wanted
            return under_way
        if not wanted <= under_way.patched:
            # What a device function needs beyond its kernel is taken back with the rest when the launch ends.
            under_way.scope._changes += patch_language(function)._changes
            under_way.patched |= wanted
        return None

    dtypes: dict[str, Any] = {}

    def kept_numpy_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        if scalar.name not in dtypes:
            dtypes[scalar.name] = numpy_dtype(scalar)
        return dtypes[scalar.name]

    interpreter._patch_builtin = patch_builtins
    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = kept_numpy_dtype
    if hasattr(interpreter, "interpreter_builder"):
        interpreter.interpreter_builder.options = dataclasses.replace(
            interpreter.interpreter_builder.options, sanitize_overflow=False
        )


@dataclasses.dataclass
class _Launch:
    """The interpreted launch under way: it patches the language when it starts and restores it when it ends."""

    scope: Any = None
    patched: frozenset[ModuleType] = frozenset()

    def restore(self) -> None:
        scope, self.scope, self.patched = self.scope, None, frozenset()
        scope.restore()
