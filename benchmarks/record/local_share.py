"""One GPU with the load of an expert-parallel rank: how far the choice is behind the fastest backend.

    python -m moe_dispatch.benchmarks.record.local_share --out rows.jsonl
    python -m moe_dispatch.benchmarks.record.local_share --tiny          a CPU: that it runs, not how fast

Half of a layer's experts get the tokens of two ranks with ids of the whole layer, so that half of the slots have no
expert here. Every backend that can run this is timed, by turns, in the configuration that the policies rank first for
it. `regret` is the time of the policies' choice over the least, minus 1.
"""

import argparse
import dataclasses
from typing import Any, Final

import torch

from moe_dispatch import ExpertWeights
from moe_dispatch.benchmarks.record import json_lines
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.machine import Machine, present_device
from moe_dispatch.measure.inputs import Call, LayerInputs, backend_call
from moe_dispatch.measure.timing import time_interleaved
from moe_dispatch.problem import DType, Mode
from moe_dispatch.workloads import ROUTINGS, WORKLOADS, Workload, make_experts, torch_dtype

LAYERS: Final[tuple[tuple[str, DType], ...]] = (("qwen3-30b-a3b", "bf16"), ("deepseek-v3", "fp8"))
TOKENS: Final = (2, 8, 32, 128, 512, 2048, 8192, 32768)
TINY: Final = Workload("tiny", E=16, topk=4, K=64, N=32)


def drawn(layer: Workload, M: int, dtype: torch.dtype, device: torch.device, count: int) -> list[LayerInputs]:
    """Inputs with a uniform routing over the whole layer; the second half of the ids is not held here."""
    generator = torch.Generator().manual_seed(M)
    inputs = []
    for _ in range(count):
        hidden = torch.randn(M, layer.K, generator=generator).to(device, dtype)
        inputs.append(LayerInputs(hidden, *ROUTINGS["uniform"].sample(M, layer.E, layer.topk, device, generator)))
    return inputs


def measured(layer: Workload, dtype: DType, M: int, part: ExpertWeights, mode: Mode) -> dict[str, Any]:
    """The row of one layer at one token count."""
    act_dtype = torch_dtype("bf16" if dtype == "fp8" else dtype)
    inputs = drawn(layer, M, act_dtype, part.device, 8 if M <= 2048 else 2)
    planner = get_dispatcher(part.device).planner
    problem = part.problem(M, layer.topk, act_dtype, planner.machine.capability)
    calls: dict[str, Call] = {}
    for plan in planner.eligible(problem, part):
        if not (mode == "graph" and not plan.backend.requirements.capturable):
            calls.setdefault(plan.choice.backend, backend_call(plan.backend, part, plan.config))
    failed: dict[str, str] = {}

    def note(name: str, error: Exception) -> None:
        failed[name] = str(error)[:200]

    times = time_interleaved(calls, inputs, mode=mode, on_failure=note)
    us = {name: timing.us for name, timing in times.items()}
    least = min(us.values())
    chosen = next(name for name in calls if name in us)
    return {
        "layer": layer.name, "dtype": dtype, "M": M, "mode": mode, "chosen": chosen, "us": us, "failed": failed,
        "regret": us[chosen] / least - 1,
    }  # fmt: skip


def main() -> None:
    """Measure and print rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny layer and few tokens: that it runs, not how fast")
    parser.add_argument("--layer", action="append", help="a named layer; repeatable. All if none")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="token counts of all ranks together")
    parser.add_argument("--out", help="append rows to this file as JSON lines")
    options = parser.parse_args()
    device = present_device()
    mode: Mode = "graph" if device.type == "cuda" else "eager"
    layers: list[tuple[Workload, DType]] = [(TINY, "fp32")]
    if not options.tiny:
        layers = [(WORKLOADS[name], dtype) for name, dtype in LAYERS if name in (options.layer or [name])]
    if options.out:
        json_lines.append(options.out, {"origin": json_lines.origin(Machine.inspect(device.type))})
    for layer, dtype in layers:
        half = dataclasses.replace(layer, E=layer.E // 2)
        whole = make_experts(half, dtype, device, torch.Generator(device).manual_seed(0))
        part = whole.among(layer.E)
        for M in (2, 8) if options.tiny else map(int, options.tokens.split(",")):
            row = measured(layer, dtype, M, part, mode)
            print(
                f"{row['layer']} {dtype} M={M}: {row['chosen']} {row['us'][row['chosen']]:.1f} µs, regret "
                f"{row['regret']:.1%}",
                flush=True,
            )
            if options.out:
                json_lines.append(options.out, row)


if __name__ == "__main__":
    main()
