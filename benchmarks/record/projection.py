"""The projection onto more GPUs as the docs have it: the lines through measured links, the check, and the tables."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from moe_dispatch.benchmarks.record.expert_parallel import LAYERS, TOKENS
from moe_dispatch.machine import Machine
from moe_dispatch.parallel.links import CLUSTERS, fitted
from moe_dispatch.parallel.projection import Projection
from moe_dispatch.workloads import WORKLOADS

CLUSTER: Final = CLUSTERS["hgx-h200"]
RANKS: Final = (2, 8, 64)
# Which rows of links.jsonl a line is fitted to; replays where there are, else eager calls.
LINES: Final[Mapping[str, tuple[str, ...]]] = {
    CLUSTER.direct.name: ("Triton put, flag and wait",),
    CLUSTER.inside.name: ("all_gather", "reduce_scatter"),
}

Row = Mapping[str, Any]


def lines(rows: Iterable[Row]) -> dict[str, tuple[float, float]]:
    """Latency in µs and bytes per µs of each kind of link, by `fitted`."""
    sized = [row for row in rows if "bytes" in row]
    return {
        name: fitted([(row["bytes"], row.get("graph_us") or row["eager_us"]) for row in sized if row["what"] in whats])
        for name, whats in LINES.items()
    }


def checked(rows: Iterable[Row], projection: Projection) -> Iterator[tuple[Row, float, float]]:
    """Measured replays on two GPUs by the projected exchange, with the projected time of two and of one GPU."""
    for row in rows:
        layer, uniform = WORKLOADS.get(row.get("layer", "")), row.get("routing", "uniform") == "uniform"
        if layer and uniform and row.get("mode") == "graph" and row["ranks"] == 2:
            projected = projection.project(layer, row["dtype"], row["M"], 2)
            if row["exchange"] == projected.exchange:
                yield row, projected.one_gpu_us / projected.serial, projected.one_gpu_us


def markdown(links: Iterable[Row], measured: Iterable[Row]) -> str:
    """The section of the docs."""
    projection = Projection(Machine.load("h200"), CLUSTER)
    text = ["| link | latency, µs | GB/s a direction | figures |", "|---|---:|---:|---|"]
    for name, (latency, rate) in lines(links).items():
        text.append(f"| {name} | {latency:.1f} | {rate / 1e3:.0f} | the line through {' and '.join(LINES[name])} |")
    between = CLUSTER.between
    rate = between.bytes_per_us / 1e3
    text += [f"| {between.name} | {between.latency_us:.0f} | {rate:.0f} | {between.source} |", ""]
    text += ["| layer, M a rank | two GPUs measured, µs | projected | off | speed-up measured | projected | off |"]
    text += ["|---|---:|---:|---:|---:|---:|---:|"]
    for row, two, one in checked(measured, projection):
        figures = f"{row['us']:.0f} | {two:.0f} | {two / row['us'] - 1:+.0%}"
        factors = f"{row['speedup']:.2f} | {one / two:.2f} | {one / two / row['speedup'] - 1:+.0%}"
        text.append(f"| {row['layer']} {row['dtype']}, {row['M']} | {figures} | {factors} |")
    for name, dtype in LAYERS:
        text += ["", f"| {name} {dtype}, M a rank | GPUs | 1 GPU, µs | experts, µs | transfers, µs | by "]
        text[-1] += "| serial × | hidden × |"
        text += ["|---:|---:|---:|---:|---:|---|---:|---:|"]
        for M in TOKENS:
            for ranks in RANKS:
                each = projection.project(WORKLOADS[name], dtype, M, ranks)
                times = f"{each.one_gpu_us:.0f} | {each.experts_us:.0f} | {each.transfer_us:.0f} | {each.exchange}"
                text.append(f"| {M} | {ranks} | {times} | {each.serial:.2f} | {each.overlapped:.2f} |")
    return "\n".join(text)
