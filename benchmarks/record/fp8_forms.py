"""FP8 as checkpoints have it: per channel beside per block, and dequantised where a device does not multiply e4m3.

    python -m moe_dispatch.benchmarks.record.fp8_forms forms --out rows.jsonl
    tests/gpu/as_device.sh a100 python -m moe_dispatch.benchmarks.record.fp8_forms dequantized --out rows.jsonl
    python -m moe_dispatch.benchmarks.record.fp8_forms forms --tiny       a CPU: that it runs, not how fast

`forms` times per-channel FP8 through each backend that takes it, beside block FP8 and vLLM's own `fused_experts`.
`dequantized` times FP8 weights beside BF16 weights; it is meant for a machine that is described as an older one, whose
kernels multiply values of codes. All candidates of a point take turns on the same inputs, each in the configuration
that the policies choose for it, and only where its result is right. `us` is by weight dtype and candidate.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from moe_dispatch import ExpertWeights
from moe_dispatch.benchmarks.baselines import Vllm
from moe_dispatch.benchmarks.record import json_lines
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.machine import Machine, present_device
from moe_dispatch.measure.inputs import Call, LayerInputs, backend_call, make_inputs
from moe_dispatch.measure.timing import time_interleaved
from moe_dispatch.measure.verify import reference_outputs, verify
from moe_dispatch.problem import DType, Mode, MoEProblem
from moe_dispatch.workloads import ROUTINGS, WORKLOADS, Workload, make_experts

LAYERS: Final = ("qwen3-30b-a3b", "mixtral-8x7b")
TINY: Final = Workload("tiny", E=8, topk=2, K=128, N=128)
TOKENS: Final[dict[str, tuple[int, ...]]] = {"forms": (1, 8, 64, 256, 4096), "dequantized": (1, 8, 64)}
# The first one is compared with the last one.
DTYPES: Final[dict[str, tuple[DType, ...]]] = {
    "forms": ("fp8_channel", "fp8"),
    "dequantized": ("fp8", "fp8_channel", "bf16"),
}
DECODE: Final = 64
# Only these are worth compiling up to so many tokens, and from so many on.
FOR_DECODE: Final = ("triton_splitk", "triton_vector")
FOR_MORE: Final = ("triton_persistent", "gluon_hopper")
LIBRARY: Final = "vllm_fused_moe"
BASELINE: Final = "vllm"
CHECKED_TOKENS: Final = 256
SECONDS: Final = 0.2  # of timing, for each candidate

Row = dict[str, Any]


def wanted(name: str, dtype: DType, M: int, *, tiny: bool) -> bool:
    """Whether a backend is measured at M tokens; vLLM's with per-channel FP8 alone, for it compiles at every point."""
    if tiny:
        return name in (*FOR_DECODE, *FOR_MORE, "reference")
    if name == LIBRARY:
        return dtype == "fp8_channel"
    return name in (FOR_DECODE if M <= DECODE else ()) + (FOR_MORE if M >= DECODE else ())


def inputs_of(problem: MoEProblem, device: torch.device) -> tuple[LayerInputs, ...]:
    """Inputs with two distributions of tokens over experts."""
    count = 4 if problem.M <= 1024 else 1
    return tuple(
        each
        for seed, name in enumerate(("uniform", "dirichlet-4"))
        for each in make_inputs(problem, ROUTINGS[name], device, count, seed)
    )


def candidates(
    experts: ExpertWeights, problem: MoEProblem, *, every: bool, tiny: bool
) -> Iterator[tuple[str, Call, float, bool]]:
    """Name, call, tolerance, and whether activations are quantised, of what is timed for a layer."""
    planner = get_dispatcher(experts.device).planner
    for plan in planner.eligible(problem, experts):
        name, backend = plan.choice.backend, plan.backend
        if not wanted(name, problem.dtype, problem.M, tiny=tiny):
            continue
        tolerance, quantizes = backend.tolerance[problem.dtype], backend.quantizes_activations(problem)
        yield name, backend_call(backend, experts, plan.config), tolerance, quantizes
        for config in backend.configs(problem) if every else ():
            yield f"{name} {config.label}", backend_call(backend, experts, config), tolerance, quantizes
    baseline = Vllm(planner.machine)
    if wanted(LIBRARY, problem.dtype, problem.M, tiny=tiny) and not baseline.unsupported_reasons(problem):
        yield BASELINE, baseline.prepare(experts, problem), baseline.tolerance[problem.dtype], True


def measured(
    part: str, layers: dict[DType, ExpertWeights], topk: int, M: int, mode: Mode, *, every: bool, tiny: bool
) -> Row:
    """The row of a layer at one token count."""
    calls: dict[tuple[DType, str], Call] = {}
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}
    inputs: tuple[LayerInputs, ...] = ()
    for dtype, experts in layers.items():
        machine = get_dispatcher(experts.device).machine
        problem = experts.problem(M, topk, torch.bfloat16, machine.capability)
        inputs = inputs or inputs_of(problem, experts.device)
        truths: dict[bool, tuple[Tensor, ...]] = {}
        for name, call, tolerance, quantized in candidates(experts, problem, every=every, tiny=tiny):
            if quantized not in truths:
                truths[quantized] = reference_outputs(
                    experts, inputs[:1], quantize_activations=quantized, tokens=CHECKED_TOKENS
                )
            try:
                verdict = verify(call, inputs, truths[quantized], tolerance=tolerance)
            except Exception as error:  # noqa: BLE001 - a library may raise anything, and is then left out
                failed[f"{dtype}/{name}"] = str(error)[:200]
                continue
            if verdict.ok:
                calls[dtype, name], errors[f"{dtype}/{name}"] = call, verdict.error
            else:
                failed[f"{dtype}/{name}"] = verdict.reason

    def note(key: tuple[DType, str], error: Exception) -> None:
        failed["/".join(key)] = str(error)[:200]

    timings = time_interleaved(calls, inputs, mode=mode, budget_s=SECONDS, on_failure=note)
    us: dict[str, dict[str, float]] = {dtype: {} for dtype in layers}
    for (dtype, name), timing in timings.items():
        us[dtype][name] = round(timing.us, 2)
    return {"part": part, "M": M, "mode": mode, "us": us, **ratios(us), "errors": errors, "failed": failed}


def ratios(us: dict[str, dict[str, float]]) -> dict[str, float]:
    """The fastest of ours in the first dtype over the fastest of ours in the last one, and over vLLM's own."""
    first, last = (
        {name: value for name, value in us[dtype].items() if not name.startswith((LIBRARY, BASELINE))}
        for dtype in (next(iter(us)), list(us)[-1])
    )
    compared: dict[str, float] = {}
    if first and last:
        compared["over_last"] = round(min(first.values()) / min(last.values()), 3)
    if first and BASELINE in us[next(iter(us))]:
        compared["over_vllm"] = round(min(first.values()) / us[next(iter(us))][BASELINE], 3)
    return compared


def main(arguments: list[str] | None = None) -> None:
    """Measure and print rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(TOKENS))
    parser.add_argument("--layer", action="append", choices=LAYERS, help="a layer, instead of all; repeatable")
    parser.add_argument("--tokens", type=int, nargs="+", help="token counts, instead of the part's own")
    parser.add_argument("--tiny", action="store_true", help="a tiny layer and few tokens: that it runs, not how fast")
    parser.add_argument("--every", action="store_true", help="also time each backend in all of its configurations")
    parser.add_argument("--out", help="append rows to this file as JSON lines")
    options = parser.parse_args(arguments)
    device = present_device()
    machine: Machine = get_dispatcher(device).machine
    mode: Mode = "graph" if device.type == "cuda" else "eager"
    if options.out:
        json_lines.append(options.out, {"origin": json_lines.origin(machine)})
    begun = time.perf_counter()
    for layer in [TINY] if options.tiny else [WORKLOADS[name] for name in options.layer or LAYERS]:
        layers: dict[DType, ExpertWeights] = {
            dtype: make_experts(layer, dtype, device, torch.Generator(device).manual_seed(0))
            for dtype in DTYPES[options.part]
        }
        for M in options.tokens or ((1, 8) if options.tiny else TOKENS[options.part]):
            scope = {"every": options.every, "tiny": options.tiny}
            row = {"layer": layer.name, **measured(options.part, layers, layer.topk, M, mode, **scope)}
            row["seconds"] = round(time.perf_counter() - begun, 1)
            shown = {name: row.get(name) for name in ("us", "over_last", "over_vllm", "failed") if row.get(name)}
            print(f"{layer.name} M={M}: {shown}", flush=True)
            if options.out:
                json_lines.append(options.out, row)


if __name__ == "__main__":
    main()
