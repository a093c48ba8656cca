"""Experts stored by columns, read in place, beside a contiguous copy of them, in every backend that runs either.

    python -m moe_dispatch.benchmarks.record.by_columns --out by_columns.jsonl

Layers of gpt-oss in BF16 under CUDA graphs, by turns, in the configurations that the policies rank first. A row has the
errors against fp32 and the µs of one layer at one token count. Needs a GPU.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from moe_dispatch import ExpertWeights
from moe_dispatch.benchmarks.record import json_lines
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.machine import Machine
from moe_dispatch.measure.inputs import Call, backend_call, make_inputs
from moe_dispatch.measure.timing import time_interleaved
from moe_dispatch.measure.verify import reference_outputs, relative_error
from moe_dispatch.workloads import ROUTINGS, WORKLOADS, make_experts


def rows(E: int, tokens: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each token count of a layer with E experts."""
    layer = dataclasses.replace(WORKLOADS["gpt-oss-120b"], E=E)
    planner = get_dispatcher(torch.device("cuda")).planner
    in_place = make_experts(layer, "bf16", "cuda", transposed=True)
    kind = {name: getattr(in_place, name) for name in ("gate_up_bias", "down_bias", "activation", "interleaved")}
    copy = ExpertWeights(in_place.gate_up.contiguous(), in_place.down.contiguous(), **kind)
    for M in tokens:
        calls: dict[str, Call] = {}
        for stored, experts in (("in place", in_place), ("copy", copy)):
            problem = experts.problem(M, layer.topk, torch.bfloat16, planner.machine.capability)
            for plan in planner.eligible(dataclasses.replace(problem, mode="graph"), experts):
                calls.setdefault(f"{plan.backend.name}, {stored}", backend_call(plan.backend, experts, plan.config))
        inputs = make_inputs(problem, ROUTINGS["uniform"], "cuda", 8 if M < 4096 else 2)
        (truth,) = reference_outputs(copy, inputs[:1])
        errors = {name: relative_error(call(inputs[0]), truth) for name, call in calls.items()}
        timed = time_interleaved({name: call for name, call in calls.items() if "reference" not in name}, inputs)
        yield {"E": E, "M": M, "us": {name: timing.us for name, timing in timed.items()}, "errors": errors}


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="by_columns.jsonl")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 1024, 4096])
    options = parser.parse_args()
    made = (row for E in (128, 32) for row in rows(E, options.tokens))
    json_lines.write(options.out, made, Machine.inspect("cuda"))


if __name__ == "__main__":
    main()
