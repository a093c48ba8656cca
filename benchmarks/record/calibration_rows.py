"""A calibration file as benchmark rows."""

from collections.abc import Iterator

from moe_dispatch.benchmarks.rows import BenchRow
from moe_dispatch.machine import Machine
from moe_dispatch.measure import known_ceilings
from moe_dispatch.measure.provenance import versions
from moe_dispatch.policies.calibration.worker import distinct_inputs
from moe_dispatch.policies.measurements.schema import CalibrationFile, LayerShape
from moe_dispatch.workloads import WORKLOADS, Workload


def calibration_rows(file: CalibrationFile) -> Iterator[BenchRow]:
    """One row per candidate and routing distribution that it was timed on.

    A candidate that left successive halving early has a row for the first distribution alone. Rows have a roofline only
    if the ceilings of the machine's device are known: a calibration measures none.
    """
    machine = file.machine
    ceilings = known_ceilings(machine)
    for point in file.points:
        layer = file.layers[point.layer]
        problem = layer.problem(point.M, machine, point.mode)
        workload = _workload(layer, machine)
        roofline = ceilings.roofline_us(problem) if ceilings else None
        for measurement in point.measurements:
            candidate = file.candidates[measurement.candidate]
            quartiles: dict[str, tuple[float, float, float] | None] = dict(measurement.us) or {"uniform": None}
            for routing, times in quartiles.items():
                q1, us, q3 = times if times and not measurement.disqualified else (None, None, None)
                yield BenchRow(
                    workload=workload.name, E=layer.E, topk=layer.topk, K=layer.K, N=layer.N, dtype=layer.dtype,
                    M=point.M, backend=candidate.backend, config=dict(candidate.config), mode=point.mode,
                    routing=routing, us=us, us_q1=q1, us_q3=q3, inputs=distinct_inputs(problem, machine),
                    hit_experts=problem.expected_experts, roofline_us=roofline,
                    roofline_from="device" if roofline else None,
                    fraction=roofline / us if roofline and us else None, error=measurement.error,
                    reason=(measurement.disqualified or "not timed") if us is None else "",
                    machine=machine.name, fingerprint=machine.fingerprint, versions=versions(machine),
                    commit=candidate.commit,
                )  # fmt: skip


def _workload(layer: LayerShape, machine: Machine) -> Workload:
    """The named workload of a layer, else one that is named by its letters."""
    for workload in WORKLOADS.values():
        if LayerShape.of(workload.problem(1, layer.dtype, machine)).key == layer.key:
            return workload
    letters = f"{layer.E},{layer.topk},{layer.K},{layer.N}"
    return Workload(letters, E=layer.E, topk=layer.topk, K=layer.K, N=layer.N)
