"""What connects the ranks, as two figures for each kind of link: the time to start, and bytes per second."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Link:
    """One kind of link.

    Attributes:
        name: What it is.
        latency_us: Time of a collective of no bytes, in µs.
        bytes_per_us: Bytes that leave one GPU in one direction in a µs.
        source: Where the figures come from.
    """

    name: str
    latency_us: float
    bytes_per_us: float
    source: str


@dataclass(frozen=True)
class Cluster:
    """Hosts of some GPUs each.

    Attributes:
        name: What it is called.
        node: GPUs that a fast link connects.
        inside: The link within a host.
        between: The link between hosts, of one GPU.
    """

    name: str
    node: int
    inside: Link
    between: Link


NVLINK4: Final = Link(
    "NVLink 4", 6.0, 380e3,
    "450 GB/s nominal a direction, of which NCCL's maintainers and nccl-tests report 370 to 390; latency assumed",
)  # fmt: skip
NDR400: Final = Link("InfiniBand NDR", 20.0, 45e3, "one NIC of 400 Gb/s a GPU, 90 % of it; latency assumed")
CLUSTERS: Final[Mapping[str, Cluster]] = {
    cluster.name: cluster for cluster in (Cluster("hgx-h200", 8, NVLINK4, NDR400),)
}


def distinct_groups(E: int, topk: int, groups: int) -> float:
    """Expected number of groups, of so many that share E experts evenly, that hold one of a token's topk experts."""
    return groups * (1 - math.comb(E - E // groups, topk) / math.comb(E, topk))


@dataclass(frozen=True)
class Crossing:
    """How long rows take one way, with each way to send them.

    Attributes:
        gather: All rows to all ranks, in µs.
        alltoall: Each row once to each rank that needs it, in µs.
        alltoall_by_node: Once to each host that needs it, and from there to its GPUs, in µs.
    """

    gather: float
    alltoall: float
    alltoall_by_node: float


def crossing(cluster: Cluster, ranks: int, M: int, row_bytes: float, E: int, topk: int) -> Crossing:
    """Time for M rows of each rank to reach the ranks that hold their experts; results take as long back.

    Latency and bytes over bandwidth of the busiest link, the two kinds of links at the same time. Routing is uniform
    and nothing else is on the links.

    Args:
        cluster: The links.
        ranks: GPUs; of whole hosts where there is more than one.
        M: Tokens of each rank.
        row_bytes: Bytes of one row.
        E: Experts of the whole layer.
        topk: Experts per token.
    """
    local, nodes = min(ranks, cluster.node), max(1, ranks // cluster.node)
    needed, needed_nodes = distinct_groups(E, topk, ranks), distinct_groups(E, topk, nodes)

    def longer(inside: float, between: float) -> float:
        times = [cluster.inside.latency_us + M * row_bytes * inside / cluster.inside.bytes_per_us]
        if nodes > 1:
            times.append(cluster.between.latency_us + M * row_bytes * between / cluster.between.bytes_per_us)
        return max(times)

    return Crossing(
        gather=longer((local - 1) * nodes, nodes - 1),
        alltoall=longer(needed * (local - 1) / ranks, needed * (ranks - local) / ranks),
        alltoall_by_node=longer(needed * (local - 1) / local, needed_nodes * (nodes - 1) / nodes),
    )
