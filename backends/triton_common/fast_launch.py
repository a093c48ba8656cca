"""Launching a compiled kernel for a fraction of the host time of Triton's own path. Imported by kernel modules only.

Triton's `JITFunction.run` describes every argument and option as text, and encodes every tensor descriptor, on every
launch: 60 µs on a slow host, where a decode layer has three launches and computes for 25 µs. A `fast_launch` kernel
finds what was compiled by a key that is cheap to make, and calls the launcher that Triton made for it.
"""

import contextlib
import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

# A server that saw this many combinations of one kernel forgets them all; Triton keeps its own.
MAX_REMEMBERED: Final = 4096
_TENSORS: Final = frozenset({Tensor, torch.nn.Parameter})
_HELD: Final = "_moe_dispatch_held"


def fast_launch(kernel: Any) -> Any:
    """Make launches of a kernel cheap; the syntax stays: ``kernel[grid](…, CONST=…, num_warps=…)``.

    It goes on top of the kernel's own decorator, Triton's or Gluon's::

        @fast_launch
        @triton.jit(do_not_specialize=["S"])
        def _moe_…_kernel(…): …

    The first launch of a combination is Triton's own, and compiles. Later ones are found by names and values of the
    keyword arguments, and for each positional argument by its dtype and the last four bits of its address (a tensor on
    the current GPU), its value (an int, None), or what `hold` keeps on it (a tensor descriptor). These decide all that
    Triton specialises on, so a kernel never runs on arguments that it was not compiled for; an int that is a new one on
    every call gains nothing. Constants must be keyword arguments.

    Every other launch is Triton's own too: with floats, bools, tensors elsewhere or of other classes, while a
    profiler's hooks are set, in the interpreter, and where Triton is not one of the releases that this module was
    written for. Triton's debugging switches count as of the first launch.
    """
    return FastKernel(kernel) if _known_triton() and isinstance(kernel, JITFunction) else kernel


Observer = Callable[["Launch | None", tuple[int, ...], tuple[Any, ...]], None]
_observers: dict[int, Observer] = {}  # by thread


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Tell `observer` of this thread's launches of `fast_launch` kernels.

    It is given what is started (None: whatever Triton's path leads to), grid and positional arguments.
    """
    thread = threading.get_ident()
    _observers[thread] = observer
    try:
        yield
    finally:
        del _observers[thread]


def _tell(launch: "Launch | None", grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
    if observer := _observers.get(threading.get_ident()):
        observer(launch, grid, args)


def hold(descriptor: Any) -> Any:
    """Promise that a tensor descriptor, Triton's or Gluon's, will not change: it is then encoded once.

    Returns:
        The same object.
    """
    setattr(descriptor, _HELD, _Held(descriptor))
    return descriptor


@functools.cache
def _known_triton() -> bool:
    """Whether launchers are those that `Launch` was written for, read in Triton 3.6.0 and 3.7.1."""
    return triton.__version__.startswith(("3.6.", "3.7.")) and torch.version.cuda is not None


# What Triton's own driver asks, without its way there. Absent from a torch without CUDA.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda _device: 0)


class FastKernel:
    """A kernel under `fast_launch`; what else is asked of it, the kernel itself answers.

    Args:
        kernel: Triton's.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._launches: dict[tuple[Any, ...], Launch] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._run, grid)

    def _run(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        device = current_device()
        key = [device, tuple(constants), *constants.values()]
        values: list[Any] = []
        for arg in args:
            kind = type(arg)
            if kind in _TENSORS:
                if arg.get_device() != device:
                    self._run_ordinarily(grid, args, constants)
                    return
                # The launcher would ask the driver about the address of a tensor; it takes an int as it is.
                address = arg.data_ptr()
                values.append(address)
                key.append(arg.dtype)
                key.append(address & 15)
            elif kind is int or arg is None:
                values.append(arg)
                key.append(arg)
            else:
                held = getattr(arg, _HELD, None)
                if held is None:
                    self._run_ordinarily(grid, args, constants)
                    return
                values.append(arg)
                key.append(held.kind)
        launch = self._launches.get(tuple(key))
        if launch is None or profiling():
            self._remember(tuple(key), self._run_ordinarily(grid, args, constants), len(args))
            return
        if _observers:
            _tell(launch, grid, args)
        for place, encoding in launch.descriptors:
            values[place : place + 1] = encoded(values[place], encoding)
        values += launch.padding
        launch.start(grid, current_stream(device), values)

    def _run_ordinarily(self, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> Any:
        if _observers:
            _tell(None, grid, args)
        return self.kernel[grid](*args, **constants)

    def _remember(self, key: tuple[Any, ...], compiled: Any, given: int) -> None:
        """Keep what Triton launched, if it is what this module knows how to launch."""
        rest = self.kernel.params[given:]
        if not all(param.is_constexpr for param in rest):
            return
        try:
            launch = Launch.of(compiled, len(rest))
        except (AttributeError, KeyError, TypeError, ValueError):  # a Triton that is built in another way
            return
        if launch:
            if len(self._launches) >= MAX_REMEMBERED:
                self._launches.clear()
            self._launches[key] = launch


class Encoding(NamedTuple):
    """How a kernel wants a tensor descriptor: Triton's words, and the same as a key."""

    meta: dict[str, Any]
    key: str


class Launch(NamedTuple):
    """A compiled kernel, ready to be started.

    Attributes:
        launcher: Triton's, in C.
        fixed: Its arguments between the stream and the kernel's own.
        packed: Whether it takes the kernel's arguments as one.
        descriptors: Which of the kernel's arguments are tensor descriptors, last first: each becomes several.
        padding: In place of the constants, which the launcher counts and does not read.
    """

    launcher: Callable[..., None]
    fixed: tuple[Any, ...]
    packed: bool
    descriptors: tuple[tuple[int, Encoding], ...]
    padding: tuple[None, ...]

    def start(self, grid: tuple[int, ...], stream: int, values: list[Any]) -> None:
        """Launch on a stream; `values` are the kernel's arguments as the launcher takes them."""
        width, height, depth = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        if self.packed:
            self.launcher(width, height, depth, stream, *self.fixed, values)
        else:
            self.launcher(width, height, depth, stream, *self.fixed, *values)

    @classmethod
    def of(cls, compiled: Any, constants: int) -> "Launch | None":
        """From what Triton's own launch returned; None if it needs more than is known here."""
        run = getattr(compiled, "run", None)
        if run is None or run.global_scratch_size or run.profile_scratch_size:
            return None
        signature = compiled.src.signature.values()
        places = [place for place, kind in enumerate(signature) if str(kind).startswith("tensordesc")]
        launcher = run.launch
        metas = compiled.metadata.tensordesc_meta if places else []
        if places:
            # Triton wraps the launcher into a function that encodes the descriptors of every launch.
            launcher = inspect.getclosurevars(launcher).nonlocals["launcher"]
            if not metas or None in metas:  # no tensor memory accelerator: a descriptor is passed in another form
                return None
        encodings = [Encoding(meta, repr(sorted(meta.items()))) for meta in metas]
        packed = hasattr(run, "kernel_signature")  # since Triton 3.7
        hooks = (None, None, None)  # the launch's description, and hooks before and after it
        scratch = (None, None)
        start = (compiled.function, run.launch_cooperative_grid, run.launch_pdl)
        fixed: tuple[Any, ...] = (*start, *scratch, compiled.packed_metadata, *hooks)
        if packed:
            fixed = (*start, compiled.packed_metadata, *hooks, *scratch, run.arg_annotations, run.kernel_signature)
        descriptors = tuple(zip(places, encodings, strict=True))[::-1]
        return cls(launcher, fixed, packed, descriptors, (None,) * constants)


class _Held:
    """What `hold` keeps on a tensor descriptor.

    Attributes:
        kind: All that code may depend on: everything but address, shape and strides.
    """

    def __init__(self, descriptor: Any) -> None:
        fields = [field.name for field in dataclasses.fields(descriptor)]
        options = [repr(getattr(descriptor, name)) for name in fields if name not in ("base", "shape", "strides")]
        self.kind = (type(descriptor), descriptor.base.dtype, len(descriptor.shape), *options)
        self._encoded: dict[tuple[int, str], list[Any]] = {}

    def encoded(self, descriptor: Any, encoding: Encoding) -> list[Any]:
        """The kernel's arguments for the descriptor; made anew if its memory has moved."""
        key = descriptor.base.data_ptr(), encoding.key
        found = self._encoded.get(key)
        if found is None:
            from triton.backends.nvidia.driver import make_tensordesc_arg

            if any(address != key[0] for address, _ in self._encoded):
                self._encoded = {}
            found = self._encoded[key] = make_tensordesc_arg(descriptor, encoding.meta)
        return found


def encoded(descriptor: Any, encoding: Encoding) -> list[Any]:
    """The kernel's arguments for a held tensor descriptor: the encoded one, sizes, strides."""
    held: _Held = getattr(descriptor, _HELD)
    return held.encoded(descriptor, encoding)


def profiling() -> bool:
    """Whether somebody wants to be told of every launch by Triton."""
    before, after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    # A chain of hooks, or whatever else has been put in its place.
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))
