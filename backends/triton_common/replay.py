"""Replays: a layer's launches written down once and repeated, which is to the host what a CUDA graph is to the GPU.

Between two calls of one kind (kind of layer, token count, dtypes, configuration) the host does the same work again, and
only addresses differ. A `Replay` holds the launches of a call with everything else filled in, so that the host spends
its time on two allocations and on the launches themselves.

How one is made: `record` runs the backend once more, on a kind of call that it has run before, and watches every launch
and every allocation. Each address in a launch is then traced to its base: an input, a weight, an intermediate, the
output. Intermediates become places in one block of scratch memory. Last, the replay runs over poisoned memory and has
to give what the run gave; whatever it did not see, like work on the device that is no launch of a `fast_launch` kernel,
shows as another result or was refused before. Another token count whose launches are the same code over the same bases
is not tried so again, since that takes the host longer than all else.

When one is valid: for calls of the kind that it was recorded for, of any layer of that kind, with any tensors. It takes
the address of each tensor, weights included, anew on every call, and the tensor map of a weight by that address; so
weights may be replaced (``weight.data = …``) between calls. What code was compiled for is checked on every call:
addresses that are multiples of 16 bytes, dtype, shape and strides of each weight, the GPU. Where one of these differs,
or a profiler wants to see the launches, the call is left to the backend. Whether the output is fresh memory or the
caller's is for each call to say: it is one more address.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_dispatch.backend import Backend, BackendConfig, Inputs
from moe_dispatch.backends.triton_common import internals
from moe_dispatch.backends.triton_common.descriptors import (
    MAX_DESCRIPTORS,
    Descriptors,
    View,
    encoded,
    kept_on,
)
from moe_dispatch.backends.triton_common.fast_launch import observed
from moe_dispatch.backends.triton_common.internals import Encoding, Launch
from moe_dispatch.experts import ExpertWeights

_WEIGHTS: Final = ("gate_up", "down", "gate_up_scale", "down_scale", "gate_up_bias", "down_bias")
_FIRST_WEIGHT: Final = 3  # the number of the first weight among the bases of addresses, see `Replay`
_ALIGNMENT: Final = 256  # bytes on which each intermediate starts in the block of scratch memory
MAX_TRIED: Final = 1024  # replays kept by their structure; when full, all are dropped and later ones tried again
_POISON: Final = 0xFF  # a byte; floats of such bytes are NaN
_aten: Final = torch.ops.aten
_ALLOCATIONS: Final = frozenset({
    _aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default, _aten.new_empty.default,
    _aten.new_empty_strided.default,
})  # fmt: skip


class NotReplayableError(Exception):
    """Why a run cannot be repeated as a replay."""


# Replays by their structure, see `Replay.structure`.
Tried = dict[tuple[object, ...], "Replay"]


def record(backend: Backend, inputs: Inputs, config: BackendConfig, descriptors: Descriptors, tried: Tried) -> "Replay":
    """Run a backend once more on a kind of call that it has run before, and make a replay of it.

    Args:
        backend: One whose `run` does nothing on the device but launch `fast_launch` kernels; else this finds out.
        inputs: hidden_states, experts, topk_weights, topk_ids.
        config: The configuration of the run.
        descriptors: Where the backend takes tensor descriptors of weights from.
        tried: The backend's replays that gave what the run gave; this one is added.

    Raises:
        NotReplayableError: A launch took Triton's own path, torch computed something, a launch has an address of
            unknown origin, or the replay's result is not the run's.
    """
    recording = _Recording()
    with observed(recording.launched), recording:
        expected = backend.run(*inputs, config)
    replay = _Writer(recording, inputs, expected).build(backend, descriptors)
    if (structure := replay.structure()) not in tried:
        replayed = replay.replay(*inputs, poison=True)
        if replayed is None or not _agree(replayed, expected, backend, config, inputs[1]):
            raise NotReplayableError("the replay's result is not the run's")
        if len(tried) >= MAX_TRIED:
            tried.clear()
        tried[structure] = replay
    return replay


def _agree(replayed: Tensor, expected: Tensor, backend: Backend, config: BackendConfig, experts: ExpertWeights) -> bool:
    if backend.deterministic(config):
        return torch.equal(replayed.view(torch.uint8), expected.view(torch.uint8))  # as bytes, NaN equals NaN
    difference = (replayed.float() - expected.float()).norm()
    return bool(difference <= backend.tolerance[experts.dtype] * expected.float().norm())


class _Recording(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch does not annotate it
    """Everything that a run launches and allocates."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch does not annotate it
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


class Weight(NamedTuple):
    """A tensor of the layer, as the launches need it.

    Attributes:
        name: An attribute of `ExpertWeights`.
        dtype: Its dtype.
        shape: Its shape.
        strides: Its strides in elements.
    """

    name: str
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _TensorMap:
    """An encoded tensor descriptor of a weight among a launch's arguments.

    Attributes:
        place: Its place among the arguments. The sizes and strides that follow it depend on the kind of call alone.
        base: The number of the weight's base.
        weight: The weight's name.
        view: How the kernel sees it.
        encoding: How the kernel wants it.
        by_address: The encoded descriptors of the weights seen so far.
    """

    place: int
    base: int
    weight: str
    view: View
    encoding: Encoding
    by_address: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Step:
    """One launch.

    Attributes:
        launch: What is started.
        grid: Width, height, depth.
        values: Its arguments, complete but for addresses and tensor maps.
        addresses: For each address among them its place, the number of its base, and the distance from that in bytes.
        maps: The tensor maps among them.
    """

    launch: Launch
    grid: tuple[int, int, int]
    values: list[Any]
    addresses: tuple[tuple[int, int, int], ...]
    maps: tuple[_TensorMap, ...]


@dataclass(frozen=True, eq=False)
class Replay:
    """A layer's launches, for calls of one kind; see the module.

    Every address in a launch is a base and a distance from it. The bases are, in this order, the addresses of
    hidden_states, topk_weights, topk_ids, of each weight of `weights`, of the scratch memory and of the output.

    Attributes:
        backend: The backend, for calls that the replay does not fit.
        descriptors: The backend's tensor descriptors.
        device: The GPU's number.
        weights: The layer's tensors.
        scratch: Elements of hidden_states' dtype that hold all intermediates.
        steps: The launches.
    """

    backend: Backend
    descriptors: Descriptors
    device: int
    weights: tuple[Weight, ...]
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
        return self.backend.run(hidden_states, experts, topk_weights, topk_ids, config) if out is None else out

    def into(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,
        out: Tensor,
    ) -> Tensor:
        """As `Backend.run_into`."""
        if self.replay(hidden_states, experts, topk_weights, topk_ids, out) is None:
            return self.backend.run_into(hidden_states, experts, topk_weights, topk_ids, config, out)
        return out

    def replay(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        out: Tensor | None = None,
        *,
        poison: bool = False,
    ) -> Tensor | None:
        """Launch everything; None, with nothing launched, where the replay does not fit.

        Args:
            hidden_states: As for `Backend.run`.
            experts: As for `Backend.run`.
            topk_weights: As for `Backend.run`.
            topk_ids: As for `Backend.run`.
            out: As for `Backend.run_into`; None for fresh memory.
            poison: Fill the scratch memory and the output with NaN before.

        Raises:
            InvalidInputError: A weight was replaced by memory of another size or layout; see `WeightView.describe`.
        """
        bases = [hidden_states.data_ptr(), topk_weights.data_ptr(), topk_ids.data_ptr()]
        for name, dtype, shape, strides in self.weights:
            tensor = getattr(experts, name)
            if tensor.dtype is not dtype or tensor.shape != shape or tensor.stride() != strides:
                return None
            bases.append(tensor.data_ptr())
        bits = 0
        for base in bases:
            bits |= base
        if out is not None:
            bits |= out.data_ptr()
        device = internals.current_device()
        if bits & 15 or device != self.device or internals.launch_hooks():
            return None
        scratch = hidden_states.new_empty(self.scratch)
        if out is None:
            out = torch.empty_like(hidden_states)
        if poison:
            for tensor in (scratch, out):
                tensor.view(torch.uint8).fill_(_POISON)
        bases += (scratch.data_ptr(), out.data_ptr())
        stream = internals.current_stream(device)
        for step in self.steps:
            values = step.values.copy()
            for place, base, distance in step.addresses:
                values[place] = bases[base] + distance
            for each in step.maps:
                address = bases[each.base]
                tensor_map = each.by_address.get(address)
                values[each.place] = self._encode(each, experts, address) if tensor_map is None else tensor_map
            step.launch.start(step.grid, stream, values)
        return out

    def structure(self) -> tuple[object, ...]:
        """What replays of other token counts share: the code of each launch, and the base of each of its addresses."""
        return (
            self.device,
            self.weights,
            *[
                (
                    id(step.launch),
                    *[address[:2] for address in step.addresses],
                    *[(each.place, each.base) for each in step.maps],
                )
                for step in self.steps
            ],
        )

    def _encode(self, each: _TensorMap, experts: ExpertWeights, address: int) -> Any:
        descriptor = self.descriptors.get(getattr(experts, each.weight), each.view)
        if len(each.by_address) >= MAX_DESCRIPTORS:
            each.by_address.clear()
        tensor_map = each.by_address[address] = encoded(descriptor, each.encoding)[0]
        return tensor_map


class _Writer:
    """Makes a replay of a recording: finds out where each address comes from."""

    def __init__(self, recording: _Recording, inputs: Inputs, out: Tensor) -> None:
        hidden_states, self._experts, topk_weights, topk_ids = inputs
        self._recording, self._hidden_states, self._out = recording, hidden_states, out
        self._names = [name for name in _WEIGHTS if getattr(self._experts, name) is not None]
        weights = [getattr(self._experts, name) for name in self._names]
        tensors = (hidden_states, topk_weights, topk_ids, *weights)
        # Memory of known origin: its first address and its end, the number of its base, and the distance from the one
        # address to the other.
        self._origins: list[tuple[int, int, int, int]] = []
        for base, tensor in enumerate(tensors):
            self._add_origin(tensor.data_ptr(), tensor.nbytes, base, 0)
        self._place_allocations(scratch=len(tensors))

    def build(self, backend: Backend, descriptors: Descriptors) -> Replay:
        device = self._hidden_states.get_device()
        tensors = [getattr(self._experts, name) for name in self._names]
        weights = tuple(
            Weight(name, tensor.dtype, tensor.shape, tensor.stride())
            for name, tensor in zip(self._names, tensors, strict=True)
        )
        steps = tuple(self._step(*launched) for launched in self._recording.launches)
        if not steps:
            raise NotReplayableError("no `fast_launch` kernel was launched")
        scratch = math.ceil(self._scratch / self._hidden_states.element_size())
        return Replay(backend, descriptors, device, weights, scratch, steps)

    def _add_origin(self, address: int, size: int, base: int, start: int) -> None:
        self._origins.append((address, address + size, base, start - address))

    def _place_allocations(self, scratch: int) -> None:
        """One block of scratch memory for every allocation but the output, which stays one of its own."""
        self._scratch = 0
        output_is_fresh = False
        like = self._hidden_states
        for tensor in self._recording.allocations:
            storage = tensor.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
            if address == self._out.data_ptr() and (self._out.shape, self._out.dtype) == (like.shape, like.dtype):
                output_is_fresh = self._out.is_contiguous()
                self._add_origin(address, size, scratch + 1, 0)
            else:
                self._add_origin(address, size, scratch, self._scratch)
                self._scratch += math.ceil(size / _ALIGNMENT) * _ALIGNMENT
        if not output_is_fresh:
            raise NotReplayableError("the output is not fresh memory of its own")

    def _step(self, launch: Launch, grid: tuple[int, ...], args: tuple[Any, ...]) -> _Step:
        encodings = dict(launch.descriptors)
        values: list[Any] = []
        addresses: list[tuple[int, int, int]] = []
        maps: list[_TensorMap] = []
        for place, arg in enumerate(args):
            if isinstance(arg, Tensor):
                addresses.append((len(values), *self._origin(arg.data_ptr())))
                values.append(0)
            elif place in encodings:
                maps.append(self._tensor_map(len(values), arg, encodings[place]))
                values += encoded(arg, encodings[place])
            else:
                values.append(arg)
        width, height, depth = (*grid, 1, 1)[:3]
        return _Step(launch, (width, height, depth), [*values, *launch.padding], tuple(addresses), tuple(maps))

    def _tensor_map(self, place: int, descriptor: Any, encoding: Encoding) -> _TensorMap:
        kept = kept_on(descriptor)
        base, distance = self._origin(descriptor.base.data_ptr())
        weight = base - _FIRST_WEIGHT
        if kept is None or distance or not 0 <= weight < len(self._names):
            raise NotReplayableError("a tensor descriptor does not describe a weight of the layer")
        return _TensorMap(place, base, self._names[weight], kept.view, encoding)

    def _origin(self, address: int) -> tuple[int, int]:
        """The base that an address counts from, and its distance."""
        origins = {(base, address + shift) for first, end, base, shift in self._origins if first <= address < end}
        if len(origins) != 1:
            raise NotReplayableError("memory of unknown origin" if not origins else "two inputs share memory")
        return origins.pop()
