"""First runs in lockstep, and the measurement that chooses an exchange for a kind of call."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Final, TypeVar

import torch
from torch import Tensor

from moe_dispatch.backend import ArrivedInputs, PeerRows
from moe_dispatch.measure.inputs import synchronize
from moe_dispatch.parallel.exchange import CallKind, Exchange
from moe_dispatch.parallel.forward import arrived_inputs, local_tokens
from moe_dispatch.parallel.registry import ALWAYS
from moe_dispatch.parallel.session import Session
from moe_dispatch.parallel.sharded_experts import ShardedExperts
from moe_dispatch.problem import Mode
from moe_dispatch.system import failures

REPEATS: Final = 5
# Relative difference below which two exchanges count as equally fast; the one that is registered first stays.
CLOSE: Final = 0.02

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Compared:
    """What the comparison of the exchanges for a kind of call showed, equal on every rank.

    Attributes:
        kind: The kind of call.
        chosen: The exchange that serves it from now on.
        us: Time of a whole eager call in µs, for each exchange that ran: the median over repeats of the slowest rank's.
        graph_us: The same of a replayed CUDA graph, for each exchange that was captured; empty on a CPU.
        failed: Why an exchange is not used, for each one that failed. One that could not be captured only is not in
            here; `explain` has the reason.
    """

    kind: CallKind
    chosen: str
    us: dict[str, float]
    graph_us: dict[str, float]
    failed: dict[str, str]


class ExchangeFailedError(RuntimeError):
    """An exchange failed its first run on some rank, with the reason of each."""


def compare_exchanges(layer: ShardedExperts, kind: CallKind, inputs: tuple[Tensor, Tensor, Tensor]) -> Compared:
    """Run every exchange that can serve a kind of call, and keep the fastest in each mode. Collective.

    Where the caller named an exchange for the group only that one is run.

    Args:
        layer: The layer.
        kind: The kind of eager call, whose M is the capacity.
        inputs: hidden_states, topk_weights and global topk_ids of this rank.

    Raises:
        ExpertParallelLostError: A rank is dead or late.
        ExchangeFailedError: Not even `gather` runs, or the named exchange does not; raised on every rank.
    """
    session = layer.session
    session.watch.begin()
    times: dict[str, dict[str, float]] = {"eager": {}, "graph": {}}
    failed: dict[str, str] = {}
    modes = _modes(session)
    for name in session.candidates(kind) if session.options.exchange is None else (session.choose(kind).name,):
        try:
            call = first_run(layer, session.exchanges[name], kind, inputs)
            times["eager"][name] = _measured(layer, call)
        except ExchangeFailedError as error:
            failed[name] = str(error)
            for mode in modes:
                session.bar(dataclasses.replace(kind, mode=mode), name, str(error))
            continue
        of_graph = dataclasses.replace(kind, mode="graph")
        if "graph" not in modes or name not in session.candidates(of_graph):
            continue
        try:
            times["graph"][name] = _measured(layer, _captured(layer, call))
        except ExchangeFailedError as error:  # it may be the backend of this rank's experts; eager calls work
            session.bar(of_graph, name, str(error))
    if (needed := session.options.exchange or ALWAYS) in failed:
        raise ExchangeFailedError(f"{kind} cannot run: {failed[needed]}")
    for mode in modes:
        able = times[mode]
        chosen = next((name for name, time in able.items() if time <= min(able.values()) * (1 + CLOSE)), ALWAYS)
        session.keep_choice(dataclasses.replace(kind, mode=mode), chosen)
    return Compared(kind, session.choose(kind).name, times["eager"], times["graph"], failed)


def _modes(session: Session) -> tuple[Mode, ...]:
    return ("eager", "graph") if session.device.type == "cuda" else ("eager",)


def _captured(layer: ShardedExperts, call: Callable[[], Tensor]) -> Callable[[], object]:
    """A call as the replay of a CUDA graph.

    Raises:
        ExchangeFailedError: It cannot be captured on some rank; raised on every rank.
    """
    graph = torch.cuda.CUDAGraph()

    def capture() -> None:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            call()

    _stage(layer, capture)
    return graph.replay


def first_run(
    layer: ShardedExperts, exchange: Exchange, kind: CallKind, inputs: tuple[Tensor, Tensor, Tensor]
) -> Callable[[], Tensor]:
    """Run a kind of call for the first time, with a vote after each stage: no rank goes on where another failed.

    Returns:
        The call, to be repeated.

    Raises:
        ExchangeFailedError: A stage failed on some rank; raised on every rank.
    """
    tokens = local_tokens(inputs[0], layer, *inputs[1:], kind.M)
    experts = layer.weights_expecting(exchange.arriving_share(kind))
    _stage(layer, lambda: exchange.prepare(kind))
    arrived = _stage(layer, lambda: exchange.dispatch(tokens))
    partial = _stage(layer, lambda: _run_and_warm(layer.session, exchange, arrived_inputs(experts, arrived)))
    _stage(layer, lambda: exchange.combine(partial, arrived, tokens))

    def call() -> Tensor:
        arrived = exchange.dispatch(tokens)
        return exchange.combine(layer.session.run_local(arrived_inputs(experts, arrived), None), arrived, tokens)

    return call


def _run_and_warm(session: Session, exchange: Exchange, inputs: ArrivedInputs) -> Tensor | PeerRows:
    """Run this rank's experts, and on a GPU also what a captured call will run."""
    partial = session.run_local(inputs, None)
    if session.device.type == "cuda" and exchange.requirements.capturable:
        session.dispatcher.warm_up(inputs)
    return partial


def _stage(layer: ShardedExperts, run: Callable[[], Result]) -> Result:
    session, fault = layer.session, ""
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


def _measured(layer: ShardedExperts, call: Callable[[], object]) -> float:
    """Time of a call in µs, equal on every rank: the median over repeats of the slowest rank's."""
    session = layer.session
    nanoseconds = []
    for _ in range(REPEATS):
        synchronize(session.device)
        session.control.gather_numbers([0])  # no rank starts before all are here
        start = time.perf_counter_ns()
        call()
        synchronize(session.device)
        nanoseconds.append(time.perf_counter_ns() - start)
    every = session.control.gather_numbers(nanoseconds)
    return float(statistics.median(max(times) for times in zip(*every, strict=True))) / 1e3


def drawn_inputs(
    layer: ShardedExperts, M: int, topk: int, act_dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Random inputs of M tokens with a uniform routing over the whole layer's experts."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(M, layer.K, generator=generator).to(device=layer.device, dtype=act_dtype)
    ids = torch.rand(M, layer.E, generator=generator).topk(topk, dim=1).indices.to(torch.int32)
    weights = torch.full((M, topk), 1 / topk)
    return hidden, weights.to(layer.device), ids.to(layer.device)
