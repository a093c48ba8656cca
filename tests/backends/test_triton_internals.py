"""What `internals` knows of Triton is true of the Triton that is installed.

It was read in the releases of `READ`. A release that is not among them has to be read first: the launcher
(triton/backends/nvidia/driver.py and driver.c), `JITFunction.run` (triton/runtime/jit.py) and `CompiledKernel`
(triton/compiler/compiler.py).
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.runtime.jit import JITFunction

from moe_dispatch.backends.gluon_hopper.gluon_api import tma_load
from moe_dispatch.backends.gluon_hopper.windows import Windows, with_window
from moe_dispatch.backends.triton_common import fast_launch as fast_launch_module
from moe_dispatch.backends.triton_common import internals
from moe_dispatch.backends.triton_common.descriptors import Descriptors
from moe_dispatch.backends.triton_common.features import READ_TRITON_RELEASES, unread_triton_reason
from tests.support.triton_compile import Launch, compile_launches

READ = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
FUNCTION, STREAM = 99, 7
OFFSET = tl.constexpr(3)


def test_the_releases_that_were_read_are_named() -> None:
    assert triton.__version__ in READ, f"read Triton {triton.__version__}, then name it here and in features.py"
    assert tuple(tuple(map(int, version.split(".")[:2])) for version in READ) == READ_TRITON_RELEASES
    assert unread_triton_reason(triton.__version__) == ""


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0.0", "", "3.60.0"])
def test_a_triton_that_was_not_read_is_named_in_a_reason(version: str) -> None:
    assert f"Triton {version} is none of the releases" in unread_triton_reason(version)
    assert "3.6, 3.7" in unread_triton_reason(version)


def caller_of_two() -> tuple[Any, Any]:
    """A new function that calls another one, which uses a global constant; and that other one."""

    def inner(x):  # type: ignore[no-untyped-def]
        return x + OFFSET

    jit_inner: Any = JITFunction(inner)

    def middle(x):  # type: ignore[no-untyped-def]
        return jit_inner(x)

    jit_middle: Any = JITFunction(middle)

    def outer(x):  # type: ignore[no-untyped-def]
        return jit_middle(x)

    return JITFunction(outer), jit_inner


def test_a_key_depends_on_no_function_that_was_hashed_before() -> None:
    alone, _ = caller_of_two()
    internals.make_cache_key(alone)
    afterwards, inner = caller_of_two()
    assert inner.cache_key
    internals.make_cache_key(afterwards)
    assert afterwards.cache_key == alone.cache_key
    by_triton, _ = caller_of_two()
    depends = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
    assert (by_triton.cache_key != alone.cache_key) == depends, "make_cache_key names other releases of Triton"


def copy(x, out_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # a kernel's
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x + offs, mask=offs < n), mask=offs < n)


def copy_block(x, out_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # a kernel's
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs[:, None] * n + offs[None, :], x.load([0, 0]))


def load_block(x, out_ptr, n, BLOCK: gl.constexpr):  # type: ignore[no-untyped-def] # a kernel's
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    tma_load(x, [0, 0, 0], bar, gl.allocate_shared_memory(x.dtype, x.block_shape, x.layout))
    gl.store(out_ptr, n)


def launched(kernel: Any, args: tuple[Any, ...], values: Callable[[internals.Launch], list[Any]]) -> None:
    """Starts a kernel by Triton's launcher and by `Launch`: Triton's function in C must not see a difference."""
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    compiled = kernel[3,](*args, BLOCK=32)
    calls: list[tuple[Any, ...]] = []
    c_module = SimpleNamespace(launch=lambda *passed: calls.append(passed))
    utils = SimpleNamespace(
        launch=c_module.launch,
        build_signature_metadata=tuple,
        fill_tma_descriptor=lambda *passed: ("tensor map", passed),
        fill_tma_descriptor_tiled=lambda *passed: ("tensor map", passed),
    )
    with ExitStack() as patches:
        patch = patches.enter_context
        patch(mock.patch.object(type(driver.active), "utils", utils, create=True))
        if hasattr(nvidia, "compile_module_from_src"):  # Triton 3.6 compiles a launcher for each signature
            patch(mock.patch.object(nvidia, "compile_module_from_src", return_value=c_module))
            patch(mock.patch.object(nvidia, "library_dirs", return_value=[]))
        if hasattr(nvidia, "PyKernelArg"):
            patch(mock.patch.object(nvidia, "PyKernelArg", lambda **described: tuple(described.values())))
        compiled._run, compiled.function = nvidia.CudaLauncher(compiled.src, compiled.metadata), FUNCTION
        bound = (*args, 32)  # as JITFunction.run passes them
        compiled.run(3, 1, 1, STREAM, FUNCTION, compiled.packed_metadata, None, None, None, *bound)
        launch = internals.Launch.of(compiled, constants=1)
        assert launch is not None
        launch.start((3,), STREAM, [*values(launch), *launch.padding])
        compiled._run = None
    theirs, ours = ([as_passed(value) for value in call] for call in calls)
    assert ours == theirs
    assert STREAM in ours
    assert FUNCTION in ours


def as_passed(value: Any) -> Any:
    """Addresses for tensors, which the launcher asks for; nothing for the constant, which it skips."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, list | tuple) and value and not isinstance(value[0], str):
        return [as_passed(element) for element in value]
    return None if isinstance(value, int) and value == 32 else value


def launch_both_ways(_capability: int) -> Iterator[Launch]:
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, out = torch.empty(64, 64, dtype=torch.bfloat16), torch.empty(64, 64, dtype=torch.bfloat16)
    yield Launch(partial(launched, JITFunction(copy), (x, out, 24), lambda _: [0, 0, 24]))

    def encoded(descriptor: Any, launch: internals.Launch) -> list[Any]:
        ((place, encoding),) = launch.descriptors
        assert place == 0
        arguments = internals.encode(descriptor, encoding)
        assert arguments == [internals.tensor_map(descriptor, encoding), *internals.after_map(descriptor)]
        return [*arguments, 0, 64]

    # Those that are kept have no tensor any more, which Triton does not miss.
    windows = Descriptors().get(with_window(x, 64, 64)[0], Windows(32))
    assert not isinstance(windows.base, torch.Tensor)
    for kernel, descriptor in (
        (JITFunction(copy_block), TensorDescriptor.from_tensor(x, [32, 32])),
        (GluonJITFunction(load_block), windows),
    ):
        yield Launch(partial(launched, kernel, (descriptor, out, 64), partial(encoded, descriptor)))


def test_the_launcher_in_c_is_passed_what_triton_passes() -> None:
    kernels = compile_launches(launch_both_ways, 90)
    assert [built.tma for built in kernels] == [False, True, True]


def test_a_kernel_that_needs_more_of_a_launch_is_triton_s() -> None:
    run = SimpleNamespace(global_scratch_size=0, profile_scratch_size=0, launch=print)
    for need in ({"global_scratch_size": 128}, {"profile_scratch_size": 128}, {"gsan_enabled": True}):
        compiled = SimpleNamespace(run=SimpleNamespace(**{**vars(run), **need}))
        assert internals.Launch.of(compiled, 0) is None
    assert internals.Launch.of(None, 0) is None


def test_names_of_torch_are_there_or_refuse_to_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.version.cuda is None:
        assert internals.fast_launch_reason() == "this torch is built without CUDA"
        with pytest.raises(RuntimeError, match="_cuda_getCurrentRawStream"):
            internals.current_stream(0)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        assert "no torch._C._cuda_getDevice and no torch._C._cuda_getCurrentRawStream" in internals.fast_launch_reason()
    else:
        assert internals.fast_launch_reason() == ""


def test_where_launches_stay_slow_a_gpu_user_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(internals, "fast_launch_reason", lambda: "Triton 4.0 is none of the releases")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fast_launch_module._log_once.cache_clear()
    kernel = JITFunction(copy)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert fast_launch_module.fast_launch(kernel) is kernel
    fast_launch_module._log_once.cache_clear()
    (record,) = caplog.records
    assert "by Triton's own path" in record.message
    assert "Triton 4.0" in record.message
