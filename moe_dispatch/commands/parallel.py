"""`moe-dispatch explain --parallel`: a layer projected onto more GPUs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_dispatch.commands.console import OUT, line, machine_line, microseconds, plain, table
from moe_dispatch.commands.options import tokens_of

if TYPE_CHECKING:
    from moe_dispatch.machine import Machine
    from moe_dispatch.problem import DType
    from moe_dispatch.workloads import Workload

_LEGEND = (
    "A projection: nothing here was measured on more than one GPU. 1 GPU: all experts and the tokens of all ranks. "
    "serial: speed-up where experts wait for transfers, as now; hidden: where transfers hide behind experts. Routing "
    "is uniform."
)


def print_projection(
    layer: "Workload", dtype: "DType", tokens: Sequence[int], ranks: str, machine: "Machine", *, wire_fp8: bool
) -> None:
    """Print a table of a layer over token counts of a rank and numbers of GPUs.

    Args:
        layer: The layer.
        dtype: Dtype of its weights.
        tokens: Token counts of a rank.
        ranks: Numbers of GPUs, comma-separated.
        machine: The GPU.
        wire_fp8: Whether rows cross as FP8.
    """
    from moe_dispatch.parallel.links import CLUSTERS
    from moe_dispatch.parallel.projection import Projection

    cluster = CLUSTERS["hgx-h200"]
    projection = Projection(machine, cluster)
    rows = table("M a rank", "GPUs", "1 GPU", "experts", "dispatch", "combine", "by", "serial", "hidden")
    for M in dict.fromkeys(tokens):
        for size in dict.fromkeys(tokens_of(ranks)):
            projected = projection.project(layer, dtype, M, size, wire_fp8=wire_fp8)
            times = (projected.one_gpu_us, projected.experts_us, projected.dispatch_us, projected.combine_us)
            factors = (f"{projected.serial:.2f}", f"{projected.overlapped:.2f}")
            rows.add_row(str(M), str(size), *map(microseconds, times), projected.exchange, *factors)
    line(f"[bold]{plain(layer.name)}[/bold]  {dtype} on {cluster.name}: {cluster.node} GPUs a host")
    line(plain(machine_line(machine)), style="dim")
    for link in (cluster.inside, cluster.between):
        figures = f"{link.latency_us:.0f} µs and {link.bytes_per_us / 1e3:.0f} GB/s a direction"
        line(plain(f"{link.name}: {figures} ({link.source})"), style="dim")
    OUT.print()
    OUT.print(rows)
    line(_LEGEND, style="dim")
