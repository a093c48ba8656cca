"""One exchange with one kind of call: its first run in lockstep, and how long its parts take."""

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from moe_dispatch.measure.inputs import synchronize, timing_events
from moe_dispatch.measure.timing import REST, rest
from moe_dispatch.parallel.exchange import CallKind, Exchange
from moe_dispatch.parallel.exchange_times import Split
from moe_dispatch.parallel.forward import arrived_inputs, local_tokens
from moe_dispatch.parallel.session import Session
from moe_dispatch.parallel.sharded_experts import ShardedExperts
from moe_dispatch.system import failures

BURSTS: Final = 5
_BURST_US: Final = 3e3  # shortest duration of one
_MOST_CALLS: Final = 50  # of one
GRAPH_CALLS: Final = 4  # that a graph holds, as a model's holds its layers: launching a graph is no part of a call

Result = TypeVar("Result")


class ExchangeFailedError(RuntimeError):
    """An exchange failed its first run on some rank, with the reason of each."""


class Trial:
    """Runs an exchange for the first time, in stages, and then times it. Everything is collective.

    After each stage the ranks vote: no rank goes on where another failed.

    Args:
        layer: The layer.
        exchange: The exchange.
        kind: The kind of eager call.
        inputs: hidden_states, topk_weights and global topk_ids of this rank.

    Raises:
        ExchangeFailedError: A stage failed on some rank; raised on every rank, also by the methods.
    """

    def __init__(
        self, layer: ShardedExperts, exchange: Exchange, kind: CallKind, inputs: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        self._session, self._exchange = layer.session, exchange
        self._tokens = local_tokens(inputs[0], layer, *inputs[1:], kind.M)
        self._experts = layer.weights_expecting(exchange.arriving_share(kind))
        stage(self._session, lambda: exchange.prepare(kind))
        self._arrived = stage(self._session, lambda: exchange.dispatch(self._tokens))
        # Not what the experts return: where they store results in peers' memory `combine` would have nothing to send.
        self._partial = inputs[0].new_zeros(self._arrived.topk_ids.shape[0], layer.K)

    def run_experts(self) -> None:
        """Run this rank's experts over the rows that arrived; on a GPU also what a captured call will run."""
        stage(self._session, self._run_local)
        if self._session.device.type == "cuda" and self._exchange.requirements.capturable:
            inputs = arrived_inputs(self._experts, self._arrived)
            stage(self._session, lambda: self._session.dispatcher.warm_up(inputs))

    def split(self, *, graph: bool = False) -> Split:
        """Times of whole calls, of the experts and of the transfers; with `graph`, of replays of a CUDA graph."""
        parts: tuple[Callable[[], Any], ...] = (self._call, self._run_local, self._transfers)
        us, experts, transfers = (self._us(part, graph=graph) for part in parts)
        return Split(us=us, experts_us=experts, transfers_us=transfers)

    def transfers_us(self, *, graph: bool = False) -> float:
        """Time of dispatch and combine together, in µs."""
        return self._us(self._transfers, graph=graph)

    def _call(self) -> Tensor:
        arrived = self._exchange.dispatch(self._tokens)
        partial: Any = self._session.run_local(arrived_inputs(self._experts, arrived), None)
        return self._exchange.combine(partial, arrived, self._tokens)

    def _run_local(self) -> Any:
        return self._session.run_local(arrived_inputs(self._experts, self._arrived), None)

    def _transfers(self) -> Tensor:
        return self._exchange.combine(self._partial, self._exchange.dispatch(self._tokens), self._tokens)

    def _us(self, call: Callable[[], object], *, graph: bool) -> float:
        """Median over bursts of the slowest rank's time per call, in µs; equal on every rank.

        A burst is calls in a row after a rest and one that is not timed, so that all ranks are in step when it begins.
        """
        stage(self._session, call)
        repeated, inside = call, 1
        if graph:
            repeated, inside = stage(self._session, lambda: _captured(call)).replay, GRAPH_CALLS
        return median_us(functools.partial(self._burst, repeated), self._slowest, BURSTS) / inside

    def _burst(self, call: Callable[[], object], calls: int, resting_us: float) -> float:
        rested(self._session.device, resting_us)
        self._session.control.gather_numbers([0])  # no rank starts before all are here
        return burst_us(call, calls, self._session.device)

    def _slowest(self, times: list[float]) -> list[float]:
        every = self._session.control.gather_numbers([max(1, round(us * 1e3)) for us in times])  # in ns
        return [max(each) / 1e3 for each in zip(*every, strict=True)]


def stage(session: Session, run: Callable[[], Result]) -> Result:
    """Run something on every rank, and vote.

    Raises:
        ExchangeFailedError: It failed on some rank; raised on every rank.
    """
    fault = ""
    try:
        result = run()
        synchronize(session.device)
    except Exception as error:
        if session.watch.lost is not None:
            raise
        fault = failures.summary(error)
    votes = session.control.gather_objects(fault)
    faults = [f"{vote} (rank {rank})" for rank, vote in zip(session.control.ranks, votes, strict=True) if vote]
    if faults:
        raise ExchangeFailedError("; ".join(faults))
    return result  # where it is not bound there was a fault


def median_us(
    burst: Callable[[int, float], float], slowest: Callable[[list[float]], list[float]], bursts: int
) -> float:
    """Median over bursts of the slowest rank's time per call, in µs.

    Args:
        burst: Makes so many calls in a row after a rest of so many µs, and returns this rank's time of each in µs.
            Collective.
        slowest: For times of this rank, each one's greatest value over the ranks. Collective.
        bursts: How many bursts count, after one that tells how many calls a burst takes.
    """
    us = slowest([burst(1, 0.0)])[0]
    calls = min(_MOST_CALLS, math.ceil(_BURST_US / us))
    return statistics.median(slowest([burst(calls, REST * (calls + 1) * us) for _ in range(bursts)]))


def rested(device: torch.device, us: float) -> None:
    """Wait until the device has done its work and rested for so many µs; see `REST`."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            rest(us / 1e6)
    synchronize(device)


def burst_us(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """This rank's time per call in µs, of calls in a row after one that is not timed."""
    call()
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) * 1e6 / calls
    begin, end = timing_events()
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3 / calls


def drawn_inputs(
    layer: ShardedExperts, M: int, topk: int, act_dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Random inputs of M tokens with a uniform routing over the whole layer's experts.

    Returns:
        hidden_states ``[M, K]``, fp32 weights and global int32 ids ``[M, topk]``, on the layer's device.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    hidden = torch.randn(M, layer.K, generator=generator, dtype=torch.float32, device="cpu")
    scores = torch.rand(M, layer.E, generator=generator, dtype=torch.float32, device="cpu")
    ids = scores.topk(topk, dim=1).indices.to(layer.device, torch.int32)
    weights = torch.full((M, topk), 1 / topk, dtype=torch.float32, device=layer.device)
    return hidden.to(layer.device, act_dtype), weights, ids


def _captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(GRAPH_CALLS):
            call()
    return graph
