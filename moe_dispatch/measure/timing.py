"""Interleaved timing: candidates take turns, so that drift and heat bias none of them.

One *pass* runs the layer once on each of several distinct inputs and routings, so that the weights of an expert are not
in the L2 cache merely because the call before used the same expert. A *sample* is as many passes as the resolution of
the clock needs. Each round starts with another candidate, and every second round runs in reverse order.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeAlias, TypeVar

import torch

from moe_dispatch.errors import InvalidInputError
from moe_dispatch.guard import foreign_errors
from moe_dispatch.measure.inputs import Call, LayerInputs, synchronize, timing_events
from moe_dispatch.problem import Mode

# The least duration of a sample: three orders of magnitude above the resolution of the clock and of CUDA events.
SAMPLE_SECONDS: Final = 2e-3
# The device idles before each sample, for this share of the sample's duration. A product at full rate draws more power
# than the device can sustain, so without a rest its time would depend on what ran before it.
REST: Final = 0.5
# The rest lasts at least this many times as long as the host needs to launch the sample, so that launches are hidden.
HIDES: Final = 1.5
LAUNCH_SECONDS: Final = 1e-4  # The least rest before graph replays, long enough to enqueue a few of them.
CLOCK_HZ: Final = 2e9  # An upper bound of the device's clock, by which a rest is converted to cycles.
MAX_REPEATS: Final = 1000
MAX_ROUNDS: Final = 100

Key = TypeVar("Key", bound=Hashable)
# Inputs that all candidates share, or inputs by candidate.
Inputs: TypeAlias = Sequence[LayerInputs] | Mapping[Key, Sequence[LayerInputs]]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of samples; a single sample is all three."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


@dataclass(frozen=True)
class Timing:
    """Time of one layer call.

    Attributes:
        us: Median over the samples, in µs.
        us_q1: Lower quartile.
        us_q3: Upper quartile.
        samples: Number of samples.
        rounds: The samples in µs, in the order of the rounds, so candidates that took turns can be compared by round.
    """

    us: float
    us_q1: float
    us_q3: float
    samples: int
    rounds: tuple[float, ...] = ()

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """The timing of samples, each the seconds of one layer call."""
        values = tuple(1e6 * value for value in seconds)
        q1, median, q3 = quartiles(values)
        return cls(median, q1, q3, len(values), values)


class EagerPass:
    """Back-to-back eager calls, as a model makes them: the host's time or the device's, whichever is longer.

    Timed from an idle device, the first launch latency would be part of the result, which it is not in a model. So the
    device is kept busy with a rest while the host launches all calls, and device events time what follows. If a call
    synchronises, the host takes longer than the rest; then the events span the host's waiting as well.
    """

    def __init__(self, call: Call, inputs: Sequence[LayerInputs]) -> None:
        self._call, self._inputs = call, inputs
        self._device = inputs[0].hidden_states.device
        # Seconds of the last pass, and of the host's launches in it; 0 before the first.
        self._last = self._host = 0.0

    def seconds(self, repeats: int) -> float:
        """Time of a call, over so many passes after a rest."""
        if self._device.type != "cuda" or not self._last:
            passes = self._by_the_wall(repeats)
        else:
            passes = self._after_a_rest(repeats)
        self._last = passes / repeats
        return self._last / len(self._inputs)

    def _by_the_wall(self, repeats: int) -> float:
        synchronize(self._device)
        begin = time.perf_counter()
        self.launch(repeats)
        self._host = (time.perf_counter() - begin) / repeats
        synchronize(self._device)
        return time.perf_counter() - begin

    def _after_a_rest(self, repeats: int) -> float:
        resting = max(HIDES * self._host * repeats, REST * self._last * repeats)
        start, end = timing_events()
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            rest(resting)
            start.record()
            begin = time.perf_counter()
            self.launch(repeats)
            host = time.perf_counter() - begin
            end.record()
            end.synchronize()
        device = float(start.elapsed_time(end)) / 1e3
        return max(host, device) if host < resting else device

    def launch(self, repeats: int) -> None:
        """Enqueue passes."""
        for _ in range(repeats):
            for each in self._inputs:
                self._call(each)

    def close(self) -> None:
        """Nothing to free: only graphs hold memory."""


class GraphPass:
    """One CUDA graph that runs the layer on every input in turn, timed with device events."""

    def __init__(self, call: Call, inputs: Sequence[LayerInputs], pool: Any) -> None:
        self._count = len(inputs)
        self._last = 0.0  # Seconds of the last pass; 0 before the first.
        self._graph = torch.cuda.CUDAGraph()
        self._device = inputs[0].hidden_states.device
        with torch.cuda.device(self._device), torch.cuda.graph(self._graph, pool=pool):
            for each in inputs:
                call(each)

    def seconds(self, repeats: int) -> float:
        """Time of a call, over so many passes after a rest."""
        start, end = timing_events()
        with torch.cuda.device(self._device):
            # The host enqueues the replays during the rest, so no launch gap is timed.
            rest(max(LAUNCH_SECONDS, REST * self._last * repeats))
            start.record()
            self.launch(repeats)
            end.record()
            end.synchronize()
        self._last = float(start.elapsed_time(end)) / 1e3 / repeats
        return self._last / self._count

    def launch(self, repeats: int) -> None:
        """Enqueue passes."""
        for _ in range(repeats):
            self._graph.replay()

    def close(self) -> None:
        """Free the graph."""
        self._graph.reset()


def rest(seconds: float) -> None:
    """Keep the current device busy for a while without work; later launches queue behind it."""
    torch.cuda._sleep(math.ceil(CLOCK_HZ * seconds))


def time_interleaved(
    candidates: Mapping[Key, Call],
    inputs: Inputs[Key],
    *,
    mode: Mode = "graph",
    budget_s: float = 0.3,
    min_rounds: int = 5,
    on_failure: Callable[[Key, BaseException], None] | None = None,
) -> dict[Key, Timing]:
    """Time several candidates, taking turns.

    Args:
        candidates: The calls to time, by any key.
        inputs: Distinct inputs and routings, at least 8 for a figure that is to be published; shared by all candidates,
            or by candidate. Times are per input.
        mode: ``"graph"`` times replays of a CUDA graph; ``"eager"`` times back-to-back calls, with the launch cost
            wherever the device waits for it.
        budget_s: Seconds of timing for each candidate; compilation, warm-up and capture come on top.
        min_rounds: Least number of samples of each candidate, whatever they cost.
        on_failure: Called with a candidate that raises, which is then left out; without it the exception propagates.

    Returns:
        The timings by key, in the candidates' order.

    Raises:
        InvalidInputError: ``"graph"`` was asked for on a CPU, or there are no inputs.
    """
    with contextlib.closing(Turns[Key](inputs, mode=mode)) as turns:
        return turns.time(candidates, budget_s=budget_s, min_rounds=min_rounds, on_failure=on_failure)


class Turns(Generic[Key]):
    """Interleaved timing of candidates that may be timed again: their warm-up and graphs are kept.

    Inputs and mode are those of `time_interleaved`.

    Attributes:
        pool: The graphs' memory pool, shared with graphs that are never replayed at the same time; None in eager mode.

    Raises:
        InvalidInputError: ``"graph"`` was asked for on a CPU, or there are no inputs.
    """

    def __init__(self, inputs: Inputs[Key], *, mode: Mode, pool: Any = None) -> None:
        some = next(iter(inputs.values()), ()) if isinstance(inputs, Mapping) else inputs
        if not some:
            raise InvalidInputError("timing needs at least one LayerInputs, got none; make_inputs draws them")
        self._inputs, self._mode = inputs, mode
        self._device = some[0].hidden_states.device
        if mode == "graph" and self._device.type != "cuda":
            raise InvalidInputError(
                f"CUDA graphs need a CUDA device, and the inputs are on {self._device}; use mode='eager'"
            )
        # Only one graph replays at a time and none of their results is kept, so they may share their memory.
        self.pool = pool or (torch.cuda.graph_pool_handle() if mode == "graph" else None)
        self._passes: dict[Key, EagerPass | GraphPass] = {}
        self._repeats: dict[Key, int] = {}

    def time(
        self,
        candidates: Mapping[Key, Call],
        *,
        budget_s: float,
        min_rounds: int,
        on_failure: Callable[[Key, BaseException], None] | None = None,
    ) -> dict[Key, Timing]:
        """Time candidates together; see `time_interleaved`."""
        samples: dict[Key, list[float]] = {}

        def attempt(key: Key, action: Callable[[Key], None]) -> None:
            try:
                action(key)
            except foreign_errors() as error:
                samples.pop(key, None)
                if key in self._passes:
                    self._passes.pop(key).close()
                if on_failure is None:
                    raise
                on_failure(key, error)

        def start(key: Key) -> None:
            if key not in self._passes:
                self._prepare(key, candidates[key])
            samples[key] = []

        def sample(key: Key) -> None:
            samples[key].append(self._passes[key].seconds(self._repeats[key]))

        with torch.no_grad():
            for key in candidates:
                attempt(key, start)
            deadline = time.perf_counter() + budget_s * len(samples)
            for turn in range(MAX_ROUNDS):
                order = list(samples)
                if not order or (turn >= min_rounds and time.perf_counter() >= deadline):
                    break
                first = turn % len(order)
                order = order[first:] + order[:first]
                for key in order[::-1] if turn % 2 else order:
                    attempt(key, sample)
        return {key: Timing.of(taken) for key, taken in samples.items()}

    def close(self) -> None:
        """Free the graphs."""
        while self._passes:
            self._passes.popitem()[1].close()

    def _prepare(self, key: Key, call: Call) -> None:
        inputs = self._inputs[key] if isinstance(self._inputs, Mapping) else self._inputs
        call(inputs[0])  # Compile now: a compilation would break the capture.
        synchronize(self._device)
        graph = self._mode == "graph"
        self._passes[key] = GraphPass(call, inputs, self.pool) if graph else EagerPass(call, inputs)
        once = self._passes[key].seconds(1) * len(inputs)
        self._repeats[key] = max(1, min(MAX_REPEATS, round(SAMPLE_SECONDS / max(once, 1e-9))))
