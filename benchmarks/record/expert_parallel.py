"""Two GPUs over one: a layer whose experts are spread over ranks, against one rank that holds all of them.

    torchrun --nproc-per-node 2 -m moe_dispatch.benchmarks.record.expert_parallel --out rows.jsonl
    torchrun --nproc-per-node 2 -m moe_dispatch.benchmarks.record.expert_parallel --exchange direct --tokens 16,256
    torchrun --nproc-per-node 2 -m moe_dispatch.benchmarks.record.expert_parallel --tiny     that it works; CPU, too

For each layer and token count M of a rank: the time of one rank that runs the tokens of all ranks with all experts, the
time of a rank's share of the experts without any exchange, and the time of all ranks together with each exchange,
eagerly with stated counts and in a replayed CUDA graph. With --replicated all ranks have the same M tokens. A time is
the median over bursts of the slowest rank's time per call, in µs; a burst is calls in a row after a rest and one that
is not timed, so that all ranks are in step when it begins. A graph that is timed holds several calls with inputs of
their own, as a model's graph holds its layers. `speedup` is the first time over the last, and `host_us` what an eager
call takes the host. The exchange ``by hand`` is the baseline: three all-gathers, the experts and a reduce-scatter,
written with torch.distributed alone. --division columns divides each expert's columns over the ranks in place of the
experts; given twice, both are measured in turn at each token count, and each row says which.

Rows of the exchange ``chosen`` say which one a group that names none chooses: `regret` is how much longer that one's
time is than the shortest of all exchanges' times in the rows above, and `alike` whether all ranks choose it.

Results are checked first: against the whole layer's, the graph's bits against the eager ones, and many replays with
changing inputs against the first ones, while ranks pause at random. `host_syncs` counts how often an eager call makes
the host wait for the device. Where a step takes longer than --patience seconds every process prints its stacks and
ends. Where a check fails the exit status is 1.
"""

import argparse
import faulthandler
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import ExpertParallel, ExpertWeights, moe_forward, warm_up
from moe_dispatch.backends.exchange.push import ROWS_ASIDE
from moe_dispatch.benchmarks.record import json_lines
from moe_dispatch.benchmarks.record.rank_checks import (
    Call,
    Inputs,
    captured,
    changed_replays,
    host_syncs,
    relative_difference,
)
from moe_dispatch.benchmarks.record.rank_clock import Clock
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.machine import Machine
from moe_dispatch.parallel.collectives import all_gather_flat, reduce_scatter_flat
from moe_dispatch.parallel.placement import Division
from moe_dispatch.parallel.registry import EXCHANGES
from moe_dispatch.parallel.sharded_experts import ShardedExperts
from moe_dispatch.parallel.trial import ExchangeFailedError
from moe_dispatch.problem import DType, Mode
from moe_dispatch.workloads import ROUTINGS, WORKLOADS, Workload, make_experts, torch_dtype

LAYERS: Final[tuple[tuple[str, DType], ...]] = (("qwen3-30b-a3b", "bf16"), ("deepseek-v3", "fp8"))
TOKENS: Final = (1, 16, 256, 4096, 16384)
TINY: Final = Workload("tiny", E=16, topk=4, K=64, N=32)
BURSTS: Final = 15
MOST_ERROR: Final = 2e-2  # relative, of a layer in BF16 or FP8 against the same in another order of sums
INPUTS: Final = 4  # drawn for each token count; their experts' weights together exceed the device's cache
CALLS: Final = 8  # of a graph that is timed
REPLAYS: Final = 300
MANY: Final = 4096  # tokens from which no more replays than that are compared, for time
BY_HAND: Final = "by hand"


def by_hand(arguments: Inputs, experts: ExpertWeights, first: int) -> Tensor:
    """A layer without the exchanges of this package; every rank has as many tokens.

    Args:
        arguments: This rank's hidden_states ``[M, K]``, topk_weights and global topk_ids ``[M, topk]``.
        experts: This rank's weights.
        first: The global id of its first expert; 0 where it has a part of each.
    """
    gathered = []
    for tensor in arguments:
        gathered.append(tensor.new_empty(dist.get_world_size() * tensor.shape[0], tensor.shape[1]))
        all_gather_flat(gathered[-1], tensor)
    rows, weights, ids = gathered
    partial = moe_forward(rows, experts, weights, ids - first)
    out = torch.empty_like(arguments[0])
    reduce_scatter_flat(out, partial)
    return out


class Recorder:
    """Measures one layer.

    Args:
        layer: The layer.
        dtype: Dtype of its weights.
        options: The command's.
        clock: Times calls.
        patience: Called before each step.
    """

    def __init__(
        self, layer: Workload, dtype: DType, options: argparse.Namespace, device: torch.device, clock: Clock,
        patience: Callable[[], None],
    ) -> None:  # fmt: skip
        self._layer, self._dtype, self._options, self._clock = layer, dtype, options, clock
        self._device, self._patience = device, patience
        self._act_dtype = torch_dtype("bf16" if dtype == "fp8" else dtype)
        self._whole = make_experts(layer, dtype, device, torch.Generator(device).manual_seed(0))
        self._origins = 1 if options.replicated else dist.get_world_size()  # ranks with tokens of their own
        tokens: Any = "replicated" if options.replicated else "sharded"
        self._tokens = tokens
        self._choosing = ExpertParallel(tokens=tokens, device=device, timeout=10.0)
        divisions: list[Division] = options.division or ["experts"]
        self._own = {division: self._choosing.split(self._whole, division) for division in divisions}
        self._groups: dict[str, ExpertParallel] = {}
        self._parts: dict[tuple[str, Division], ShardedExperts] = {}

    def rows(self, M: int) -> Iterator[dict[str, Any]]:
        """The rows of one token count of a rank."""
        layer, options, size = self._layer, self._options, dist.get_world_size()
        head = {"layer": layer.name, "dtype": self._dtype, "routing": options.routing, "M": M, "ranks": size}
        if options.replicated:
            head["tokens"] = "replicated"
        rank = dist.get_rank() % self._origins
        mine, every_M = slice(rank * M, (rank + 1) * M), self._origins * M
        every = [self._drawn(M, M + seed) for seed in range(INPUTS)]
        warm_up(self._whole, layer.topk, [every_M], self._act_dtype)
        single = self._times(lambda hidden, weights, ids: moe_forward(hidden, self._whole, weights, ids), every)
        hidden, weights, ids = every[0]
        expected = moe_forward(hidden, self._whole, weights, ids)[mine].clone()
        sets = [tuple(each[mine].clone() for each in inputs) for inputs in every]
        for division, own in self._own.items():
            yield from self._divided({**head, "division": division}, own, every, sets, expected, single)

    def _divided(
        self, head: dict[str, Any], own: ShardedExperts, every: list[Inputs], sets: list[Inputs], expected: Tensor,
        single: dict[Mode, float],
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        """The rows of one token count and one division of the layer."""
        layer, options, place, M = self._layer, self._options, own.placement, sets[0][0].shape[0]
        share = own.weights_expecting(1.0)
        warm_up(share, layer.topk, [self._origins * M], self._act_dtype)
        experts = self._times(
            lambda hidden, weights, ids: moe_forward(hidden, share, weights, ids),
            [(hidden, weights, place.local_ids(ids)) for hidden, weights, ids in every],
        )
        times: dict[Mode, dict[str, float]] = {"eager": {}, "graph": {}}
        compares = not options.brief
        by_hand_too = self._device.type == "cuda" and compares and not options.replicated
        for name in (*self._names(own), *([BY_HAND] if by_hand_too else [])):
            try:
                measured = self._measured(name, own, sets, expected, share)
            except (ExchangeFailedError, InvalidInputError) as error:  # on all ranks
                yield {**head, "exchange": name, "failed": str(error)}
                continue
            for mode, facts in measured.items():
                if name != BY_HAND:
                    times[mode][name] = facts["us"]
                parts = {"experts_us": experts[mode], "one_gpu_us": single[mode]}
                speedup = single[mode] / facts["us"]
                yield {**head, "exchange": name, "mode": mode, **facts, **parts, "speedup": speedup}
        for mode, able in times.items():
            if able and compares:
                yield {**head, "exchange": "chosen", "mode": mode, **self._choice(own, M, mode, able)}

    def _drawn(self, M: int, seed: int) -> Inputs:
        """Tokens of all ranks in rank order, equal on each: ``[ranks·M, …]``, or ``[M, …]`` replicated."""
        layer, count = self._layer, self._origins * M
        on_device, on_host = (torch.Generator(each).manual_seed(seed) for each in (self._device, "cpu"))
        hidden = torch.randn(count, layer.K, generator=on_device, device=self._device).to(self._act_dtype)
        routing = ROUTINGS[self._options.routing]
        return hidden, *routing.sample(count, layer.E, layer.topk, self._device, on_host)

    def _times(self, call: Call, sets: list[Inputs]) -> dict[Mode, float]:
        self._patience()
        times: dict[Mode, float] = {"eager": self._clock.us(lambda: call(*sets[0]))}
        if self._device.type == "cuda":
            times["graph"] = self._clock.us(captured(call, sets * (CALLS // INPUTS))[0], CALLS)
        return times

    def _measured(
        self, name: str, own: ShardedExperts, sets: list[Inputs], expected: Tensor, share: ExpertWeights
    ) -> dict[Mode, dict[str, Any]]:
        """Times and checks of one exchange in each mode that it has."""
        M = sets[0][0].shape[0]
        clock, on_gpu, topk = self._clock, self._device.type == "cuda", self._layer.topk
        self._patience()
        if name == BY_HAND:
            stated: AbstractContextManager[None] = nullcontext()
            capturable, first = on_gpu, own.placement.first

            def spread(*inputs: Tensor) -> Tensor:
                return by_hand(inputs, share, first)

            spread(*sets[0])
        else:
            ep, part = self._part(name, own)
            ep.warm_up(part, topk=topk, tokens=[M], act_dtype=self._act_dtype)
            stated, capturable = ep.tokens_per_rank(M), on_gpu and ep.capturable(part, topk=topk, M=M)

            def spread(*inputs: Tensor) -> Tensor:
                return moe_forward(inputs[0], part, *inputs[1:])

        self._patience()
        static = tuple(each.clone() for each in sets[0])

        def again() -> Tensor:
            return spread(*static)

        with stated:
            out = again()
            facts: dict[str, Any] = {"us": clock.us(again), "host_us": clock.host_us(again)}
            facts["error"] = relative_difference(out, expected)
            if on_gpu:
                facts["host_syncs"] = host_syncs(again)
            measured: dict[Mode, dict[str, Any]] = {"eager": facts}
            if not capturable:
                return measured
            self._patience()
            replay, held = captured(spread, [static])
            replay()
            facts = {"error": relative_difference(held, expected), "like_eager": torch.equal(held, out)}
            self._patience()
            replays = self._options.replays if M < MANY else min(REPLAYS, self._options.replays)
            facts["changed_replays"] = changed_replays(replay, held, static, sets, replays)
            measured["graph"] = {"us": clock.us(captured(spread, sets * (CALLS // INPUTS))[0], CALLS), **facts}
        return measured

    def _names(self, own: ShardedExperts) -> list[str]:
        """The exchanges that are asked for, or all that can serve a division."""
        against = self._choosing.explain(own, self._layer.topk, 1).against
        return self._options.exchange or [name for name, reasons in against.items() if not reasons]

    def _part(self, name: str, own: ShardedExperts) -> tuple[ExpertParallel, ShardedExperts]:
        """The group of an exchange, and the layer's part in it with the same memory; made on first use. Collective."""
        if name not in self._groups:
            self._groups[name] = ExpertParallel(tokens=self._tokens, exchange=name, device=self._device, timeout=10.0)
        ep, key = self._groups[name], (name, own.placement.division)
        if key not in self._parts:
            by_columns = own.placement.division == "columns"
            self._parts[key] = ep.tensor(own.local) if by_columns else ep.shard(own.local, experts=own.E)
        return ep, self._parts[key]

    def _choice(self, own: ShardedExperts, M: int, mode: Mode, able: dict[str, float]) -> dict[str, Any]:
        """What a group that names no exchange chooses, against the times of all."""
        ep, topk = self._choosing, self._layer.topk
        self._patience()
        if mode == "eager":  # for both modes
            ep.warm_up(own, topk=topk, tokens=[M], act_dtype=self._act_dtype)
        chosen = ep.explain(own, topk, M, mode).chosen
        every: list[str] = [""] * ep.size
        dist.all_gather_object(every, chosen)
        regret = able[chosen] / min(able.values()) - 1 if chosen in able else None
        return {"chosen": chosen, "alike": len(set(every)) == 1, "regret": regret}


def is_right(row: dict[str, Any]) -> bool:
    """Whether all that was checked for a row holds."""
    if "chosen" in row:
        return bool(row["alike"])
    waits = row["exchange"] != BY_HAND and EXCHANGES.load(row["exchange"]).requirements.host_sync
    return (
        row.get("error", math.inf) <= MOST_ERROR
        and row.get("like_eager", True)
        and not row.get("changed_replays")
        and (waits or not row.get("host_syncs"))
    )


def main() -> None:
    """Measure and print rows; rank 0 writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny layer: that it runs, not how fast")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="token counts of a rank, in their order")
    parser.add_argument("--layer", action="append", help="a named layer; repeatable")
    parser.add_argument("--exchange", action="append", help="an exchange; repeatable. All that are available if none")
    parser.add_argument(
        "--division", action="append", choices=get_args(Division),
        help="what of the layer is divided over the ranks; repeatable. Experts if none",
    )  # fmt: skip
    parser.add_argument("--routing", default="uniform", choices=list(ROUTINGS), help="how tokens choose experts")
    parser.add_argument(
        "--replicated", action="store_true", help="the same tokens on all ranks, in place of sharded ones"
    )
    parser.add_argument(
        "--replays", type=int, default=REPLAYS, help="replays of each graph of few tokens that are compared"
    )
    parser.add_argument("--brief", action="store_true", help="neither the layer by hand nor the choice of an exchange")
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
    clock = Clock(device, BURSTS if on_gpu else 2)

    def patience() -> None:
        faulthandler.dump_traceback_later(options.patience, exit=True)

    patience()
    layers = (
        [(TINY, "bf16" if on_gpu else "fp32")]
        if options.tiny
        else [(WORKLOADS[name], dtype) for name, dtype in LAYERS if name in (options.layer or [name])]
    )
    # On GPUs also so many that rows travel beside the experts' first kernels.
    few = [1, 16, ROWS_ASIDE // (2 * TINY.K)] if on_gpu else [1, 16]
    tokens = few if options.tiny else [int(count) for count in options.tokens.split(",")]
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
    """Measure one layer, and return how many rows are wrong."""
    wrong = 0
    recorder = Recorder(layer, dtype, options, device, clock, patience)
    for M in tokens:
        for row in recorder.rows(M):
            wrong += not is_right(row)
            if dist.get_rank():
                continue
            print(_line(row), flush=True)
            if options.out:
                rounded = {key: float(f"{fact:.4g}") if type(fact) is float else fact for key, fact in row.items()}
                json_lines.append(options.out, rounded)
    return wrong


def _line(row: dict[str, Any]) -> str:
    what = f"{row['layer']} {row['dtype']} by {row['division']} M={row['M']}/rank"
    if "failed" in row:
        return f"{what} {row['exchange']} failed: {row['failed']}"
    if "chosen" in row:
        ranks = "on all ranks" if row["alike"] else "NOT on all ranks"
        regret = "not measured above" if row["regret"] is None else f"{row['regret']:.1%} behind the fastest"
        return f"{what} {row['mode']:5} chosen: {row['chosen']} {ranks}, {regret}"
    facts = (
        f"like eager {row['like_eager']}, {row['changed_replays']} replays changed"
        if row["mode"] == "graph"
        else f"host {row['host_us']:.0f} µs, waits {row.get('host_syncs', '-')} times"
    )
    return (
        f"{what} {row['mode']:5} {row['exchange']:9} {row['us']:9.1f} µs, experts {row['experts_us']:9.1f} µs, "
        f"one {row['one_gpu_us']:9.1f} µs: {row['speedup']:.2f}x, error {row['error']:.1e}, {facts}"
    )


if __name__ == "__main__":
    main()
