"""`--parallel` of `moe-dispatch explain` and `calibrate`: a layer on more GPUs, projected or measured."""

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from moe_dispatch.commands.console import OUT, heading, line, machine_line, microseconds, plain, print_json, table
from moe_dispatch.commands.options import tokens_of
from moe_dispatch.errors import InvalidInputError

if TYPE_CHECKING:
    from moe_dispatch.machine import Machine
    from moe_dispatch.parallel.calibration import ParallelReport
    from moe_dispatch.problem import DType
    from moe_dispatch.workloads import Workload

_LEGEND = (
    "A projection: none of these times was measured on more than one GPU. 1 GPU: one that holds all experts and runs "
    "the tokens of all ranks. serial and hidden are speed-ups over it. serial: experts wait for all of their rows, and "
    "sending results (by direct, only what it takes longer than computing them) is added. hidden: transfers hide "
    "behind experts as far as they can. Routing is uniform. Divided by columns, each GPU has a part of every expert."
)


def print_projection(
    layer: "Workload", dtype: "DType", tokens: Sequence[int], ranks: str, machine: "Machine", *, wire_fp8: bool,
    as_json: bool = False,
) -> None:  # fmt: skip
    """Print a table, or JSON, of a layer over token counts of a rank and numbers of GPUs."""
    from moe_dispatch.parallel.links import CLUSTERS
    from moe_dispatch.parallel.placement import Division
    from moe_dispatch.parallel.projection import LEAST_COLUMNS, Projection

    cluster = CLUSTERS["hgx-h200"]
    projection = Projection(machine, cluster)
    sizes = list(dict.fromkeys(tokens_of(ranks, "--parallel")))
    every = [
        projection.project(layer, dtype, M, size, division=division, wire_fp8=wire_fp8)
        for M in dict.fromkeys(tokens)
        for size in sizes
        for division in get_args(Division)
        if division == "experts" or layer.N % (LEAST_COLUMNS * size) == 0
    ]
    if as_json:
        lines = [
            dataclasses.asdict(projected) | {"serial": projected.serial, "hidden": projected.overlapped}
            for projected in every
        ]
        head = {"layer": layer.name, "dtype": dtype, "cluster": cluster.name, "projection": True}
        print_json(head | {"rows": lines})
        return
    columns = "M a rank", "GPUs", "divided", "1 GPU", "experts", "dispatch", "combine", "by", "serial", "hidden"
    rows = table(*columns)
    for projected in every:
        times = (projected.one_gpu_us, projected.experts_us, projected.dispatch_us, projected.combine_us)
        factors = (f"{projected.serial:.2f}", f"{projected.overlapped:.2f}")
        facts = (str(projected.M), str(projected.ranks), projected.division)
        rows.add_row(*facts, *map(microseconds, times), projected.exchange, *factors)
    line(f"[bold]{plain(layer.name)}[/bold]  {dtype} on {cluster.name}: {cluster.node} GPUs a host")
    line(plain(machine_line(machine)), style="dim")
    for link in (cluster.direct, cluster.inside, cluster.between):
        figures = f"{link.latency_us:g} µs and {link.bytes_per_us / 1e3:.0f} GB/s a direction"
        line(plain(f"{link.name}: {figures} ({link.source})"), style="dim")
    OUT.print()
    OUT.print(rows)
    line(_LEGEND, style="dim")


def calibrate_ranks(
    layers: "Sequence[tuple[Workload, DType]]", tokens: Sequence[int] | None, device: str | None,
    budget_s: float | None, timeout_s: float, *, divisions: Sequence[str], as_json: bool,
) -> None:  # fmt: skip
    """Calibrate the group of torchrun's processes; the first one prints. See `calibrate_parallel`."""
    import torch
    import torch.distributed as dist

    from moe_dispatch.parallel.calibration import DEFAULT_TOKENS, calibrate_parallel
    from moe_dispatch.parallel.placement import Division

    known = [each for each in get_args(Division) if each in divisions]
    if len(known) < len(set(divisions)):
        raise InvalidInputError(f"--division must be experts or columns, got {', '.join(divisions)[:80]!r}")
    if not dist.is_initialized():
        if "LOCAL_RANK" not in os.environ:
            command = "torchrun --nproc-per-node N --no-python moe-dispatch calibrate --parallel"
            raise InvalidInputError(f"--parallel measures several processes; start them by `{command} …`")
        on_gpu = torch.cuda.is_available() and device != "cpu"
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if on_gpu else "gloo")
    first = dist.get_rank() == 0
    report = calibrate_parallel(
        layers, tokens=tokens or DEFAULT_TOKENS, divisions=known, device=device, budget_s=budget_s, timeout_s=timeout_s,
        on_progress=lambda what: line(plain(what), style="dim") if first and not as_json else None,
    )  # fmt: skip
    if first and as_json:
        head = {"path": str(report.path), "skipped": report.skipped}
        print_json(head | report.measured.model_dump(mode="json"))
    elif first:
        _print_measured(report)


def _print_measured(report: "ParallelReport") -> None:
    measured = report.measured
    heading(f"links of {measured.topology}, one way")
    rows = table("exchange", "tokens", "mode", "latency", "GB/s", numbers=("latency", "GB/s"))
    for each in measured.links:
        rate = f"{each.bytes_per_us / 1e3:.3g}"
        rows.add_row(plain(each.exchange), each.tokens, each.mode, microseconds(each.latency_us), rate)
    OUT.print(rows)
    heading("layers")
    columns = ("M", "call", "experts", "exposed", "hidden")
    rows = table("layer", "by", "tokens", "mode", "M", "exchange", *columns[1:], numbers=columns)
    for point in measured.layers:
        kind = point.kind
        layer = f"E={kind.E} topk={kind.topk} K={kind.K} N={kind.N} {kind.dtype}"
        for name, split in sorted(point.splits.items(), key=lambda item: item[1].us):
            times = (split.us, split.experts_us, split.exposed_us, split.hidden_us)
            rows.add_row(
                layer, kind.division, kind.tokens, kind.mode, str(kind.M), plain(name), *map(microseconds, times)
            )
    OUT.print(rows)
    for note in report.skipped:
        line(f"[yellow]skipped[/yellow] {plain(note)}")
    line(plain(report.path))
