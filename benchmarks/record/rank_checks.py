"""Checks of calls that all ranks make together, and the graphs that they are captured in."""

import random
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

PAUSES: Final = 100  # of a rank among its replays, about

Inputs = tuple[Tensor, ...]  # hidden_states, topk_weights, topk_ids
Call = Callable[..., Tensor]


def captured(call: Call, sets: Sequence[Inputs]) -> tuple[Callable[[], None], Tensor]:
    """The replay of a CUDA graph that calls with each of these inputs, and the last call's result. Collective."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for inputs in sets:
            out = call(*inputs)
    torch.cuda.synchronize()
    dist.barrier()
    return graph.replay, out


def changed_replays(replay: Callable[[], None], out: Tensor, static: Inputs, sets: list[Inputs], replays: int) -> int:
    """How many replays give other bits than the first ones with the same inputs; of all ranks."""

    def replayed(inputs: Inputs) -> Tensor:
        for tensor, values in zip(static, inputs, strict=True):
            tensor.copy_(values)
        replay()
        return out.view(torch.uint8)

    first = [replayed(inputs).clone() for inputs in sets]
    changed = torch.zeros((), dtype=torch.int64, device=out.device)
    pauses = random.Random(dist.get_rank())  # noqa: S311 - so that ranks come at different times
    for number in range(replays):
        changed += (replayed(sets[number % len(sets)]) != first[number % len(sets)]).any()
        if pauses.random() < min(0.05, PAUSES / replays):
            torch.cuda.synchronize()
            time.sleep(pauses.random() * 0.002)
    dist.all_reduce(changed)
    replayed(sets[0])
    return int(changed)


def relative_difference(out: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; NaN counts as a difference."""
    return float((out.float() - expected.float()).norm() / expected.float().norm())


def host_syncs(call: Callable[[], object]) -> int:
    """How often a call makes the host wait for the device, as far as torch knows of it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(each.message) for each in said)
