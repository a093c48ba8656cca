"""Run a small case of each backend and kind of configuration once, for compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/gpu/one_of_each.py --backend triton_splitk
    compute-sanitizer --tool memcheck python tests/gpu/one_of_each.py --backend gluon_hopper --layer 2,1,256,4224

The second layer has so large an N that gluon_hopper permutes rows before its products, in BF16 too. BF16 weights run as
they are and transposed, with gpt-oss's biases, row order and activation too where ``--gpt-oss`` is given.

PyTorch's caching allocator hides overruns inside its blocks, so it is switched off. The machine is described with few
multiprocessors: a kernel with a program on each then runs few programs, which take several tiles and reuse their
buffers.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

from moe_dispatch.benchmarks.candidates import available_backends
from moe_dispatch.dispatch.dispatcher import Dispatcher
from moe_dispatch.machine import current_machine, default_device
from moe_dispatch.measure import backend_call, make_inputs, reference_outputs, relative_error
from moe_dispatch.problem import DType
from moe_dispatch.registry import BACKENDS
from moe_dispatch.workloads import ROUTINGS, make_experts, workload

# Sizes that fill no tile.
LAYER = "8,2,512,384"
PROGRAMS = 4
# Dtypes of the weights, and whether they are stored by columns.
WEIGHTS: tuple[tuple[DType, bool], ...] = (
    ("bf16", False), ("bf16", True), ("fp8", False), ("fp8_channel", False), ("mxfp4", False),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything that is supported here; the exit status is 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", action="append", help="name of a backend to run; all registered ones by default")
    parser.add_argument("--dtype", action="append", help="a dtype of weights to run; all of them by default")
    parser.add_argument("--configs", type=int, default=3, help="configurations of each backend at each point")
    parser.add_argument("--layer", default=LAYER, help="E,topk,K,N")
    parser.add_argument("--tokens", default="1,5,130", help="token counts M")
    parser.add_argument("--gpt-oss", action="store_true", help="with gpt-oss's biases, row order and activation")
    options = parser.parse_args(arguments)
    dispatcher = Dispatcher(current_machine(default_device()).model_copy(update={"sms": PROGRAMS}))
    device = torch.device(dispatcher.machine.device)
    backends = available_backends(options.backend or BACKENDS.names(), dispatcher.machine, print)
    wrong = 0
    layer = workload(options.layer)
    if options.gpt_oss:
        layer = dataclasses.replace(layer, activation="swiglu_oai", bias=True, interleaved=True)
    for dtype, transposed in WEIGHTS:
        if dtype not in (options.dtype or [dtype]):
            continue
        generator = torch.Generator(device).manual_seed(0)
        experts = make_experts(layer, dtype, device, generator, transposed=transposed)
        for M in map(int, options.tokens.split(",")):
            problem = dataclasses.replace(layer.problem(M, dtype, dispatcher.machine), transposed=transposed)
            inputs = make_inputs(problem, ROUTINGS["uniform"], device, count=1)
            truths = {kind: reference_outputs(experts, inputs, quantize_activations=kind)[0] for kind in (True, False)}
            for backend in backends:
                if backend.unsupported_reasons(problem):
                    continue
                truth = truths[backend.quantizes_activations(problem)]
                for config in backend.configs(problem)[: options.configs]:
                    error = relative_error(backend_call(backend, experts, config)(inputs[0]), truth)
                    correct = error <= backend.tolerance[dtype]
                    wrong += not correct
                    weights = f"{dtype} by columns" if transposed else dtype
                    print(f"{'ok' if correct else 'WRONG'} {backend.name} {weights} M={M} {config.label}: {error:.2g}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
