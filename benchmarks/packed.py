"""Rows packed for the repository: what many rows share is said once. `rows.load` reads them like any others.

    python -m moe_dispatch.benchmarks.packed ROWS_OR_CALIBRATION... --out benchmarks/results/nvidia_h200/sweep.jsonl

Three kinds of lines: ``run`` (machine, versions, commit, ceilings), ``config`` (a backend and configuration, numbered
in order of appearance), and ``point`` with its rows as lists of the columns that ``run`` names.
"""

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from moe_dispatch.benchmarks.command import mistakes_exit
from moe_dispatch.benchmarks.rows import BenchRow, load, recorded
from moe_dispatch.machine import Machine
from moe_dispatch.measure import known_ceilings
from moe_dispatch.measure.provenance import versions
from moe_dispatch.policies.calibration.worker import distinct_inputs
from moe_dispatch.policies.measurements.schema import CalibrationFile, LayerShape, parse_calibration, read_bytes
from moe_dispatch.system.files import write_atomically
from moe_dispatch.workloads import WORKLOADS, Workload

FORMAT: Final = 1
RUN: Final = ("machine", "fingerprint", "versions", "commit", "ceilings", "roofline_from")
POINT: Final = (
    "workload", "E", "topk", "K", "N", "dtype", "M", "mode", "routing", "inputs", "hit_experts", "roofline_us",
)  # fmt: skip
# The columns of a row, after the number of its configuration; trailing ones that say nothing are left out.
COLUMNS: Final = ("us", "us_q1", "us_q3", "samples", "error", "deterministic", "reason")
DIGITS: Final = 5


def pack(rows: Iterable[BenchRow]) -> Iterator[str]:
    """Rows as packed lines, in an order that depends on the rows alone."""
    configs: dict[str, int] = {}
    run: dict[str, Any] = {}
    point: dict[str, Any] = {}
    held: list[list[Any]] = []
    for row in sorted(rows, key=lambda row: (row.fingerprint, row.commit, row.workload, *_order(row))):
        data = row.model_dump(mode="json")
        this_run, this_point = ({name: data[name] for name in names} for names in (RUN, POINT))
        if (this_run, this_point) != (run, point) and held:
            yield _line({"point": point, "rows": held})
            held = []
        if this_run != run:
            configs = {}
            yield _line({"packed": FORMAT, "columns": COLUMNS, "run": this_run})
        run, point = this_run, this_point
        config = _line({"backend": row.backend, "config": row.config})
        if config not in configs:
            configs[config] = len(configs)
            yield f'{{"config":{config}}}'
        held.append([configs[config], *_trimmed([_rounded(data[name]) for name in COLUMNS])])
    if held:
        yield _line({"point": point, "rows": held})


def unpack(lines: Iterable[str]) -> Iterator[BenchRow]:
    """The rows behind packed lines.

    Raises:
        ValueError: A line is damaged; pydantic's and json's errors are such.
    """
    run: dict[str, Any] = {}
    columns: list[str] = []
    configs: list[dict[str, Any]] = []
    for line in lines:
        data = json.loads(line)
        if "run" in data:
            if data["packed"] != FORMAT:
                raise ValueError(f"packed as format {data['packed']}, and this version reads {FORMAT}")
            run, columns, configs = recorded(data["run"]), data["columns"], []
        elif "config" in data:
            configs.append(data["config"])
        else:
            point = recorded(data["point"])
            for number, *values in data["rows"]:
                row = dict(zip(columns, values, strict=False))
                fraction = point["roofline_us"] / row["us"] if row.get("us") and point["roofline_us"] else None
                yield BenchRow.model_validate(run | point | configs[number] | row | {"fraction": fraction})


def calibration_rows(file: CalibrationFile) -> Iterator[BenchRow]:
    """A calibration as rows: what left a race early has a row for the first distribution alone."""
    machine = file.machine
    for point in file.points:
        layer = file.layers[point.layer]
        problem = layer.problem(point.M, machine, point.mode)
        named = _named(layer, machine)
        # A calibration does not record the ceilings of its machine.
        ceilings = known_ceilings(machine)
        roofline = ceilings.roofline_us(problem) if ceilings else None
        for one in point.measurements:
            candidate = file.candidates[one.candidate]
            measured: dict[str, tuple[float, float, float] | None] = dict(one.us) or {"uniform": None}
            for routing, times in measured.items():
                q1, us, q3 = times if times and not one.disqualified else (None, None, None)
                yield BenchRow(
                    workload=named.name, E=layer.E, topk=layer.topk, K=layer.K, N=layer.N, dtype=layer.dtype,
                    M=point.M, backend=candidate.backend, config=dict(candidate.config), mode=point.mode,
                    routing=routing, us=us, us_q1=q1, us_q3=q3, inputs=distinct_inputs(problem, machine),
                    hit_experts=problem.expected_experts, roofline_us=roofline, roofline_from="device",
                    fraction=roofline / us if us and roofline else None, error=one.error,
                    reason=(one.disqualified or "not timed") if us is None else "",
                    machine=machine.name, fingerprint=machine.fingerprint, versions=versions(machine),
                    commit=candidate.commit, ceilings=ceilings,
                )  # fmt: skip


def _named(layer: LayerShape, machine: Machine) -> Workload:
    for workload in WORKLOADS.values():
        if LayerShape.of(workload.problem(1, layer.dtype, machine)).key == layer.key:
            return workload
    letters = f"{layer.E},{layer.topk},{layer.K},{layer.N}"
    return Workload(letters, E=layer.E, topk=layer.topk, K=layer.K, N=layer.N)


def _order(row: BenchRow) -> tuple[str, int, str, str, str, str]:
    return row.dtype, row.M, row.mode, row.routing, row.backend, json.dumps(row.config, sort_keys=True)


def _line(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"))


def _trimmed(values: list[Any]) -> list[Any]:
    while values and values[-1] in (None, "", 0):
        values.pop()
    return values


def _rounded(value: Any) -> Any:
    if not isinstance(value, float) or not value:
        return value
    return round(value, DIGITS - 1 - math.floor(math.log10(abs(value))))


def main(arguments: Sequence[str] | None = None) -> None:
    """Pack what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=Path, nargs="+", help=".jsonl files or folders of rows; .json calibrations")
    parser.add_argument("--out", type=Path, required=True, help="packed file to write")
    given = parser.parse_args(arguments)
    rows: list[BenchRow] = []
    with mistakes_exit(parser):
        for path in given.inputs:
            if path.suffix == ".json":
                rows += calibration_rows(parse_calibration(read_bytes(path), str(path)))
            else:
                rows += load([path])
    text = "".join(f"{line}\n" for line in pack(rows))
    write_atomically(given.out, text)
    print(f"{len(rows)} rows, {len(text.encode()):,} bytes: {given.out}")


if __name__ == "__main__":
    main()
