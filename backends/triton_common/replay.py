"""Replays: a layer's launches written down once and repeated, which is to the host what a CUDA graph is to the GPU.

Between two calls of one kind of layer the host does the same work again, and only addresses differ, and the numbers
that depend on the token count M. A `Replay` holds the launches with everything else filled in, for all token counts of
a range, so that the host spends its time on two allocations and on the launches themselves.

How one is made: `record` runs the backend once more on a kind of call that it has run before, with `stand_ins` in place
of tensors. Launches are written down instead of started. Where one has a buffer, an address is left open: a base (an
input, a weight, an intermediate, the output) and the distance from it. Intermediates become places in one block of
scratch memory. Last, the replay runs over poisoned memory and has to give what a run gives, on as few rows of the call
as its range has, so that a first call with many tokens needs no more memory than others.

When one is valid: for calls of its range and kind, of any layer of that kind, with any tensors. It takes the address of
each tensor, weights included, anew on every call, and tensor maps by the address; so weights may be replaced
(``weight.data = …``) between calls. What code was compiled for is checked on every call: addresses that are multiples
of 16 bytes, dtype, shape and strides of each weight, the GPU. Where one of these differs, or a profiler wants to see
the launches, the call is left to the backend.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from moe_dispatch.backend import Backend, BackendConfig, Inputs
from moe_dispatch.backends.triton_common import internals
from moe_dispatch.backends.triton_common.descriptors import MAX_DESCRIPTORS, Memory, with_base
from moe_dispatch.backends.triton_common.fast_launch import written_down
from moe_dispatch.backends.triton_common.internals import Encoding, Launch
from moe_dispatch.backends.triton_common.stand_ins import Buffer, Extent, NotReplayableError, TokenRange
from moe_dispatch.dispatch.waiting import Waiting
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.guard import foreign_errors
from moe_dispatch.system import failures

logger = logging.getLogger(__name__)

_INPUTS: Final = 3  # bases before those of the weights, see `Replay`
_ALIGNMENT: Final = 256  # bytes on which each intermediate starts in the block of scratch memory
MAX_SIZES: Final = 4096  # token counts whose sizes a replay keeps; when full, all are dropped and computed again
_VERIFIED_ROWS: Final = 256  # rows on which a replay is verified, where its range has such token counts
_POISON: Final = 0xFF  # a byte; floats of such bytes are NaN


def record(backend: Backend, launch: Callable[..., Any], inputs: Inputs, config: BackendConfig) -> "Replay":
    """Make a replay of a backend's `TritonBackend.launch` on a kind of call that it has run before.

    Raises:
        NotReplayableError: The run does something that cannot be played back: a launch by Triton itself, an operation
            of torch, memory of unknown origin; or the replay's result is not the run's.
    """
    hidden_states, experts, topk_weights, topk_ids = inputs
    (M, K), topk = hidden_states.shape, topk_ids.shape[1]
    weights = tuple((name, tensor.dtype, tensor.shape, tensor.stride()) for name, tensor in experts.tensors())
    addresses = [tensor.data_ptr() for _, tensor in experts.tensors()]
    tokens = TokenRange(M)
    rows = Extent(tokens)
    sizes: list[int | Extent] = [0] * (_INPUTS + len(weights) + 1)
    shapes = ((hidden_states, (rows, K)), (topk_weights, (rows, topk)), (topk_ids, (rows, topk)))
    x, scores, ids = (Buffer(sizes, base, tensor.dtype, shape) for base, (tensor, shape) in enumerate(shapes))
    out = Buffer(sizes, _INPUTS + len(weights), hidden_states.dtype, (rows, K))
    steps: list[_Step] = []

    def write(kernel: Launch, grid: tuple[Any, ...], args: tuple[Any, ...]) -> None:
        steps.append(_step(kernel, grid, args, addresses))

    try:
        with written_down(write):
            result = launch(x, experts, scores, ids, config, out)
    except (AttributeError, TypeError) as error:
        raise NotReplayableError(f"it does what only tensors can do ({error})") from error
    if result is not out or not steps:
        raise NotReplayableError("no launch of a `fast_launch` kernel writes its output")
    intermediates = tuple(
        size if isinstance(size, Extent) else Extent(tokens, scale=0, shift=size)
        for size in sizes[_INPUTS + len(weights) + 1 :]
    )
    replay = Replay(launch, hidden_states.get_device(), weights, tokens, intermediates, tuple(steps))
    count = min(M, max(tokens.first, _VERIFIED_ROWS))
    hidden_states, topk_weights, topk_ids = hidden_states[:count], topk_weights[:count], topk_ids[:count]
    replayed, expected = torch.empty_like(hidden_states), torch.empty_like(hidden_states)
    few = hidden_states, experts, topk_weights, topk_ids
    launch(*few, config, expected)
    if not replay.play(*few, replayed, poison=True) or not _agree(replayed, expected, backend, config, experts):
        raise NotReplayableError("the replay's result is not the run's")
    return replay


def _agree(replayed: Tensor, expected: Tensor, backend: Backend, config: BackendConfig, experts: ExpertWeights) -> bool:
    if backend.deterministic(config):
        return torch.equal(replayed.view(torch.uint8), expected.view(torch.uint8))  # as bytes, NaN equals NaN
    difference = (replayed.float() - expected.float()).norm()
    return bool(difference <= backend.tolerance[experts.dtype] * expected.float().norm())


@dataclass(frozen=True)
class _TensorMap:
    """An encoded tensor descriptor among a launch's arguments.

    Attributes:
        place: Its place among the arguments.
        base: The number of the base of the memory that it describes from its start.
        descriptor: The descriptor, of whatever memory.
        encoding: How the kernel wants it.
        by_address: The encoded descriptors of the memory seen so far.
    """

    place: int
    base: int
    descriptor: Any
    encoding: Encoding
    by_address: dict[int, Any] = field(default_factory=dict)

    def at(self, address: int) -> Any:
        """The descriptor encoded for this address."""
        tensor_map = self.by_address.get(address)
        if tensor_map is None:
            if len(self.by_address) >= MAX_DESCRIPTORS:
                self.by_address.clear()
            descriptor = with_base(self.descriptor, Memory(address, self.descriptor.base.dtype))
            tensor_map = self.by_address[address] = internals.tensor_map(descriptor, self.encoding)
        return tensor_map


@dataclass(frozen=True)
class _Step:
    """One launch.

    Attributes:
        kernel: What is started.
        grid: Width, which may depend on M, height, depth.
        values: Its arguments, complete but for addresses, numbers that depend on M, and tensor maps.
        addresses: For each address among them its place, the number of its base, and the distance from that in bytes.
        numbers: For each number among them that depends on M its place, and the number.
        maps: The tensor maps among them.
    """

    kernel: Launch
    grid: tuple[int | Extent, int, int]
    values: list[Any]
    addresses: tuple[tuple[int, int, int], ...]
    numbers: tuple[tuple[int, Extent], ...]
    maps: tuple[_TensorMap, ...]


@dataclass(slots=True, eq=False)
class _Playable(Waiting):
    """Up to how many tokens a replay is played: all of its range, but for a while after memory ran out.

    A try that fails costs as much as where a backend runs out of memory, and waits for its turn in the same way.

    Attributes:
        last: The largest token count.
    """

    last: int

    def ran_out(self, M: int) -> None:
        """Play fewer than M tokens."""
        if self.left <= 0:
            self.fail()
        self.last = min(self.last, M - 1)

    def count(self, range_end: int) -> None:
        """Count a larger call, and play the whole range again after the last one."""
        if self.ends():
            self.last = range_end


class _Sizes(NamedTuple):
    """What a replay needs to know of a token count.

    Attributes:
        scratch: Bytes of scratch memory.
        distances: Where in it each intermediate begins.
        launches: The grid of each launch, and its numbers that depend on M with their places.
    """

    scratch: int
    distances: list[int]
    launches: list[tuple[tuple[int, int, int], list[tuple[int, int]]]]


@dataclass(frozen=True, eq=False)
class Replay:
    """A layer's launches, for calls of one kind with any token count of a range; see the module.

    Every address in a launch is a base and a distance from it. The bases are, in this order, the addresses of
    hidden_states, topk_weights, topk_ids, of each weight of `weights`, of the output and of each intermediate.

    Attributes:
        launch: `TritonBackend.launch`, for calls that the replay does not fit.
        device: The GPU's number.
        weights: The layer's tensors, of each the name, the dtype, the shape and the strides.
        tokens: The range; empty once a launch has failed, which leaves every call to `launch`.
        intermediates: The bytes of each.
        steps: The launches.
    """

    launch: Callable[..., Any]
    device: int
    weights: tuple[tuple[str, torch.dtype, torch.Size, tuple[int, ...]], ...]
    tokens: TokenRange
    intermediates: tuple[Extent, ...]
    steps: tuple[_Step, ...]
    _playable: _Playable = field(init=False)
    _sizes: dict[int, _Sizes] = field(default_factory=dict)
    # Whatever depends on M, in the order in which `_sizes_of` needs it: each number as the place of its root among the
    # different ones, scale and shift.
    _roots: tuple[Callable[[int], int], ...] = field(init=False)
    _numbers: list[tuple[int, int, int]] = field(init=False)

    def __post_init__(self) -> None:
        extents = list(self.intermediates)
        for step in self.steps:
            extents += [number for _, number in step.numbers]
            extents += [step.grid[0]] if isinstance(step.grid[0], Extent) else []
        parts = [extent.parts for extent in extents]
        roots = tuple(dict.fromkeys(root for root, _, _ in parts))
        object.__setattr__(self, "_playable", _Playable(self.tokens.last))
        object.__setattr__(self, "_roots", roots)
        object.__setattr__(self, "_numbers", [(roots.index(root), scale, shift) for root, scale, shift in parts])

    def __call__(self, *call: Any) -> Tensor:
        """As `Backend.run`."""
        out = torch.empty_like(call[0])
        self.into(*call, out)
        return out

    def into(self, *call: Any) -> Any:
        """As `Backend.run_into`."""
        hidden_states, experts, topk_weights, topk_ids, _, out = call
        try:
            played = self.play(hidden_states, experts, topk_weights, topk_ids, out)
        except foreign_errors() as error:
            if failures.lost_device(error):
                raise
            logger.warning("a replay is dropped, and its launches made in full: %s", failures.summary(error))
            self.tokens.last = self._playable.last = self._playable.left = 0
            played = False
        if not played:
            self.launch(*call)
        return out

    def play(
        self, hidden_states: Tensor, experts: ExpertWeights, topk_weights: Tensor, topk_ids: Tensor, out: Tensor,
        *, poison: bool = False,
    ) -> bool:  # fmt: skip
        """Launch everything; False, with nothing launched, where the replay does not fit or its memory is not there.

        The arguments are those of `Backend.run_into`. With `poison` scratch memory and `out` hold NaN before.
        """
        bases = [hidden_states.data_ptr(), topk_weights.data_ptr(), topk_ids.data_ptr()]
        for name, dtype, shape, strides in self.weights:
            tensor = getattr(experts, name)
            if tensor.dtype is not dtype or tensor.shape != shape or tensor.stride() != strides:
                return False
            bases.append(tensor.data_ptr())
        bases.append(out.data_ptr())
        bits = 0
        for base in bases:
            bits |= base
        device = internals.current_device()
        if bits & 15 or not all(bases) or device != self.device or internals.launch_hooks():
            return False
        M = hidden_states.shape[0]
        if self._playable.last < M:
            self._playable.count(self.tokens.last)
            return False
        if (sizes := self._sizes.get(M) or self._sizes_of(M)) is None:
            return False
        try:
            scratch = hidden_states.new_empty(sizes.scratch, dtype=torch.uint8)
        except torch.OutOfMemoryError:  # a run needs less: it frees an intermediate after its last use
            self._playable.ran_out(M)
            return False
        if poison:
            for tensor in (scratch, out):
                tensor.view(torch.uint8).fill_(_POISON)
        start = scratch.data_ptr()
        bases += [start + distance for distance in sizes.distances]
        stream = internals.current_stream(device)
        for step, (grid, numbers) in zip(self.steps, sizes.launches, strict=True):
            values = step.values.copy()
            for place, base, distance in step.addresses:
                values[place] = bases[base] + distance
            for place, number in numbers:
                values[place] = number
            for each in step.maps:
                address = bases[each.base]
                values[each.place] = each.by_address.get(address) or each.at(address)
            step.kernel.start(grid, stream, values)
        return True

    def _sizes_of(self, M: int) -> _Sizes | None:
        if self.tokens.first > M:
            return None
        values = [root(M) for root in self._roots]
        computed = iter([scale * values[place] + shift for place, scale, shift in self._numbers])
        distances, scratch = [], 0
        for _ in self.intermediates:
            distances.append(scratch)
            scratch -= -next(computed) // _ALIGNMENT * _ALIGNMENT  # rounded up
        launches = []
        for step in self.steps:
            numbers = [(place, next(computed)) for place, _ in step.numbers] if step.numbers else []
            width, height, depth = step.grid
            launches.append(((width if isinstance(width, int) else next(computed), height, depth), numbers))
        if len(self._sizes) >= MAX_SIZES:
            self._sizes.clear()
        sizes = self._sizes[M] = _Sizes(scratch, distances, launches)
        return sizes


def _step(kernel: Launch, grid: tuple[Any, ...], args: tuple[Any, ...], weights: list[int]) -> _Step:
    """A launch written down; `weights` are the addresses of the layer's tensors."""
    encodings = dict(kernel.descriptors)
    values: list[Any] = []
    addresses: list[tuple[int, int, int]] = []
    numbers: list[tuple[int, Extent]] = []
    maps: list[_TensorMap] = []
    for place, arg in enumerate(args):
        if isinstance(arg, Buffer | Tensor):
            addresses.append((len(values), *_base_of(arg, weights)))
        elif isinstance(arg, Extent):
            numbers.append((len(values), arg))
        elif place in encodings:
            base, distance = _base_of(arg.base, weights)
            if distance:
                raise NotReplayableError("a tensor descriptor does not begin where memory does")
            maps.append(_TensorMap(len(values), base, arg, encodings[place]))
        values += [arg] if arg is None or isinstance(arg, int) else [0]
        if place in encodings:
            values += internals.after_map(arg)
    width, height, depth = (*grid, 1, 1)[:3]
    if isinstance(height, Extent) or isinstance(depth, Extent):  # of which CUDA takes 65535 at most
        raise NotReplayableError("the height of a grid depends on M")
    return _Step(
        kernel, (width, height, depth), [*values, *kernel.padding], tuple(addresses), tuple(numbers), tuple(maps)
    )


def _base_of(memory: Buffer | Memory | Tensor, weights: list[int]) -> tuple[int, int]:
    """The number of the base of an address, and the distance from it."""
    if isinstance(memory, Buffer):
        return memory.base, memory.offset
    address = memory.data_ptr()
    if weights.count(address) != 1:
        raise NotReplayableError("two weights share memory" if address in weights else "memory of unknown origin")
    return _INPUTS + weights.index(address), 0
