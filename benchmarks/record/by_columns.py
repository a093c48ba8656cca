"""Experts stored by columns, read in place, beside a contiguous copy of them, in every backend that runs either.

    python -m moe_dispatch.benchmarks.record.by_columns --out by_columns.jsonl

Layers of gpt-oss in BF16 under CUDA graphs, by turns, each backend in the configuration that the policies rank first
for it. A candidate is compared with fp32 before it is timed; its error, or what was wrong, is in `errors`. `chosen` is
what the policies choose in place, and of the copy. Needs a GPU.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_dispatch import ExpertWeights
from moe_dispatch.benchmarks.record import json_lines
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.machine import Machine
from moe_dispatch.measure.inputs import Call, backend_call, make_inputs
from moe_dispatch.measure.timing import time_interleaved
from moe_dispatch.measure.verify import reference_outputs, verify
from moe_dispatch.registry import LAST_RESORT
from moe_dispatch.workloads import ROUTINGS, WORKLOADS, Workload, make_experts

GPT_OSS = WORKLOADS["gpt-oss-120b"]
LAYERS = {GPT_OSS.name: GPT_OSS, "gpt-oss-20b": dataclasses.replace(GPT_OSS, name="gpt-oss-20b", E=32)}


def rows(layer: Workload, tokens: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each token count."""
    planner = get_dispatcher(torch.device("cuda")).planner
    in_place = make_experts(layer, "bf16", "cuda", transposed=True)
    kind = {name: getattr(in_place, name) for name in ("gate_up_bias", "down_bias", "activation", "interleaved")}
    copy = ExpertWeights(in_place.gate_up.contiguous(), in_place.down.contiguous(), **kind)
    for M in tokens:
        calls: dict[str, Call] = {}
        row: dict[str, Any] = {"layer": layer.name, "M": M, "chosen": [], "errors": {}}
        for stored, experts in (("in place", in_place), ("copy", copy)):
            problem = dataclasses.replace(
                experts.problem(M, layer.topk, torch.bfloat16, planner.machine.capability), mode="graph"
            )
            inputs = make_inputs(problem, ROUTINGS["uniform"], "cuda", 8 if M < 4096 else 2)
            truths = reference_outputs(experts, inputs[:1])
            plans = list(planner.eligible(problem, experts))
            row["chosen"].append(plans[0].backend.name)
            for name, plan in {plan.backend.name: plan for plan in reversed(plans)}.items():
                if name == LAST_RESORT:
                    continue
                call = backend_call(plan.backend, experts, plan.config)
                verdict = verify(call, inputs, truths, tolerance=plan.backend.tolerance["bf16"], mode="graph")
                row["errors"][f"{name}, {stored}"] = verdict.error if verdict.ok else verdict.reason
                if verdict.ok:
                    calls[f"{name}, {stored}"] = call
        yield row | {"us": {name: timing.us for name, timing in time_interleaved(calls, inputs).items()}}


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("by_columns.jsonl"))
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 1024, 4096])
    options = parser.parse_args()
    made = (row for name in options.layers for row in rows(LAYERS[name], options.tokens))
    json_lines.write(options.out, made, Machine.inspect("cuda"))


if __name__ == "__main__":
    main()
