"""Kernels that a CPU can run the way a GPU's are run: by a launcher that is passed numbers for addresses.

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
import torch
from torch import Tensor

from moe_dispatch.backend import Inputs
from moe_dispatch.workloads import ROUTINGS, Workload, make_experts

ON_CPU = -1  # what a CPU tensor says that its device's number is
LAYER = Workload("tiny", E=4, topk=2, K=64, N=32)


def inputs(seed: int = 0, M: int = 3) -> Inputs:
    """A call of LAYER."""
    generator = torch.Generator().manual_seed(seed)
    weights, ids = ROUTINGS["uniform"].sample(M, LAYER.E, LAYER.topk, "cpu", generator)
    return torch.randn(M, LAYER.K, generator=generator), make_experts(LAYER, "fp32", "cpu", generator), weights, ids


class StubKernel:
    """A kernel of this signature, which calls `compute` with what the launcher is passed.

    A tensor descriptor is passed as an address, sizes and strides.

    Attributes:
        compiled: How often Triton's path was taken.
        started: The specialisation of what was started directly, with the arguments that it was passed.
    """

    def __init__(
        self, signature: Callable[..., None], compute: Callable[..., None] | None = None, **options: Any
    ) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.compiler import CUDABackend
        from triton.runtime.jit import JITFunction, create_function_from_signature

        jit = JITFunction(signature, **options)
        self.fn, self.params, self.cache_key = signature, jit.params, ""
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
            specialization = self.specialization(*args, **constants)
            self.compute(*[value for arg in args for value in _passed(arg)])
            return self._compiled(specialization)

        return launch

    def _compiled(self, specialization: tuple[Any, ...]) -> Any:
        def launcher(*arguments: Any) -> None:
            width, height, depth, stream, function, *_ = arguments
            values = tuple(arguments[-1])
            assert function is specialization
            self.started.append(((width, height, depth), stream, specialization, values))
            self.compute(*values)

        def encoding(*arguments: Any) -> None:
            launcher(*arguments)  # as Triton's wrapper does once it has encoded the descriptors

        kinds = [kind for kind, *_ in specialization[0]]
        descriptors = [kind for kind in kinds if str(kind).startswith("tensordesc")]
        run = SimpleNamespace(
            launch=encoding if descriptors else launcher,
            launch_cooperative_grid=False,
            launch_pdl=False,
            global_scratch_size=0,
            profile_scratch_size=0,
            kernel_signature="",
            arg_annotations=[],
        )
        return SimpleNamespace(
            run=run,
            function=specialization,
            packed_metadata=(4, 1, 0),
            src=SimpleNamespace(signature={param.name: kind for param, kind in zip(self.params, kinds, strict=False)}),
            metadata=SimpleNamespace(tensordesc_meta=[{"swizzle": 3} for _ in descriptors]),
        )


def _passed(arg: Any) -> list[Any]:
    if isinstance(arg, Tensor):
        return [arg.data_ptr()]
    return [arg.base.data_ptr(), *arg.shape, *arg.strides] if hasattr(arg, "base") else [arg]


def floats(address: int, count: int) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """The fp32 memory at an address."""
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (count,))


@contextmanager
def cpu_is_the_device() -> Iterator[None]:
    """`fast_launch` kernels take CPU tensors for those of the current GPU, and descriptors of them are kept."""
    pytest.importorskip("triton")
    from moe_dispatch.backends.triton_common import descriptors, internals

    with (
        mock.patch.object(internals, "current_device", return_value=ON_CPU),
        mock.patch.object(internals, "current_stream", return_value=7),
        mock.patch.object(internals, "encode", lambda descriptor, _encoding: _passed(descriptor)),
        mock.patch.object(descriptors, "interpreting", return_value=False),
    ):
        yield
