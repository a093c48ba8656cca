"""What this package knows of Triton's insides, and of the names of torch that Triton's own driver takes.

Everything private is here, so that a new release means reading one module again. It was read in the releases of
`features.READ_TRITON_RELEASES`; on any other, `fast_launch_reason` says why kernels are launched by Triton's public
path alone. Imported by kernel modules and by what serves them: it needs Triton.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType, ModuleType
from typing import Any, Final, NamedTuple, NoReturn

import torch
import triton
from triton import knobs
from triton.runtime.jit import JITCallable, JITFunction

from moe_dispatch.backends.triton_common.features import unread_triton_reason

_TORCH_NAMES: Final = ("_cuda_getDevice", "_cuda_getCurrentRawStream")


def fast_launch_reason() -> str:
    """Why launchers cannot be called directly here; empty where they can."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    absent = [name for name in _TORCH_NAMES if not hasattr(torch._C, name)]
    if absent:
        return f"torch {torch.__version__} has no torch._C.{' and no torch._C.'.join(absent)}"
    return unread_triton_reason(triton.__version__)


def is_jit_function(kernel: object) -> bool:
    """Whether a kernel is compiled, by Triton or Gluon; in the interpreter it is not."""
    return isinstance(kernel, JITFunction)


def make_cache_key(kernel: Any) -> None:
    """Have Triton make a kernel's key in its cache on disk after those of all functions that the kernel calls.

    A key covers the global constants that these functions use. But Triton 3.6 and 3.7 see only the constants of
    functions whose own keys were made before (`DependenciesFinder._update_hash`). So a kernel that shares functions
    with others would have one key or another, and be compiled once more, by what its process has launched before.
    """
    seen: set[int] = set()

    def make(function: Any) -> None:
        seen.add(id(function))
        for called in _called(function):
            if id(called) not in seen:
                make(called)
        function.cache_key  # noqa: B018 - made when it is first asked for

    make(kernel)


def _called(function: Any) -> Iterator[Any]:
    """The functions of Triton that a function may call: all that its code has a name of."""
    variables = inspect.getclosurevars(function.fn).nonlocals | function.fn.__globals__
    names = set(_names(function.fn.__code__))
    for value in [variables[name] for name in sorted(names & variables.keys())]:
        if isinstance(value, ModuleType):
            members = [getattr(value, name, None) for name in sorted(names)]
        else:
            members = [value, *getattr(value, "hash_attrs", ())]  # those of an aggregate
        yield from (each for each in members if isinstance(each, JITCallable))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names + code.co_freevars
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _torch_function(name: str) -> Callable[..., int]:
    def absent(*_: object) -> NoReturn:
        raise RuntimeError(f"torch {torch.__version__} has no torch._C.{name}: {fast_launch_reason()}")

    function: Callable[..., int] = getattr(torch._C, name, absent)
    return function


# The number of the current GPU, and the handle of its current stream: what Triton's driver asks, without the way there.
current_device: Callable[[], int] = _torch_function("_cuda_getDevice")
current_stream: Callable[[int], int] = _torch_function("_cuda_getCurrentRawStream")


def launch_hooks() -> bool:
    """Whether a profiler has asked Triton to be told of every launch."""
    before, after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    # Each is a chain of hooks, unless it was replaced by a plain function.
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


def lowers_for(*architectures: str) -> bool:
    """Whether Triton was told (TRITON_OVERRIDE_ARCH) to compile for one of these, whatever the device is."""
    return knobs.runtime.override_arch in architectures


class Encoding(NamedTuple):
    """How a compiled kernel wants one of its tensor descriptors.

    Attributes:
        meta: What Triton's encoder is told: swizzle, element size and type, box.
        key: The same as a string, which can be a key.
    """

    meta: dict[str, Any]
    key: str


class Launch(NamedTuple):
    """A compiled kernel, ready to be started.

    Attributes:
        launcher: Triton's function in C that starts a kernel.
        fixed: Its arguments between the stream and the kernel's own.
        packed: Whether it takes the kernel's arguments as one list, since Triton 3.7.
        descriptors: Which of the kernel's arguments are tensor descriptors, last first: each becomes several.
        padding: What stands for the constants, which the launcher counts and does not read.
        compiled: Triton's compiled kernel, kept because Triton 3.8 unloads the code of one that is freed.
    """

    launcher: Callable[..., None]
    fixed: tuple[Any, ...]
    packed: bool
    descriptors: tuple[tuple[int, Encoding], ...]
    padding: tuple[None, ...]
    compiled: Any

    def start(self, grid: tuple[int, ...], stream: int, values: list[Any]) -> None:
        """Launch on a stream; `values` are the kernel's arguments as the launcher takes them."""
        width, height, depth = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        if self.packed:
            self.launcher(width, height, depth, stream, *self.fixed, values)
        else:
            self.launcher(width, height, depth, stream, *self.fixed, *values)

    @classmethod
    def of(cls, compiled: Any, constants: int) -> "Launch | None":
        """From what Triton's own launch returned; None if a launch needs more than is known here.

        Args:
            compiled: Triton's compiled kernel; None where Triton compiles in the background.
            constants: How many of the kernel's parameters are constants.
        """
        run = getattr(compiled, "run", None)
        if run is None or run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
            return None
        signature = compiled.src.signature.values()
        places = [place for place, kind in enumerate(signature) if str(kind).startswith("tensordesc")]
        launcher = run.launch
        metas = compiled.metadata.tensordesc_meta if places else []
        if places:
            # Triton wraps the launcher into a function that encodes the descriptors of every launch.
            launcher = inspect.getclosurevars(launcher).nonlocals["launcher"]
            if not metas or None in metas:  # a device without TMA, where a descriptor is passed in another form
                return None
        encodings = [Encoding(meta, repr(sorted(meta.items()))) for meta in metas]
        packed = hasattr(run, "kernel_signature")
        hooks = (None, None, None)  # the launch's description, and hooks before and after it
        scratch = (None, None)  # global and profiler's
        start = (compiled.function, run.launch_cooperative_grid, run.launch_pdl)
        fixed: tuple[Any, ...] = (*start, *scratch, compiled.packed_metadata, *hooks)
        if packed:
            fixed = (*start, compiled.packed_metadata, *hooks, *scratch, run.arg_annotations, run.kernel_signature)
        descriptors = tuple(zip(places, encodings, strict=True))[::-1]
        return cls(launcher, fixed, packed, descriptors, (None,) * constants, compiled)


def encode(descriptor: Any, encoding: Encoding) -> list[Any]:
    """The kernel's arguments for a tensor descriptor: the CUtensorMap, sizes, strides."""
    arguments: list[Any] = _encoder()(descriptor, encoding.meta)
    return arguments


def tensor_map(descriptor: Any, encoding: Encoding) -> Any:
    """The first of the arguments that `encode` gives, which alone depends on the address."""
    return encode(descriptor, encoding)[0]


def after_map(descriptor: Any) -> tuple[int, ...]:
    """The other arguments that `encode` gives."""
    return (*descriptor.shape, *descriptor.strides)


@functools.cache
def _encoder() -> Callable[[Any, dict[str, Any]], list[Any]]:
    from triton.backends.nvidia.driver import make_tensordesc_arg

    parameters = len(inspect.signature(make_tensordesc_arg).parameters)
    if parameters == 2:
        return make_tensordesc_arg  # type: ignore[no-any-return]
    # Since Triton 3.8 a third is the launcher's base arguments, which the encoder for NVIDIA does not use.
    return lambda descriptor, meta: make_tensordesc_arg(descriptor, meta, None)
