"""Kernels that a CPU can run the way a GPU's are run: by a launcher that is given numbers for addresses.

`StubKernel` stands where Triton's `JITFunction` stands: it specialises on its arguments as Triton does, by Triton's own
code, and "compiles" to a launcher that computes with numpy on the memory that the addresses name.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from torch import Tensor

ON_CPU = -1  # what a CPU tensor says that its device's number is


class StubKernel:
    """A kernel of this signature, which calls `compute` with what the launcher is given.

    Attributes:
        compiled: How often Triton's path was taken.
        started: The specialisation of what was started directly, with the arguments that it was given.
    """

    def __init__(
        self, signature: Callable[..., None], compute: Callable[..., None] | None = None, **options: Any
    ) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.compiler import CUDABackend
        from triton.runtime.jit import JITFunction, create_function_from_signature

        jit = JITFunction(signature, **options)
        self.params = jit.params
        self.compute = compute or (lambda *_: None)
        self.compiled = 0
        self.started: list[Any] = []
        self._bind = create_function_from_signature(jit.signature, jit.params, CUDABackend(GPUTarget("cuda", 90, 32)))

    def specialization(self, *args: Any, **constants: Any) -> tuple[Any, ...]:
        """What Triton would compile for."""
        _, specialization, options = self._bind(*args, **constants)
        return tuple(specialization), str(sorted(options.items()))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, **constants: Any) -> Any:
            self.compiled += 1
            found = self.specialization(*args, **constants)
            self.compute(*[arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args])
            return self._compiled(found)

        return launch

    def _compiled(self, specialization: tuple[Any, ...]) -> Any:
        def launcher(*given: Any) -> None:
            width, height, depth, stream, function, *_ = given
            values = given[13:]
            assert function is specialization
            self.started.append(((width, height, depth), stream, specialization, values))
            self.compute(*values)

        run = SimpleNamespace(
            launch=launcher,
            launch_cooperative_grid=False,
            launch_pdl=False,
            global_scratch_size=0,
            profile_scratch_size=0,
        )
        return SimpleNamespace(
            run=run,
            function=specialization,
            packed_metadata=(4, 1, 0),
            src=SimpleNamespace(signature={param.name: "i32" for param in self.params}),
            metadata=SimpleNamespace(),
        )


def floats(address: int, count: int) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """The fp32 memory at an address."""
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (count,))


@contextmanager
def cpu_is_the_device() -> Iterator[None]:
    """`fast_launch` kernels take CPU tensors for those of the current GPU."""
    pytest.importorskip("triton")
    from moe_dispatch.backends.triton_common import fast_launch as launch
    from moe_dispatch.backends.triton_common import replay

    with (
        mock.patch.object(launch, "current_device", return_value=ON_CPU),
        mock.patch.object(launch, "current_stream", return_value=7),
        mock.patch.object(replay, "current_device", return_value=ON_CPU),
        mock.patch.object(replay, "current_stream", return_value=7),
    ):
        yield
