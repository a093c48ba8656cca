"""Time candidates that take turns.

One *pass* runs the layer once on each of several distinct inputs and routings, so that no expert's weights stay in the
cache because the same token asked for them a moment ago. A *sample* is as many passes as make it long enough for the
clock. Rounds start with another candidate, and every other one runs backwards, so that neither a clock that drifts nor
the heat of whoever came before favours anybody.
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
from moe_dispatch.measure.inputs import Call, LayerInputs, synchronize, timing_events
from moe_dispatch.problem import Mode

SAMPLE_SECONDS: Final = 2e-3  # of one sample at least: three orders above the clock's and the events' resolution
# Of a sample's duration, before it. A product at full rate draws more power than the device can sustain: without a rest
# its time depends on what ran before it.
REST: Final = 0.5
HIDES: Final = 1.5  # times what the host needs for its launches: the least rest that hides them
LAUNCH_SECONDS: Final = 1e-4  # hides those of a few graphs
CLOCK_HZ: Final = 2e9  # of the device, at most
MAX_REPEATS: Final = 1000
MAX_ROUNDS: Final = 100

Key = TypeVar("Key", bound=Hashable)
# The same of all candidates, or each one's own.
Inputs: TypeAlias = Sequence[LayerInputs] | Mapping[Key, Sequence[LayerInputs]]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of samples; a single one is all three."""
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
        samples: How many there were.
        rounds: They themselves, in µs; those of candidates that took turns lie side by side in time.
    """

    us: float
    us_q1: float
    us_q3: float
    samples: int
    rounds: tuple[float, ...] = ()

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """Sum up samples, each the seconds of one layer call."""
        values = tuple(1e6 * value for value in seconds)
        q1, median, q3 = quartiles(values)
        return cls(median, q1, q3, len(values), values)


class _EagerPass:
    """Calls in a row, as a model makes them: what the host or what the device needs, whichever is more.

    The first call after an idle time is waited for, which in a row it is not. So the device rests while the host
    launches, and its own clock says what it needs. A call that waits for the device makes the host outlast the rest;
    then the device's clock has seen all of it.
    """

    def __init__(self, call: Call, inputs: Sequence[LayerInputs]) -> None:
        self._call, self._inputs = call, inputs
        self._device = inputs[0].hidden_states.device
        # Seconds of a pass, all of it and the host's part, once known.
        self._last = self._host = 0.0

    def seconds(self, repeats: int) -> float:
        if self._device.type != "cuda" or not self._last:
            passes = self._by_the_wall(repeats)
        else:
            passes = self._after_a_rest(repeats)
        self._last = passes / repeats
        return self._last / len(self._inputs)

    def _by_the_wall(self, repeats: int) -> float:
        synchronize(self._device)
        begin = time.perf_counter()
        self._launch(repeats)
        self._host = (time.perf_counter() - begin) / repeats
        synchronize(self._device)
        return time.perf_counter() - begin

    def _after_a_rest(self, repeats: int) -> float:
        resting = max(HIDES * self._host * repeats, REST * self._last * repeats)
        start, end = timing_events()
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            _rest(resting)
            start.record()
            begin = time.perf_counter()
            self._launch(repeats)
            host = time.perf_counter() - begin
            end.record()
            end.synchronize()
        device = float(start.elapsed_time(end)) / 1e3
        return max(host, device) if host < resting else device

    def _launch(self, repeats: int) -> None:
        for _ in range(repeats):
            for given in self._inputs:
                self._call(given)

    def close(self) -> None:
        """Nothing is held."""


class _GraphPass:
    """One CUDA graph that runs the layer on every input in turn, timed with device events."""

    def __init__(self, call: Call, inputs: Sequence[LayerInputs], pool: Any) -> None:
        self._count = len(inputs)
        self._last = 0.0  # seconds of a pass, once known
        self._graph = torch.cuda.CUDAGraph()
        self._device = inputs[0].hidden_states.device
        with torch.cuda.device(self._device), torch.cuda.graph(self._graph, pool=pool):
            for given in inputs:
                call(given)

    def seconds(self, repeats: int) -> float:
        start, end = timing_events()
        with torch.cuda.device(self._device):
            # Meanwhile the host enqueues what follows, so no launch gap is timed.
            _rest(max(LAUNCH_SECONDS, REST * self._last * repeats))
            start.record()
            for _ in range(repeats):
                self._graph.replay()
            end.record()
            end.synchronize()
        self._last = float(start.elapsed_time(end)) / 1e3 / repeats
        return self._last / self._count

    def close(self) -> None:
        self._graph.reset()


def _rest(seconds: float) -> None:
    """Let the current device wait, with what is launched next in its queue."""
    torch.cuda._sleep(math.ceil(CLOCK_HZ * seconds))  # type: ignore[no-untyped-call]


def time_eager(call: Call, inputs: Sequence[LayerInputs], budget_s: float = 0.3, min_rounds: int = 5) -> Timing:
    """Time one candidate eagerly; see `time_interleaved`."""
    return time_interleaved({"": call}, inputs, mode="eager", budget_s=budget_s, min_rounds=min_rounds)[""]


def time_graph(call: Call, inputs: Sequence[LayerInputs], budget_s: float = 0.3, min_rounds: int = 5) -> Timing:
    """Time one candidate as replays of a CUDA graph; see `time_interleaved`."""
    return time_interleaved({"": call}, inputs, mode="graph", budget_s=budget_s, min_rounds=min_rounds)[""]


def time_interleaved(
    candidates: Mapping[Key, Call],
    inputs: Inputs[Key],
    *,
    mode: Mode = "graph",
    budget_s: float = 0.3,
    min_rounds: int = 5,
    on_failure: Callable[[Key, Exception], None] | None = None,
) -> dict[Key, Timing]:
    """Time several candidates, taking turns.

    Args:
        candidates: What to time, by any key.
        inputs: Distinct inputs and routings, at least 8 where the figure is to be published; the same for all
            candidates, or by their keys. Time is per input.
        mode: ``"graph"`` times replays with device events; ``"eager"`` calls in a row, launch cost included where the
            device waits for it.
        budget_s: Seconds to spend on each candidate, compilation, warm-up and capture aside.
        min_rounds: Samples of each candidate at least, whatever they cost.
        on_failure: Takes a candidate that raises, which is then left out; without it the exception propagates.

    Returns:
        The timings by key, in the candidates' order.

    Raises:
        InvalidInputError: ``"graph"`` was asked for on a CPU, or there are no inputs.
    """
    with contextlib.closing(Turns[Key](inputs, mode=mode)) as turns:
        return turns.time(candidates, budget_s=budget_s, min_rounds=min_rounds, on_failure=on_failure)


class Turns(Generic[Key]):
    """Candidates that take turns; who was timed before is ready, and its graph captured.

    Args:
        inputs: See `time_interleaved`.
        mode: See there.
        pool: Memory of graphs that are not replayed at the same time as these; their own if None.

    Attributes:
        pool: Theirs; None on a CPU.

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
        self._passes: dict[Key, _EagerPass | _GraphPass] = {}
        self._repeats: dict[Key, int] = {}

    def time(
        self,
        candidates: Mapping[Key, Call],
        *,
        budget_s: float,
        min_rounds: int,
        on_failure: Callable[[Key, Exception], None] | None = None,
    ) -> dict[Key, Timing]:
        """Time candidates together; see `time_interleaved`."""
        samples: dict[Key, list[float]] = {}

        def attempt(key: Key, action: Callable[[Key], None]) -> None:
            try:
                action(key)
            except Exception as error:
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
        """Let go of the graphs."""
        while self._passes:
            self._passes.popitem()[1].close()

    def _prepare(self, key: Key, call: Call) -> None:
        inputs = self._inputs[key] if isinstance(self._inputs, Mapping) else self._inputs
        call(inputs[0])  # compiles what is not compiled yet; no capture survives a compilation
        synchronize(self._device)
        graph = self._mode == "graph"
        self._passes[key] = _GraphPass(call, inputs, self.pool) if graph else _EagerPass(call, inputs)
        once = self._passes[key].seconds(1) * len(inputs)
        self._repeats[key] = max(1, min(MAX_REPEATS, round(SAMPLE_SECONDS / max(once, 1e-9))))
