"""Two GPUs over one: a layer whose experts are spread over ranks, against one rank that holds all of them.

    torchrun --nproc-per-node 2 -m moe_dispatch.benchmarks.record.expert_parallel --out rows.jsonl
    torchrun --nproc-per-node 2 -m moe_dispatch.benchmarks.record.expert_parallel --exchange direct --tokens 16,256
    torchrun --nproc-per-node 2 -m moe_dispatch.benchmarks.record.expert_parallel --tiny     that it works; CPU, too

For each layer and token count M of a rank: the time of one rank that runs the tokens of all ranks with all experts, the
time of a rank's share of the experts without any exchange, and the time of all ranks together with each exchange,
eagerly with stated counts and in a replayed CUDA graph. A time is the median over repeats of the slowest rank's, in µs;
`speedup` is the first over the last, and `host_us` what an eager call takes the host.

Results are checked first: against the whole layer's, the graph's against the eager ones, and a few hundred replays with
changing inputs against the first ones, while ranks pause at random. Where a step takes longer than --patience seconds
every process prints its stacks and ends. Where a result is wrong the exit status is 1.
"""

import argparse
import faulthandler
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import ExpertParallel, ExpertWeights, ShardedExperts, moe_forward, warm_up
from moe_dispatch.benchmarks.record import json_lines
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.machine import Machine
from moe_dispatch.measure.inputs import timing_events
from moe_dispatch.parallel.comparison import ExchangeFailedError
from moe_dispatch.problem import DType
from moe_dispatch.workloads import ROUTINGS, WORKLOADS, Workload, make_experts, torch_dtype

LAYERS: Final[tuple[tuple[str, DType], ...]] = (("qwen3-30b-a3b", "bf16"), ("deepseek-v3", "fp8"))
TOKENS: Final = (1, 16, 256, 4096, 16384)
TINY: Final = Workload("tiny", E=16, topk=4, K=64, N=32)
REPLAYS: Final = 30
CHECKED_REPLAYS: Final = 300
MOST_ERROR: Final = 2e-2  # relative, of a layer in BF16 or FP8 against the same in another order of sums
INPUTS: Final = 4


class Clock:
    """Times calls that all ranks make together.

    Args:
        device: The rank's device.
        repeats: How often each call is timed.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        self._device, self._repeats = device, repeats

    def us(self, call: Callable[[], object]) -> float:
        """Median over repeats of the slowest rank's time, in µs; equal on every rank."""
        for _ in range(3):
            call()
        times = torch.empty(self._repeats, dtype=torch.float64, device=self._device)
        for i in range(self._repeats):
            self._synchronize()
            dist.barrier()
            times[i] = self._once(call)
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        return float(statistics.median(times.tolist()))

    def host_us(self, call: Callable[[], object]) -> float:
        """Median time in µs until a call returns to the host, the device being idle; of the slowest rank."""
        times = []
        for _ in range(self._repeats):
            self._synchronize()
            dist.barrier()
            self._synchronize()
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
        slowest = torch.tensor(statistics.median(times), dtype=torch.float64, device=self._device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return float(slowest)

    def _once(self, call: Callable[[], object]) -> float:
        if self._device.type == "cpu":
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e6
        begin, end = timing_events()
        self._synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def captured(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A call as the replay of a CUDA graph, and the tensor that holds its result. Ranks capture together."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = call()
    torch.cuda.synchronize()
    dist.barrier()
    return graph.replay, out


def changed_replays(
    replay: Callable[[], None], out: Tensor, static: tuple[Tensor, ...], sets: list[tuple[Tensor, ...]]
) -> int:
    """How many of many replays give other bits than the first ones with the same inputs; of all ranks."""

    def replayed(inputs: tuple[Tensor, ...]) -> Tensor:
        for tensor, values in zip(static, inputs, strict=True):
            tensor.copy_(values)
        replay()
        return out.view(torch.uint8)

    first = [replayed(inputs).clone() for inputs in sets]
    changed = torch.zeros((), dtype=torch.int64, device=out.device)
    pauses = random.Random(dist.get_rank())  # noqa: S311 - so that ranks come at different times
    for number in range(CHECKED_REPLAYS):
        changed += (replayed(sets[number % len(sets)]) != first[number % len(sets)]).any()
        if pauses.random() < 0.05:
            torch.cuda.synchronize()
            time.sleep(pauses.random() * 0.002)
    dist.all_reduce(changed)
    replayed(sets[0])
    return int(changed)


def relative_difference(out: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; NaN counts as a difference."""
    return float((out.float() - expected.float()).norm() / expected.float().norm())


def measured(
    layer: Workload, dtype: DType, M: int, whole: ExpertWeights, groups: dict[str, ExpertParallel],
    parts: dict[str, ShardedExperts], clock: Clock, patience: Callable[[], None],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The rows of one layer at one token count of a rank."""
    rank, size, device = dist.get_rank(), dist.get_world_size(), whole.device
    mine, on_gpu = slice(rank * M, (rank + 1) * M), device.type == "cuda"
    act_dtype = torch_dtype("bf16" if dtype == "fp8" else dtype)

    def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(size * M, layer.K, generator=generator).to(device, act_dtype)
        return hidden, *ROUTINGS["uniform"].sample(size * M, layer.E, layer.topk, device, generator)

    hidden, weights, ids = drawn(M)
    warm_up(whole, layer.topk, [size * M], act_dtype)
    expected = moe_forward(hidden, whole, weights, ids)[mine].clone()

    def alone() -> Tensor:
        return moe_forward(hidden, whole, weights, ids)

    patience()
    single = {"eager": clock.us(alone)} | ({"graph": clock.us(captured(alone)[0])} if on_gpu else {})
    part = next(iter(parts.values()))
    share, local_ids = part.weights_expecting(1.0), part.placement.local_ids(ids)

    def local() -> Tensor:
        return moe_forward(hidden, share, weights, local_ids)

    warm_up(share, layer.topk, [size * M], act_dtype)
    patience()
    experts = {"eager": clock.us(local)} | ({"graph": clock.us(captured(local)[0])} if on_gpu else {})
    arguments = hidden[mine].clone(), weights[mine].clone(), ids[mine].clone()
    sets = [tuple(each[mine].clone() for each in drawn(M + seed)) for seed in range(INPUTS)]
    for name, ep in groups.items():
        patience()

        def spread(part: ShardedExperts = parts[name]) -> Tensor:
            return moe_forward(arguments[0], part, arguments[1], arguments[2])

        try:
            (compared,) = ep.warm_up(parts[name], topk=layer.topk, tokens=[M], act_dtype=act_dtype)
        except (ExchangeFailedError, InvalidInputError) as error:  # on all ranks
            yield {"layer": layer.name, "dtype": dtype, "M": M, "ranks": size, "exchange": name, "failed": str(error)}
            continue
        row = {"layer": layer.name, "dtype": dtype, "M": M, "ranks": size, "exchange": name}
        row |= {"compared_us": compared.us, "compared_graph_us": compared.graph_us}
        patience()
        with ep.tokens_per_rank(M):
            out = spread()
            eager = {"error": relative_difference(out, expected), "host_us": clock.host_us(spread)}
            modes: dict[str, tuple[float, dict[str, Any]]] = {"eager": (clock.us(spread), eager)}
            if on_gpu and ep.capturable(parts[name], topk=layer.topk, M=M):
                patience()
                replay, held = captured(spread)
                replay()
                graph = {"error": relative_difference(held, expected), "like_eager": torch.equal(held, out)}
                patience()
                graph["changed_replays"] = changed_replays(replay, held, arguments, sets)
                modes["graph"] = clock.us(replay), graph
        for mode, (us, facts) in modes.items():
            yield row | {
                "mode": mode, "us": us, "experts_us": experts[mode], "one_gpu_us": single[mode],
                "speedup": single[mode] / us,
            } | facts  # fmt: skip


def main() -> None:
    """Measure and print rows; rank 0 writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny layer and few tokens: that it runs, not how fast")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="token counts of a rank")
    parser.add_argument("--layer", action="append", help="a named layer; repeatable")
    parser.add_argument("--exchange", action="append", help="an exchange; repeatable. All that are available if none")
    parser.add_argument("--patience", type=float, default=40.0, help="seconds of one step, after which processes end")
    parser.add_argument("--out", help="append rows to this file as JSON lines")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    clock = Clock(device, REPLAYS if on_gpu else 3)

    def patience() -> None:
        faulthandler.dump_traceback_later(options.patience, exit=True)

    patience()
    layers = (
        [(TINY, "bf16" if on_gpu else "fp32")]
        if options.tiny
        else [(WORKLOADS[name], dtype) for name, dtype in LAYERS if name in (options.layer or [name])]
    )
    tokens = [1, 16] if options.tiny else [int(count) for count in options.tokens.split(",")]
    if options.out and not dist.get_rank():
        json_lines.append(options.out, {"origin": json_lines.origin(Machine.inspect(device.type))})
    wrong = 0
    with torch.no_grad():
        for layer, dtype in layers:
            wrong += _run(layer, dtype, tokens, options, device, clock, patience)
    faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()
    sys.exit(1 if wrong else 0)


def _run(
    layer: Workload, dtype: Any, tokens: list[int], options: argparse.Namespace, device: torch.device, clock: Clock,
    patience: Callable[[], None],
) -> int:  # fmt: skip
    """Measure one layer, and return how many results were wrong."""
    wrong = 0
    whole = make_experts(layer, dtype, device, torch.Generator(device).manual_seed(0))
    names = options.exchange or ("gather", "alltoall", *(["direct"] if device.type == "cuda" else []))
    groups = {name: ExpertParallel(exchange=name, device=device, timeout=10.0) for name in names}
    first = next(iter(groups.values())).split(whole)
    parts = {name: ep.shard(first.local, experts=layer.E) for name, ep in groups.items()}
    for M in sorted(tokens, reverse=True):  # memory for many tokens serves few as well
        for row in measured(layer, dtype, M, whole, groups, parts, clock, patience):
            right = row.get("error", torch.inf) <= MOST_ERROR and not row.get("changed_replays")
            wrong += not right
            if dist.get_rank():
                continue
            print(_line(row), flush=True)
            if options.out:
                json_lines.append(options.out, row)
    return wrong


def _line(row: dict[str, Any]) -> str:
    what = f"{row['layer']} {row['dtype']} M={row['M']}/rank"
    if "failed" in row:
        return f"{what} {row['exchange']} failed: {row['failed']}"
    facts = (
        f"like eager {row['like_eager']}, {row['changed_replays']} of {CHECKED_REPLAYS} replays changed"
        if row["mode"] == "graph"
        else f"host {row['host_us']:.0f} µs"
    )
    return (
        f"{what} {row['mode']:5} {row['exchange']:9} {row['us']:9.1f} µs, experts {row['experts_us']:9.1f} µs, "
        f"one {row['one_gpu_us']:9.1f} µs: {row['speedup']:.2f}x, error {row['error']:.1e}, {facts}"
    )


if __name__ == "__main__":
    main()
