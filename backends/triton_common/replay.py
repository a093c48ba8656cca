"""The launches of a layer, written down once and played back: what a CUDA graph is to the device, for the host.

Between two calls of one kind (kind of layer, token count, dtypes, configuration) nothing of the host's work differs but
addresses. A `Replay` holds the launches with everything else filled in, so that a call costs the host two allocations
and the launches themselves. It is made from one recorded run, and proven by playing it over poisoned memory.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_dispatch.backend import Backend, BackendConfig
from moe_dispatch.backends.triton_common.fast_launch import (
    Encoding,
    Launch,
    current_device,
    current_stream,
    encoded,
    observed,
    profiling,
)
from moe_dispatch.experts import ExpertWeights

_WEIGHTS: Final = ("gate_up", "down", "gate_up_scale", "down_scale", "gate_up_bias", "down_bias")
_ALIGNMENT: Final = 256  # of each intermediate in the one block of scratch memory
_POISON: Final = 0xFF  # NaN in every float
_aten: Final = torch.ops.aten
_ALLOCATIONS: Final = frozenset({
    _aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default, _aten.new_empty.default,
    _aten.new_empty_strided.default,
})  # fmt: skip

Inputs = tuple[Tensor, ExpertWeights, Tensor, Tensor]
# A layer's tensor descriptor by what `TritonBackend._descriptor` was asked for.
DescriptorKey = tuple[Any, ...]
Describe = Callable[[ExpertWeights, DescriptorKey], Any]


class NotReplayableError(Exception):
    """Why a run cannot be played back."""


def record(
    backend: Backend,
    inputs: Inputs,
    config: BackendConfig,
    descriptors: Mapping[DescriptorKey, Any],
    describe: Describe,
) -> "Replay":
    """Run a backend once more on inputs that it has run on before, and make a replay of it.

    Args:
        backend: Does nothing on the device but launch `fast_launch` kernels; else the recording finds out.
        inputs: hidden_states, experts, topk_weights, topk_ids.
        config: Of the run.
        descriptors: Those that the backend keeps of this layer.
        describe: Gives those of another layer.

    Raises:
        NotReplayableError: A launch took Triton's own path, torch computed something, memory of unknown origin is
            involved, or the replay's result is another.
    """
    recording = _Recording()
    with observed(recording.launched), recording:
        expected = backend.run(*inputs, config)
    replay = _Writer(recording, inputs, expected, descriptors).build(backend, describe)
    replayed = replay.replay(*inputs, poison=True)
    if replayed is None or not _agree(replayed, expected, backend, config, inputs[1]):
        raise NotReplayableError("the replay's result is not the run's")
    return replay


def _agree(replayed: Tensor, expected: Tensor, backend: Backend, config: BackendConfig, experts: ExpertWeights) -> bool:
    if backend.deterministic(config):
        return torch.equal(replayed.view(torch.uint8), expected.view(torch.uint8))  # NaN for NaN, too
    difference = (replayed.float() - expected.float()).norm()
    return bool(difference <= backend.tolerance[experts.dtype] * expected.float().norm())


class _Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Everything that a run launches and allocates."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[tuple[Launch, tuple[int, ...], tuple[Any, ...]]] = []
        self.allocations: list[Tensor] = []  # kept alive, so that no two share an address

    def launched(self, launch: Launch | None, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        if launch is None:
            raise NotReplayableError("a kernel was launched by Triton itself")
        self.launches.append((launch, grid, args))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.allocations.append(result)
        elif not func.is_view:
            raise NotReplayableError(f"torch runs {func}")
        return result


@dataclass(frozen=True)
class _Step:
    """One launch.

    Attributes:
        launch: What is started.
        grid: Width, height, depth.
        values: Its arguments, complete but for addresses and tensor maps.
        addresses: For each address among them: its place, the number of its base, and the distance from that.
        maps: For each encoded tensor descriptor among them: its place, the descriptor's key, and the encoding.
    """

    launch: Launch
    grid: tuple[int, int, int]
    values: list[Any]
    addresses: tuple[tuple[int, int, int], ...]
    maps: tuple[tuple[int, DescriptorKey, Encoding], ...]


@dataclass(frozen=True, eq=False)
class Replay:
    """A layer's launches, for calls of one kind.

    Addresses count from bases, in this order: hidden_states, topk_weights, topk_ids, the weights that are used, scratch
    memory, the output.

    Attributes:
        run: The backend's, where the replay does not fit: a misaligned tensor, biases of another dtype, another GPU, a
            profiler.
        describe: See `record`.
        device: The GPU's number.
        weights: Names and dtypes of the layer's tensors that are used.
        scratch: Elements of hidden_states' dtype that hold all intermediates.
        steps: The launches.
    """

    run: Callable[..., Tensor]
    describe: Describe
    device: int
    weights: tuple[tuple[str, torch.dtype], ...]
    scratch: int
    steps: tuple[_Step, ...]

    def __call__(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,
    ) -> Tensor:
        """As `Backend.run`."""
        out = self.replay(hidden_states, experts, topk_weights, topk_ids)
        return self.run(hidden_states, experts, topk_weights, topk_ids, config) if out is None else out

    def replay(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        poison: bool = False,
    ) -> Tensor | None:
        """Launch everything; None, with nothing launched, where the replay does not fit."""
        bases = [hidden_states.data_ptr(), topk_weights.data_ptr(), topk_ids.data_ptr()]
        for name, dtype in self.weights:
            tensor = getattr(experts, name)
            if tensor.dtype is not dtype:
                return None
            bases.append(tensor.data_ptr())
        bits = 0
        for base in bases:
            bits |= base
        device = current_device()
        if bits & 15 or device != self.device or profiling():
            return None
        scratch = hidden_states.new_empty(self.scratch)
        out = torch.empty_like(hidden_states)
        if poison:
            for tensor in (scratch, out):
                tensor.view(torch.uint8).fill_(_POISON)
        bases += (scratch.data_ptr(), out.data_ptr())
        stream = current_stream(device)
        for step in self.steps:
            values = step.values.copy()
            for place, base, distance in step.addresses:
                values[place] = bases[base] + distance
            for place, key, encoding in step.maps:
                values[place] = encoded(self.describe(experts, key), encoding)[0]
            step.launch.start(step.grid, stream, values)
        return out


class _Writer:
    """Makes a replay of a recording: finds out where each address comes from."""

    def __init__(
        self, recording: _Recording, inputs: Inputs, out: Tensor, descriptors: Mapping[DescriptorKey, Any]
    ) -> None:
        hidden_states, self._experts, topk_weights, topk_ids = inputs
        self._recording, self._hidden_states, self._out = recording, hidden_states, out
        self._keys = {id(descriptor): key for key, descriptor in descriptors.items()}
        self._names = [name for name in _WEIGHTS if getattr(self._experts, name) is not None]
        named = [getattr(self._experts, name) for name in self._names]
        given = (hidden_states, topk_weights, topk_ids, *named)
        self._bases = [_Span(tensor.data_ptr(), tensor.nbytes, base, 0) for base, tensor in enumerate(given)]
        self._place_allocations()

    def build(self, backend: Backend, describe: Describe) -> Replay:
        device = self._hidden_states.get_device()
        dtypes = [getattr(self._experts, name).dtype for name in self._names]
        weights = tuple(zip(self._names, dtypes, strict=True))
        steps = tuple(self._step(*launched) for launched in self._recording.launches)
        if not steps:
            raise NotReplayableError("no `fast_launch` kernel was launched")
        scratch = math.ceil(self._scratch / self._hidden_states.element_size())
        return Replay(backend.run, describe, device, weights, scratch, steps)

    def _place_allocations(self) -> None:
        """One block of scratch memory for all of them but the output, which stays for itself."""
        scratch = len(self._bases)
        self._scratch = 0
        found = False
        like = self._hidden_states
        for tensor in self._recording.allocations:
            address, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
            if address == self._out.data_ptr() and (self._out.shape, self._out.dtype) == (like.shape, like.dtype):
                found = self._out.is_contiguous()
                self._bases.append(_Span(address, size, scratch + 1, 0))
            else:
                self._bases.append(_Span(address, size, scratch, self._scratch))
                self._scratch += math.ceil(size / _ALIGNMENT) * _ALIGNMENT
        if not found:
            raise NotReplayableError("the output is not fresh memory of its own")

    def _step(self, launch: Launch, grid: tuple[int, ...], args: tuple[Any, ...]) -> _Step:
        encodings = dict(launch.descriptors)
        values: list[Any] = []
        addresses: list[tuple[int, int, int]] = []
        maps: list[tuple[int, DescriptorKey, Encoding]] = []
        for place, arg in enumerate(args):
            if isinstance(arg, Tensor):
                addresses.append((len(values), *self._origin(arg)))
                values.append(0)
            elif place in encodings:
                key = self._keys.get(id(arg))
                if key is None:
                    raise NotReplayableError("a tensor descriptor is not one that the backend keeps")
                maps.append((len(values), key, encodings[place]))
                values += encoded(arg, encodings[place])
            else:
                values.append(arg)
        width, height, depth = (*grid, 1, 1)[:3]
        return _Step(launch, (width, height, depth), [*values, *launch.padding], tuple(addresses), tuple(maps))

    def _origin(self, tensor: Tensor) -> tuple[int, int]:
        """Base and distance of a tensor's address."""
        address = tensor.data_ptr()
        origins = {(span.base, span.start + address - span.address) for span in self._bases if address in span}
        if len(origins) != 1:
            raise NotReplayableError("memory of unknown origin" if not origins else "two inputs share memory")
        return origins.pop()


@dataclass(frozen=True)
class _Span:
    """Memory of known origin: `size` bytes from `address`, which lie `start` bytes after a base."""

    address: int
    size: int
    base: int
    start: int

    def __contains__(self, address: int) -> bool:
        return self.address <= address < self.address + self.size
