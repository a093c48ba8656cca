"""Launching a compiled kernel for a fraction of the host time of Triton's own path. Imported by kernel modules only.

Triton's `JITFunction.run` describes every argument and option as text, and encodes every tensor descriptor, on every
launch: 60 µs on a slow host, where a decode layer has three launches and computes for 25 µs. A `fast_launch` kernel
finds what was compiled by a key that is cheap to make, and calls the launcher that Triton made for it.
"""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor

from moe_dispatch.backends.triton_common import internals
from moe_dispatch.backends.triton_common.descriptors import encoded, kept_on
from moe_dispatch.backends.triton_common.internals import Launch
from moe_dispatch.backends.triton_common.stand_ins import Buffer, Extent, NotReplayableError

logger = logging.getLogger(__name__)

# Launches remembered by one kernel; when full, all are forgotten and asked of Triton again, which has its own cache.
MAX_REMEMBERED: Final = 4096
_TENSORS: Final = frozenset({Tensor, torch.nn.Parameter})
_LARGEST: Final = (1 << 31) - 1  # number of 32 bits


def fast_launch(kernel: Any) -> Any:
    """Make launches of a kernel cheap; the syntax stays: ``kernel[grid](…, CONST=…, num_warps=…)``.

    It goes on top of the kernel's own decorator, Triton's or Gluon's::

        @fast_launch
        @triton.jit(do_not_specialize=["S"])
        def _moe_…_kernel(…): …

    The first launch of a combination is Triton's own, and compiles. Later ones are found by names and values of the
    keyword arguments, and for each positional argument by its dtype and the last four bits of its address (a tensor on
    the current GPU), whether it is 1 or a multiple of 16 and how large it is (an int, of which the size alone counts
    where the kernel is not specialised on it), that it is None, or what a block of it is (a tensor descriptor of
    `Descriptors`). These decide all that Triton specialises on, so a kernel never runs on arguments that it was not
    compiled for, and a new token count is launched by what others left.
    Constants must be keyword arguments.

    Every other launch takes Triton's own path too: with floats, bools, other descriptors, tensors elsewhere or of other
    classes, while a profiler's hooks are set, in the interpreter, and where Triton is not one of the releases that
    `internals` was written for, which is logged. Triton's debugging switches count as of the first launch.
    """
    if not internals.is_jit_function(kernel):
        return kernel
    if reason := internals.fast_launch_reason():
        _log_once(reason)
        return kernel
    return FastKernel(kernel)


@functools.cache
def _log_once(reason: str) -> None:
    if torch.cuda.is_available():
        logger.warning("kernels are launched by Triton's own path, which takes the host longer: %s", reason)


# Is given what would be started, the grid and the positional arguments.
Writer = Callable[[Launch, tuple[Any, ...], tuple[Any, ...]], None]
_writers: dict[int, Writer] = {}  # by thread


@contextlib.contextmanager
def written_down(writer: Writer) -> Iterator[None]:
    """Start no `fast_launch` kernel of this thread, and give their launches to `writer`.

    Raises:
        NotReplayableError: Something is launched that was not compiled yet, or not by the launcher in C.
    """
    thread = threading.get_ident()
    _writers[thread] = writer
    try:
        yield
    finally:
        del _writers[thread]


class FastKernel:
    """A kernel under `fast_launch`; whatever else is asked of it, the kernel itself answers."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._has_key = False
        self._specialized = tuple(not param.do_not_specialize for param in kernel.params)
        self._launches: dict[tuple[Any, ...], Launch] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._run, grid)

    def _run(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        device = internals.current_device()
        key = [device, len(constants), *constants, *constants.values()]
        add, values, specialized = key.append, list(args), self._specialized
        for place, arg in enumerate(args):
            kind = type(arg)
            if kind in _TENSORS:
                if arg.get_device() != device:
                    self._run_ordinarily(grid, args, constants)
                    return
                # The launcher would ask the driver about the address of a tensor; it takes an int as it is.
                values[place] = address = arg.data_ptr()
                add((arg.dtype, address & 15) if address & 15 else arg.dtype)
            elif kind is int:
                # As Triton: 1 is a constant, multiples of 16 are known as such, and larger numbers have more bits.
                size = arg >> 31
                add(size if not specialized[place] else "1" if arg == 1 else 2 * size + (not arg & 15))
            elif arg is None:
                add(arg)
            elif kind is Buffer:
                add((arg.dtype, arg.offset & 15) if arg.offset & 15 else arg.dtype)  # its base is a multiple of 16
            elif kind is Extent:
                if specialized[place] or arg > _LARGEST:
                    raise NotReplayableError("a kernel is specialised on a number that depends on M")
                add(0)
            else:
                kept = kept_on(arg)
                if kept is None:
                    self._run_ordinarily(grid, args, constants)
                    return
                add(kept.kind)
        launch = self._launches.get(tuple(key))
        if launch is None or internals.launch_hooks():
            self._remember(tuple(key), self._run_ordinarily(grid, args, constants), len(args))
            return
        if _writers and (writer := _writers.get(threading.get_ident())):
            writer(launch, grid, args)
            return
        for place, encoding in launch.descriptors:
            values[place : place + 1] = encoded(values[place], encoding)
        values += launch.padding
        launch.start(grid, internals.current_stream(device), values)

    def _run_ordinarily(self, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> Any:
        if threading.get_ident() in _writers:
            raise NotReplayableError("a kernel would be launched by Triton itself")
        if not self._has_key:
            internals.make_cache_key(self.kernel)
            self._has_key = True
        return self.kernel[grid](*args, **constants)

    def _remember(self, key: tuple[Any, ...], compiled: Any, positional: int) -> None:
        """Keep what Triton launched, if `Launch` knows how to launch it."""
        rest = self.kernel.params[positional:]
        if not all(param.is_constexpr for param in rest):
            return
        try:
            launch = Launch.of(compiled, len(rest))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            _log_once(f"a compiled kernel is not what was read of Triton ({error!r})")
            return
        if launch:
            if len(self._launches) >= MAX_REMEMBERED:
                self._launches.clear()
            self._launches[key] = launch
