"""Times of calls that all ranks of a process group make together."""

import functools
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from moe_dispatch.measure.inputs import synchronize
from moe_dispatch.parallel.trial import burst_us, median_us, rested


class Clock:
    """Times calls that all ranks make together.

    Args:
        device: The rank's device.
        bursts: How many bursts of calls are timed.
    """

    def __init__(self, device: torch.device, bursts: int) -> None:
        self._device, self._bursts = device, bursts

    def us(self, call: Callable[[], object], calls_inside: int = 1) -> float:
        """Median over bursts of the slowest rank's time in µs, equal on every rank.

        Args:
            call: What is timed.
            calls_inside: Calls of a layer that it makes; the time is that of each.
        """
        for _ in range(2):
            call()
        burst = functools.partial(self._burst, call)
        return median_us(burst, self._slowest, self._bursts) / calls_inside

    def host_us(self, call: Callable[[], object]) -> float:
        """Median time in µs until a call returns to the host, the device being idle; of the slowest rank."""
        times = []
        for _ in range(2 * self._bursts):
            synchronize(self._device)
            dist.barrier()
            synchronize(self._device)
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
        return self._slowest([statistics.median(times)])[0]

    def _burst(self, call: Callable[[], object], calls: int, resting_us: float) -> float:
        rested(self._device, resting_us)
        dist.barrier()
        return burst_us(call, calls, self._device)

    def _slowest(self, times: list[float]) -> list[float]:
        every = torch.tensor(times, dtype=torch.float64, device=self._device)
        dist.all_reduce(every, op=dist.ReduceOp.MAX)
        return list(map(float, every.tolist()))
