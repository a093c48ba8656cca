"""Corrects Triton's interpreter where a release of it computes what the compiler does not."""

import os
from typing import Any

from moe_dispatch.system.libraries import library_version


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
