"""A worker on which nothing runs: candidates take the times that a test gives them, by a clock that the test reads."""

import functools
import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_dispatch.machine import Machine
from moe_dispatch.measure import H200_CEILINGS
from moe_dispatch.policies.calibration.worker_process import (
    BudgetSpentError,
    CandidateFailedError,
    NotPreparedError,
    PointSetup,
    Samples,
    WorkerDiedError,
)
from moe_dispatch.policies.measurements.schema import Candidate, LayerShape
from moe_dispatch.problem import Mode

H200 = Machine.load("h200")

Config = Mapping[str, int | bool | str]


@dataclass(frozen=True)
class Run:
    """One candidate in a point, as the functions that give its time and its faults get it."""

    layer: LayerShape
    M: int
    mode: Mode
    routing: str
    backend: str
    config: Config


TimeOf = Callable[[Run], float]


class Clock:
    """Seconds that pass only where a simulated worker spends them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Noise:
    """Standard deviations of relative errors: of one sample, of the clock, and of a candidate within a process."""

    sample: float = 0.0
    drift: float = 0.0
    session: float = 0.0


H200_NOISE = Noise(sample=0.004, drift=0.01, session=0.001)


@dataclass
class SimulatedWorker:
    """A `Worker` whose candidates take simulated times.

    Attributes:
        time_of: Time of one run of a candidate, in µs.
        session: Names the process: each has noise of its own.
        clock: Advances by what runs, and by `prepare_s` for each layer and point.
        error_of: Relative error of a candidate; above the tolerance it is wrong.
        raises: What a candidate raises, or None.
        joules_of: Energy of one call of a candidate.
        dies: How a candidate takes the worker down, or None.
        memory_tokens: Points with more tokens cannot be prepared.
        deadline: Time of the clock at which the worker is killed.
    """

    time_of: TimeOf
    noise: Noise = Noise()
    session: int = 0
    clock: Clock = field(default_factory=Clock)
    error_of: Callable[[Run], float] = lambda _: 1e-6
    raises: Callable[[Run], str | None] = lambda _: None
    joules_of: Callable[[Run], float] = lambda _: 1.0
    dies: Callable[[Run], WorkerDiedError | None] = lambda _: None
    memory_tokens: float = math.inf
    prepare_s: float = 0.0
    timeout_s: float = math.inf
    deadline: float = math.inf
    points: list[tuple[LayerShape, PointSetup]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.session)  # noqa: S311 - noise
        self._layer: LayerShape | None = None
        self._setup: PointSetup | None = None
        self._samples = 0
        self.spent: dict[str, float] = {}

    def layer(self, layer: LayerShape) -> None:
        self._layer, self._setup = layer, None
        self._pass(self.prepare_s)

    def point(self, setup: PointSetup) -> None:
        if self.memory_tokens < setup.M:
            raise NotPreparedError(f"out of memory: {setup.M} tokens")
        assert self._layer is not None
        self.points.append((self._layer, setup))
        self._setup = setup
        self._pass(self.prepare_s)

    def compile(self, layer: LayerShape, M: int, candidate: Candidate) -> None:
        """See `Worker.compile`."""

    def launch(self, candidate: int) -> float:
        run = self._run(candidate)
        self._live(run)
        return self._sample(run)

    def check(self, candidate: int, tolerance: float, *, briefly: bool) -> float:
        run = self._run(candidate)
        self._live(run)
        if (error := self.error_of(run)) > tolerance:
            raise CandidateFailedError(f"wrong (inputs: {run.routing}): relative error {error:.3g}")
        return error

    def time(self, candidates: Sequence[int], routing: str, budget_s: float, rounds: int) -> list[Samples]:
        runs = [self._run(candidate, routing) for candidate in candidates]
        for run in runs:
            self._live(run)
        once = 1e-6 * self.time_of(runs[0])
        count = min(100, max(rounds, round(budget_s / max(2e-3, once))))
        samples: list[list[float]] = [[] for _ in runs]
        for _ in range(count):
            for taken, run in zip(samples, runs, strict=True):
                taken.append(self._sample(run))
        return [Samples(us=tuple(taken)) for taken in samples]

    def energy(self, candidate: int, seconds: float) -> float:
        run = self._run(candidate)
        self._pass(seconds)
        return self.joules_of(run)

    def close(self) -> None:
        """See `Worker.close`."""

    def kill(self) -> None:
        """See `Worker.kill`."""

    def _run(self, candidate: int, routing: str = "") -> Run:
        assert self._layer is not None and self._setup is not None  # noqa: PT018
        setup, description = self._setup, self._setup.candidates[candidate]
        return Run(
            self._layer, setup.M, setup.mode, routing or setup.routings[0], description.backend, description.config
        )

    def _live(self, run: Run) -> None:
        if (death := self.dies(run)) is not None:
            raise death
        if (error := self.raises(run)) is not None:
            raise CandidateFailedError(f"raised {error}")

    def _sample(self, run: Run) -> float:
        self._samples += 1
        drift = self.noise.drift * math.sin(self._samples / 150 + self.session)
        identity = run.backend, tuple(sorted(run.config.items()))
        here = lasting(self.session, identity, run.M, run.mode).gauss(0, self.noise.session)
        us = self.time_of(run) * (1 + drift + here) * (1 + self._random.gauss(0, self.noise.sample))
        self._pass(1e-6 * us)
        return us

    def _pass(self, seconds: float) -> None:
        self.clock.now = min(self.clock.now + seconds, self.deadline)
        if self.clock.now == self.deadline:
            raise BudgetSpentError("the budget was spent")


def as_on_an_h200(run: Run) -> float:
    """Time in µs on a machine that could be an H200: the roofline, and a lag that changes slowly over M."""
    roofline = H200_CEILINGS.roofline_us(run.layer.problem(run.M, H200))
    assert roofline is not None
    dtype, identity = run.layer.dtype, (run.backend, tuple(sorted(run.config.items())))
    backend, config = lasting(dtype, run.backend), lasting(dtype, identity)
    # Lags of backends cross somewhere on the way from few tokens to many; those of configurations are close.
    place, slope = backend.uniform(0, 14), backend.uniform(0.02, 0.08)
    lag = slope * abs(math.log2(run.M) - place) + config.expovariate(1 / 0.02)
    lag += lasting(dtype, identity, run.M).expovariate(1 / 0.004)
    lag += 0.02 * config.random() if run.mode == "eager" else 0.0
    return roofline * (1 + lag) * (1.1 if run.routing != "uniform" else 1.0)


@functools.cache
def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def lasting(*what: Any) -> random.Random:
    """Random numbers that are the same for the same arguments."""
    return random.Random(_seed(repr(what)))  # noqa: S311 - noise
