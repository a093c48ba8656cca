"""An H200 on which nothing runs: candidates take times that are drawn once, and samples of them are off by noise."""

import functools
import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dispatch.machine import Machine
from moe_dispatch.measure import H200_CEILINGS
from moe_dispatch.policies.measurements.schema import Candidate, Layer
from moe_dispatch.policies.measurements.table import Identity

H200 = Machine.load(Path(__file__).parents[1] / "machines" / "h200.json")


@dataclass
class Noise:
    """How wrong times are, as fractions.

    Attributes:
        sample: Standard deviation of one sample.
        drift: Of the clock, which all candidates of a moment share.
        session: Of a candidate at a point for as long as a process lives: where its memory lies, how it is scheduled.
    """

    sample: float = 0.004
    drift: float = 0.01
    session: float = 0.001


@dataclass
class Device:
    """A machine's times.

    Args:
        noise: Of every process on it.
        session: Names the process: each has noise of its own.
    """

    noise: Noise
    session: int

    def __post_init__(self) -> None:
        self._random = random.Random(self.session)  # noqa: S311 - noise
        self._layer: Layer | None = None
        self._clock = 0.0
        self.spent: dict[str, float] = {}

    # What `WorkerProcess` offers.

    def layer(self, layer: Layer) -> None:
        """See `WorkerProcess.layer`."""
        self._layer = layer

    def point(self, M: int, routings: Sequence[str]) -> None:
        """See `WorkerProcess.point`."""

    def compile(self, layer: Layer, M: int, candidate: Candidate) -> None:
        """See `WorkerProcess.compile`."""

    def close(self) -> None:
        """See `WorkerProcess.close`."""

    def ask(self, op: str, work: float = 1.0, **request: Any) -> dict[str, Any]:
        """See `WorkerProcess.ask`."""
        if op == "check":
            return {"error": 1e-3}
        if op == "launch":
            return {"us": self._sample((request["backend"], request["config"]), request["M"], "eager", "uniform")}
        candidates = request["candidates"]
        M, mode, routing = request["M"], request["mode"], request["routing"]
        once = 1e-6 * self.true_us(_identity(candidates[0]), M, mode, routing)
        rounds = min(100, max(request["rounds"], round(request["budget_s"] / max(2e-3, once))))
        samples: dict[str, list[float]] = {str(i): [] for i in range(len(candidates))}
        for _ in range(rounds):
            for i, candidate in enumerate(candidates):
                samples[str(i)].append(self._sample(candidate, M, mode, routing))
        return {"us": samples, "failed": {}}

    def _sample(self, candidate: Sequence[Any], M: int, mode: str, routing: str) -> float:
        self._clock += 1
        drift = self.noise.drift * math.sin(self._clock / 150 + self.session)
        identity = _identity(candidate)
        here = self._lasting(self.session, identity, M, mode).gauss(0, self.noise.session)
        noise = self._random.gauss(0, self.noise.sample)
        return self.true_us(identity, M, mode, routing) * (1 + drift + here) * (1 + noise)

    def true_us(self, identity: Identity, M: int, mode: str, routing: str) -> float:
        """Of a candidate on this machine: the floor, and a lag that changes slowly over M."""
        assert self._layer is not None
        floor = H200_CEILINGS.roofline_us(self._layer.problem(M, H200))
        assert floor is not None
        backend = self._lasting(self._layer.dtype, identity[0])
        config = self._lasting(self._layer.dtype, identity)
        # Lags of backends cross somewhere on the way from few tokens to many; those of configurations are close.
        place, slope = backend.uniform(0, 14), backend.uniform(0.02, 0.08)
        lag = slope * abs(math.log2(M) - place) + config.expovariate(1 / 0.02)
        lag += self._lasting(self._layer.dtype, identity, M).expovariate(1 / 0.004)
        lag += 0.02 * config.random() if mode == "eager" else 0.0
        return floor * (1 + lag) * (1.1 if routing != "uniform" else 1.0)

    @staticmethod
    @functools.cache
    def _seed(*what: object) -> int:
        return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "big")

    def _lasting(self, *what: object) -> random.Random:
        """The same numbers for the same thing."""
        return random.Random(self._seed(*what))  # noqa: S311 - noise


def _identity(candidate: Sequence[Any]) -> Identity:
    backend, config = candidate
    return backend, tuple(sorted(config.items()))
