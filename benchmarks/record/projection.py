"""The projection onto more GPUs as the docs have it: links as calibrated, the check on two GPUs, and the tables."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from moe_dispatch.benchmarks.record.expert_parallel import CALLS, LAYERS, TOKENS
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.machine import Machine
from moe_dispatch.parallel.exchange_times import ParallelCalibration
from moe_dispatch.parallel.links import CLUSTERS
from moe_dispatch.parallel.projection import Projection
from moe_dispatch.workloads import WORKLOADS

CLUSTER: Final = CLUSTERS["hgx-h200"]
RANKS: Final = (8, 64)
# The exchange whose line each kind of link has, in replays with sharded tokens.
LINES: Final[Mapping[str, str]] = {CLUSTER.direct.name: "direct", CLUSTER.inside.name: "gather"}

Row = Mapping[str, Any]


def lines(calibration: ParallelCalibration) -> dict[str, tuple[float, float]]:
    """Latency in µs and bytes per µs of each kind of link.

    Raises:
        InvalidInputError: The calibration is not of GPUs that address each other.
    """
    measured = {
        each.exchange: (each.latency_us, each.bytes_per_us)
        for each in calibration.links
        if (each.tokens, each.mode) == ("sharded", "graph")
    }
    if lacking := sorted(set(LINES.values()) - set(measured)):
        raise InvalidInputError(
            f"the calibration lacks links of {' and '.join(lacking)} in CUDA graphs with sharded tokens (it has "
            f"{', '.join(measured) or 'none'}); give a calibration of two GPUs that NVLink joins"
        )
    return {name: measured[exchange] for name, exchange in LINES.items()}


def measured_calls(rows: Iterable[Row]) -> Iterable[Row]:
    """Replays of named layers on two GPUs under uniform routing, of the rows of the record; the latest of each."""
    latest: dict[object, Row] = {}
    for row in rows:
        wanted = (row.get("mode"), row.get("routing"), row.get("ranks")) == ("graph", "uniform", 2)
        if wanted and "us" in row and row["layer"] in WORKLOADS:
            latest[row["layer"], row["M"], row["exchange"], row.get("division", "experts")] = row
    return latest.values()


def markdown(calibration: ParallelCalibration, rows: Iterable[Row]) -> str:
    """The section of the docs."""
    projection = Projection(Machine.load("h200"), CLUSTER)
    text = ["| link | latency, µs | GB/s a direction | figures |", "|---|---:|---:|---|"]
    for name, (latency, rate) in lines(calibration).items():
        text.append(f"| {name} | {latency:.1f} | {rate / 1e3:.0f} | `{LINES[name]}` in graphs, calibrated |")
    far = CLUSTER.between
    text += [f"| {far.name} | {far.latency_us:.0f} | {far.bytes_per_us / 1e3:.0f} | {far.source} |", ""]
    columns = "one GPU, µs", "two, µs", "projected", "off", "experts, µs", "projected", "speed-up", "projected"
    text += [f"| layer, M a rank, by | {' | '.join(columns)} |"]
    text += ["|---|" + "---:|" * 8]
    for row in measured_calls(rows):
        codes = row["dtype"] == "fp8"
        division = row.get("division", "experts")
        each = projection.project(
            WORKLOADS[row["layer"]], row["dtype"], row["M"], 2, division=division, wire_fp8=codes, calls=CALLS
        )  # fmt: skip
        if row["exchange"] == each.exchange + "_fp8" * codes:
            times = f"{row['one_gpu_us']:.0f} | {row['us']:.0f} | {each.us:.0f} | {each.us / row['us'] - 1:+.0%}"
            parts = f"{row['experts_us']:.0f} | {each.experts_us:.0f} | {row['speedup']:.2f} | {each.serial:.2f}"
            what = f"{row['layer']} {row['dtype']}, {row['M']}, {row['exchange']}" + ", columns" * (
                division == "columns"
            )
            text.append(f"| {what} | {times} | {parts} |")
    text += ["", "| layer, M a rank | " + " | ".join(f"{ranks} GPUs" for ranks in RANKS) + " |"]
    text += ["|---|" + "---|" * len(RANKS)]
    for name, dtype in LAYERS:
        for M in TOKENS:
            every = [projection.project(WORKLOADS[name], dtype, M, n, wire_fp8=dtype == "fp8") for n in RANKS]
            cells = " | ".join(f"{each.serial:.2f} to {each.overlapped:.2f}, {each.exchange}" for each in every)
            text.append(f"| {name} {dtype}, {M} | {cells} |")
    return "\n".join(text)
