"""Two GPUs over one: a layer whose experts are spread over ranks, against one rank that holds all of them.

    torchrun --nproc-per-node 2 -m moe_dispatch.benchmarks.record.expert_parallel --out rows.jsonl
    torchrun --nproc-per-node 2 -m moe_dispatch.benchmarks.record.expert_parallel --tiny     a CPU, with gloo

For each layer and token count M of a rank: the time of one rank that runs the tokens of all ranks with all experts, and
the time of all ranks together with each exchange, eagerly with stated counts and in a replayed CUDA graph. A time is
the median over repeats of the slowest rank's, in µs; `speedup` is the first over the second. Outputs are compared with
the whole layer's.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import ExpertParallel, ExpertWeights, ShardedExperts, moe_forward, warm_up
from moe_dispatch.benchmarks.record import json_lines
from moe_dispatch.machine import Machine
from moe_dispatch.measure.inputs import timing_events
from moe_dispatch.problem import DType
from moe_dispatch.workloads import ROUTINGS, WORKLOADS, Workload, make_experts, torch_dtype

LAYERS: Final[tuple[tuple[str, DType], ...]] = (("qwen3-30b-a3b", "bf16"), ("deepseek-v3", "fp8"))
TOKENS: Final = (1, 16, 256, 4096, 16384)
TINY: Final = Workload("tiny", E=16, topk=4, K=64, N=32)
REPLAYS: Final = 30


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


def measured(
    layer: Workload, dtype: DType, M: int, whole: ExpertWeights, groups: dict[str, ExpertParallel],
    parts: dict[str, ShardedExperts], clock: Clock,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The rows of one layer at one token count of a rank."""
    rank, size, device = dist.get_rank(), dist.get_world_size(), whole.device
    generator = torch.Generator().manual_seed(M)
    hidden = torch.randn(size * M, layer.K, generator=generator).to(
        device, torch_dtype("bf16" if dtype == "fp8" else dtype)
    )
    weights, ids = ROUTINGS["uniform"].sample(size * M, layer.E, layer.topk, device, generator)
    expected = moe_forward(hidden, whole, weights, ids)
    warm_up(whole, layer.topk, [size * M], hidden.dtype)

    def alone() -> Tensor:
        return moe_forward(hidden, whole, weights, ids)

    on_gpu = device.type == "cuda"
    single = {"eager": clock.us(alone)} | ({"graph": clock.us(captured(alone)[0])} if on_gpu else {})
    mine = slice(rank * M, (rank + 1) * M)
    arguments = hidden[mine].contiguous(), weights[mine].contiguous(), ids[mine].contiguous()
    for name, ep in groups.items():
        part = parts[name]

        def spread(part: ShardedExperts = part) -> Tensor:
            return moe_forward(arguments[0], part, arguments[1], arguments[2])

        compared = ep.warm_up(part, topk=layer.topk, tokens=[M], act_dtype=hidden.dtype)
        with ep.tokens_per_rank(M):
            outs = {"eager": spread()}
            times = {"eager": clock.us(spread)}
            if on_gpu and ep.capturable(part, topk=layer.topk, M=M):
                replay, outs["graph"] = captured(spread)
                times["graph"] = clock.us(replay)
        for mode, us in times.items():
            error = float((outs[mode].float() - expected[mine].float()).norm() / expected[mine].float().norm())
            yield {
                "layer": layer.name, "dtype": dtype, "M": M, "ranks": size, "mode": mode, "exchange": name,
                "us": us, "one_gpu_us": single[mode], "speedup": single[mode] / us, "error": error,
                "compared_us": compared[0].us,
            }  # fmt: skip


def main() -> None:
    """Measure and print rows; rank 0 writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny layer and few tokens: that it runs, not how fast")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="token counts of a rank")
    parser.add_argument("--layer", action="append", help="a named layer; repeatable")
    parser.add_argument("--exchange", action="append", help="an exchange; repeatable. All that are available if none")
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
    layers = (
        [(TINY, "fp32")]
        if options.tiny
        else [(WORKLOADS[name], dtype) for name, dtype in LAYERS if name in (options.layer or [name])]
    )
    tokens = [1, 16] if options.tiny else [int(count) for count in options.tokens.split(",")]
    if options.out and not dist.get_rank():
        json_lines.append(options.out, {"origin": json_lines.origin(Machine.inspect(device.type))})
    with torch.no_grad():
        for layer, dtype in layers:
            _run(layer, dtype, tokens, options, device, clock)
    dist.destroy_process_group()


def _run(
    layer: Workload, dtype: Any, tokens: list[int], options: argparse.Namespace, device: torch.device, clock: Clock
) -> None:
    whole = make_experts(layer, dtype, device, torch.Generator(device).manual_seed(0))
    groups = {name: ExpertParallel(exchange=name, device=device) for name in options.exchange or ("gather", "alltoall")}
    parts = {name: ep.split(whole) for name, ep in groups.items()}
    for M in tokens:
        for row in measured(layer, dtype, M, whole, groups, parts, clock):
            if dist.get_rank():
                continue
            print(
                f"{row['layer']} {row['dtype']} M={M}/rank {row['mode']:5} {row['exchange']:9} {row['us']:9.1f} µs, "
                f"one {row['one_gpu_us']:9.1f} µs: {row['speedup']:.2f}x, error {row['error']:.1e}",
                flush=True,
            )
            if options.out:
                json_lines.append(options.out, row)


if __name__ == "__main__":
    main()
