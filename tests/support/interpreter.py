"""Triton's interpreter in tests: corrected where a release of it is wrong, and left out where it is not the point."""

import contextlib
import dataclasses
import os
from typing import Any

import pytest

from moe_dispatch.backends.triton_common import features
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
