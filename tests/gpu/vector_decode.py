"""Time the vector kernels at decode on one GPU, with many tiles and beside split-K.

    PYTHONPATH=$PWD python3 tests/gpu/vector_decode.py --out vector.jsonl --model qwen3-30b-a3b
    PYTHONPATH=OLD_ROOT python3 tests/gpu/vector_decode.py --out vector.jsonl --only-default --prefix "old: "

Other processes compile first. Then all candidates of a point take turns, each as a CUDA graph of eight calls with
inputs and routings of their own, after it agreed with the fp32 reference; the exit status is 1 if one did not. The
second command times the default of triton_vector in another checkout in the same way.
"""

import argparse
import contextlib
import faulthandler
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

from moe_dispatch.machine import current_machine
from moe_dispatch.measure import make_inputs, reference_outputs, relative_error
from moe_dispatch.measure.inputs import Call, LayerInputs, backend_call
from moe_dispatch.measure.timing import time_interleaved
from moe_dispatch.problem import DType
from moe_dispatch.registry import BACKENDS
from moe_dispatch.workloads import ROUTINGS, WORKLOADS, Workload, make_experts

LAYERS: Final = {
    "qwen3-30b-a3b": WORKLOADS["qwen3-30b-a3b"],
    "olmoe": Workload("olmoe", E=64, topk=8, K=2048, N=1024),
    "qwen3-next": Workload("qwen3-next", E=512, topk=10, K=2048, N=512),
    "gpt-oss-120b": WORKLOADS["gpt-oss-120b"],
    "mixtral-8x7b": WORKLOADS["mixtral-8x7b"],
}
DTYPES: Final[tuple[DType, ...]] = ("fp8", "bf16")
BANDWIDTH, FLOPS = 4.3e12, {"bf16": 700e12, "fp8": 1300e12}  # of docs/performance.md
COMPILE_SECONDS: Final = 60
COMPILERS: Final = 12
TOLERANCE: Final = 1e-2

# rows, warps of gate_up, and rows, warps of down. The first of each is combined with all of the others.
SHORT_ROWS: Final = {
    "fp8": (((8, 4), (8, 2), (4, 2), (4, 4), (16, 4), (16, 8)), ((4, 4), (2, 2), (2, 4), (4, 8), (8, 8))),
    "bf16": (((8, 4), (4, 2), (4, 4), (8, 8), (16, 8)), ((2, 4), (1, 2), (2, 8), (4, 8))),
}
# Rows too long to be read whole: rows, columns, warps of gate_up; the same of down.
LONG_ROWS: Final = (
    ((4, 512, 2), (4, 1024, 2), (8, 512, 2), (8, 1024, 4), (4, 1024, 4)),
    ((8, 1024, 2), (8, 1024, 4), (4, 1024, 2), (4, 2048, 4)),
)


def configurations(default: Any, dtype: DType) -> list[Any]:
    """The default, then variants of one product with the other's first."""
    if default.columns < 2048:
        gates, downs = (
            [dict(zip(names, tiles, strict=True)) for tiles in variants]
            for names, variants in zip(
                (("rows", "columns", "warps"), ("down_rows", "down_columns", "down_warps")), LONG_ROWS, strict=True
            )
        )
    else:
        gates, downs = (
            [dict(zip(names, tiles, strict=True)) for tiles in variants]
            for names, variants in zip((("rows", "warps"), ("down_rows", "down_warps")), SHORT_ROWS[dtype], strict=True)
        )
    downs.insert(0, {"down_rows": default.down_rows, "down_warps": default.down_warps})
    pairs = [(gate, downs[0]) for gate in gates] + [(gates[0], down) for down in downs[1:]]
    variants = [default.model_copy(update=gate | down) for gate, down in pairs]
    if default.down_experts * 2 > 8 and default.columns == 2048:
        variants.append(default.model_copy(update=gates[0] | {"down_rows": 8, "down_experts": 2, "down_warps": 4}))
    return list(dict.fromkeys((default, *variants)))


def short(config: Any) -> str:
    """The tiles of a configuration in a few characters: gate_up, then down."""
    return (
        f"{config.rows}x{config.columns}/{config.warps}w "
        f"{config.down_rows}x{config.down_columns}x{config.down_experts}/{config.down_warps}w"
    )


def vector_calls(experts: Any, M: int, dtype: DType, layer: Workload) -> Iterator[tuple[str, Call]]:
    """Named calls of triton_vector: the default, then variants."""
    backend = BACKENDS.load("triton_vector")(current_machine("cuda"))
    default: Any = backend.default_config(layer.problem(M, dtype, backend.machine))
    for config in configurations(default, dtype):
        yield f"vector {short(config)}", backend_call(backend, experts, config)


def parts(experts: Any, M: int, dtype: DType, layer: Workload) -> Iterator[tuple[str, Call]]:
    """Each launch of the default by itself; these have no right output."""
    from moe_dispatch.backends.triton_vector.down import vector_down
    from moe_dispatch.backends.triton_vector.gate_up import vector_gate_up

    backend = BACKENDS.load("triton_vector")(current_machine("cuda"))
    config: Any = backend.default_config(layer.problem(M, dtype, backend.machine))
    inner = torch.randn(M * layer.topk, layer.N, device="cuda").to(torch.bfloat16)
    out = torch.empty(M, layer.K, dtype=torch.bfloat16, device="cuda")

    def gate_up(each: LayerInputs) -> torch.Tensor:
        vector_gate_up(each.hidden_states, experts, each.topk_ids, inner, config)
        return inner

    def down(each: LayerInputs) -> torch.Tensor:
        vector_down(inner, experts, each.topk_weights, each.topk_ids, out, config)
        return out

    yield "part: gate_up", gate_up
    yield "part: down", down


def other_calls(experts: Any, M: int, dtype: DType, layer: Workload) -> Iterator[tuple[str, Call]]:
    """triton_splitk's default and second configuration."""
    backend = BACKENDS.load("triton_splitk")(current_machine("cuda"))
    for config in backend.configs(layer.problem(M, dtype, backend.machine))[:2]:
        yield f"splitk {config.label}", backend_call(backend, experts, config)


def measure(layer: Workload, dtype: DType, tokens: list[int], options: argparse.Namespace) -> bool:
    """Check and time all candidates of a layer; whether all that ran were right."""
    right = True
    experts = make_experts(layer, dtype, "cuda", torch.Generator("cuda").manual_seed(0))
    for M in tokens:
        if time.monotonic() > options.deadline:
            print("stopped: the budget is spent")
            break
        problem = layer.problem(M, dtype, current_machine("cuda"), mode="graph")
        inputs = make_inputs(problem, ROUTINGS["uniform"], "cuda")
        exact = reference_outputs(experts, inputs, quantize_activations=False)
        errors: dict[str, float] = {}
        calls: dict[str, Call] = {}
        named = (
            vector_calls(experts, M, dtype, layer),
            other_calls(experts, M, dtype, layer),
            parts(experts, M, dtype, layer),
        )
        for name, call in itertools.chain(*(named if not options.only_default else (first_of(named[0]),))):
            try:
                errors[name] = max(
                    relative_error(call(each), truth) for each, truth in zip(inputs, exact, strict=True)
                ) if not name.startswith("part") else 0.0  # fmt: skip
            except Exception as error:  # noqa: BLE001 - a candidate that fails is a row of the table
                print(f"{layer.name} {dtype} M={M} {name}: {type(error).__name__}: {error}"[:300])
                continue
            # Old kernels and split-K quantise activations, which is an error of 6 % against fp32.
            limit = TOLERANCE if name.startswith("vector") and not options.only_default else 0.1
            if errors[name] <= limit:
                calls[name] = call
            else:
                right = False
                print(f"WRONG {layer.name} {dtype} M={M} {name}: {errors[name]:.3g}")
        roofline = problem.roofline_us(BANDWIDTH, FLOPS[dtype])
        times = time_interleaved(calls, inputs, budget_s=0.01, min_rounds=options.rounds)
        print(f"\n{layer.name} {dtype} M={M}: roofline {roofline:.1f} µs")
        for name, timing in sorted(times.items(), key=lambda item: item[1].us):
            row = {
                "layer": layer.name, "dtype": dtype, "M": M, "name": options.prefix + name, "us": timing.us,
                "q1": timing.us_q1, "q3": timing.us_q3, "roofline": roofline / timing.us, "error": errors[name],
            }  # fmt: skip
            with open(options.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"  {timing.us:7.2f} ({roofline / timing.us:4.2f})  {options.prefix}{name}  {errors[name]:.1e}")
        sys.stdout.flush()
    return right


def first_of(calls: Iterator[tuple[str, Call]]) -> Iterator[tuple[str, Call]]:
    """The first call alone, the default."""
    yield next(calls)


def compile_share(index: int, count: int, options: argparse.Namespace) -> None:
    """Run every `count`-th candidate once on few experts, which puts its kernels into Triton's cache on disk."""
    work = itertools.product(options.model or LAYERS, options.dtype or DTYPES)
    number = itertools.count()
    for name, dtype in work:
        layer = LAYERS[name]
        small = Workload(layer.name, layer.topk, layer.topk, layer.K, layer.N, layer.activation, layer.bias,
                         layer.interleaved)  # fmt: skip
        ids = torch.full((1, layer.topk), -1, dtype=torch.int32, device="cuda")
        x = torch.zeros(1, layer.K, dtype=torch.bfloat16, device="cuda")
        each = LayerInputs(x, torch.ones(1, layer.topk, device="cuda"), ids)
        experts = make_experts(small, dtype, "cuda", torch.Generator("cuda").manual_seed(0))
        everything = itertools.chain(vector_calls(experts, 1, dtype, small), other_calls(experts, 1, dtype, layer))
        for _, call in everything:
            if next(number) % count == index:
                with contextlib.suppress(Exception):  # reported where it is timed
                    call(each)
        torch.cuda.synchronize()


def main() -> int:
    """Compile and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines to append to")
    parser.add_argument("--model", action="append", choices=LAYERS, help="only these; repeatable")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only these; repeatable")
    parser.add_argument("--tokens", default="1,4,2,8", help="token counts, separated by commas")
    parser.add_argument("--rounds", type=int, default=8, help="samples of each candidate")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds after which no point starts")
    parser.add_argument("--only-default", action="store_true", help="time the default configuration alone")
    parser.add_argument("--prefix", default="", help="what the names of all rows begin with")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.deadline = time.monotonic() + options.budget
    faulthandler.dump_traceback_later(options.budget + 25, exit=True)  # a candidate that waits for ever
    if options.compile:
        index, count = (int(part) for part in options.compile.split("/"))
        compile_share(index, count, options)
        return 0
    tokens = [int(part) for part in options.tokens.split(",")]
    if not options.only_default:
        compile_everything(options)
    right = True
    for name, dtype in itertools.product(options.model or LAYERS, options.dtype or DTYPES):
        right = measure(LAYERS[name], dtype, tokens, options) and right
        torch.cuda.empty_cache()
    return 0 if right else 1


def compile_everything(options: argparse.Namespace) -> None:
    """Compile in other processes; what they leave is compiled where it is timed."""
    passed = [part for each in options.model or [] for part in ("--model", each)]
    passed += [part for each in options.dtype or [] for part in ("--dtype", each)]
    compilers = [
        subprocess.Popen([sys.executable, __file__, "--out", os.devnull, "--compile", f"{i}/{COMPILERS}", *passed])
        for i in range(COMPILERS)
    ]
    begin = time.monotonic()
    for each in compilers:
        try:
            each.wait(timeout=max(1.0, begin + COMPILE_SECONDS - time.monotonic()))
        except subprocess.TimeoutExpired:
            each.kill()
    print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
