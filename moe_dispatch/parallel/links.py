"""What connects the ranks, as two figures for each kind of link: the time to start, and bytes per second."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final


@dataclass(frozen=True)
class Link:
    """One kind of link.

    Attributes:
        name: What it is.
        latency_us: Time of one way of an exchange without bytes, in µs.
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
        direct: The link within a host as kernels get it that store in other GPUs' memory.
        inside: The same link as NCCL's collectives get it.
        between: The link between hosts, of one GPU.
    """

    name: str
    node: int
    direct: Link
    inside: Link
    between: Link


_MEASURED: Final = "calibrated on two H200s, benchmarks/results/nvidia_h200_x2/calibration-2d01441.json.xz"
NVLINK4_DIRECT: Final = Link("NVLink 4 by stores", 4.5, 317e3, _MEASURED)
NVLINK4_NCCL: Final = Link("NVLink 4 by NCCL", 8.9, 193e3, _MEASURED)
NDR400: Final = Link("InfiniBand NDR", 20.0, 45e3, "one NIC of 400 Gb/s a GPU, 90 % of it; latency assumed")
CLUSTERS: Final[Mapping[str, Cluster]] = {
    cluster.name: cluster for cluster in (Cluster("hgx-h200", 8, NVLINK4_DIRECT, NVLINK4_NCCL, NDR400),)
}


MOST_BYTES_PER_US: Final = 1e9  # of a fitted line: samples in which bytes make no difference


def fitted(samples: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The line latency + bytes / rate through measured times with the least sum of squared relative errors.

    Args:
        samples: Bytes and µs, of at least two different numbers of bytes.

    Returns:
        Latency in µs, at least 0, and bytes per µs.
    """
    # Of t ≈ a + b·s: minimise the sum of (a/t + b·s/t - 1)².
    aa, ab, bb = (math.fsum(size**power / us**2 for size, us in samples) for power in (0, 1, 2))
    a1, b1 = (math.fsum(size**power / us for size, us in samples) for power in (0, 1))
    slope = max((aa * b1 - ab * a1) / (aa * bb - ab * ab), 1 / MOST_BYTES_PER_US)
    if (latency := (a1 - ab * slope) / aa) < 0:
        latency, slope = 0.0, b1 / bb
    return latency, 1 / slope


def distinct_groups(E: int, topk: int, groups: int) -> float:
    """Expected number of groups, of so many that share E experts evenly, that hold one of a token's topk experts."""
    return groups * (1 - math.comb(E - E // groups, topk) / math.comb(E, topk))


def slots_of_busiest(tokens: int, E: int, topk: int, ranks: int) -> float:
    """Expected slots of the rank that most of all ranks' slots fall on, where the router chooses uniformly.

    A rank holds a hypergeometric number of a token's experts. Summed over tokens these are nearly normal, with a fixed
    sum over ranks; their expected maximum is Blom's approximation (Statistical Estimates and Transformed
    Beta-Variables, 1958), 5 % low at 8 slots of a rank.
    """
    mean = tokens * topk / ranks
    deviation = math.sqrt(mean * (E - topk) / (E - 1))  # of independent loads, of which the mean is taken off
    return mean + deviation * NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


@dataclass(frozen=True)
class Crossing:
    """How long rows take one way, with each way to send them.

    Attributes:
        direct: All rows to all ranks by stores in their memory, in µs; infinite over several hosts.
        gather: All rows to all ranks by NCCL, in µs.
        alltoall: Each row by NCCL, once to each rank that needs it, in µs.
        alltoall_by_node: Each row by NCCL, once to each host that needs it and from there to its GPUs, in µs.
    """

    direct: float
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

    everything = M * row_bytes * (local - 1)
    direct = cluster.direct.latency_us + everything / cluster.direct.bytes_per_us
    return Crossing(
        direct=direct if nodes == 1 else math.inf,
        gather=longer((local - 1) * nodes, nodes - 1),
        alltoall=longer(needed * (local - 1) / ranks, needed * (ranks - local) / ranks),
        alltoall_by_node=longer(needed * (local - 1) / local, needed_nodes * (nodes - 1) / nodes),
    )
