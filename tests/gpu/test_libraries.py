"""What only a GPU can show of the backends over foreign libraries: streams, addresses, NaN, captures, global switches.

Where a fault would cost the CUDA context, the case runs in a process of its own: ``python -m tests.gpu.test_libraries
function arguments…``.
"""

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch.backend import Backend
from moe_dispatch.backends.vllm_fused_moe import layers
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.errors import BackendUnavailableError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.testing import Case, Inputs, Precision, conform, make_inputs, relative_error

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
BF16, FP8 = Precision("bf16", "bf16"), Precision("fp8", "bf16")
LIBRARIES = pytest.mark.parametrize("name", ["vllm_fused_moe", "deep_gemm"])
PRECISIONS = pytest.mark.parametrize("precision", [BF16, FP8], ids=str)
LAYER = Case(M=64, E=32, topk=4, K=512, N=256)  # so many slots that vLLM sorts them, and then reads its expert map
DELAY_CYCLES = 200_000_000  # about 0.1 s


def backend(name: str) -> Backend:
    """The backend, or a skip with the library's own reasons."""
    try:
        made = get_dispatcher().planner.backend(name)
        importlib.import_module(f"moe_dispatch.backends.{name}.library").load()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    return made


def run(made: Backend, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return made.run(*inputs.arguments, made.default_config(LAYER.layer.problem(LAYER.M, "bf16", made.machine)))


def alone(function: Callable[..., None], *arguments: object) -> None:
    """Run a function of this module in a process of its own."""
    command = [sys.executable, "-m", "tests.gpu.test_libraries", function.__name__, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


# Streams.


def first_use_on_two_streams(dtype: str) -> None:
    """What the first stream has not written yet, because it is busy, the second must not read."""
    made = backend("vllm_fused_moe")
    precision = FP8 if dtype == "fp8" else BF16
    first, second = (make_inputs(LAYER, precision, "cuda", seed) for seed in (1, 2))
    expected = [run(made, inputs) for inputs in (first, second)]  # compiles
    torch.cuda.synchronize()
    layers._expert_maps.clear()
    layers._layers.clear()
    busy, idle = (torch.cuda.Stream() for _ in range(2))  # type: ignore[no-untyped-call]  # torch has no types here
    with torch.cuda.stream(busy):
        # The allocator hands this memory to the next tensor of its size here, whose every expert would be the first.
        stale = torch.zeros(LAYER.E + 1, dtype=torch.int32, device="cuda")
        torch.cuda.synchronize()
        del stale
        torch.cuda._sleep(DELAY_CYCLES)  # type: ignore[no-untyped-call]  # nor here
        outs = [run(made, first)]
    with torch.cuda.stream(idle):
        outs += [run(made, first), run(made, second)]
    torch.cuda.synchronize()
    for out, truth in zip(outs, (expected[0], *expected), strict=True):
        assert relative_error(out, truth.float()) <= 1e-3


@PRECISIONS
@pytest.mark.parametrize("name", ["vllm_fused_moe"])
def test_first_use_on_two_streams(name: str, precision: Precision) -> None:
    backend(name)
    alone(first_use_on_two_streams, precision.dtype)


@PRECISIONS
@pytest.mark.parametrize("name", ["vllm_fused_moe"])
def test_first_use_within_a_capture(name: str, precision: Precision) -> None:
    """The map then belongs to the graph, and the next eager call makes its own."""
    made, inputs = backend(name), make_inputs(LAYER, precision, "cuda")
    run(made, inputs)  # compiles
    torch.cuda.synchronize()
    layers._expert_maps.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(made, inputs)
    assert not layers._expert_maps
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert relative_error(out, inputs.truth) <= made.tolerance[precision.dtype]
    assert relative_error(run(made, inputs), inputs.truth) <= made.tolerance[precision.dtype]


# Addresses.


def displaced(tensor: Tensor) -> Tensor:
    """A copy that starts one element into its memory, as a view into a flat buffer does."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return flat[1:].view(tensor.shape).copy_(tensor)


def displaced_tensors(name: str, dtype: str) -> None:
    """Every tensor of a call starts where only its own element size divides the address, one after another."""
    made = backend(name)
    precision = FP8 if dtype == "fp8" else BF16
    inputs = make_inputs(Case(M=33, E=8, topk=2, K=512, N=256, bias=True), precision, "cuda")
    hidden, experts, weights, ids = inputs.arguments
    moved = ["gate_up_bias", "down_bias", *(["gate_up_scale", "down_scale"] if dtype == "fp8" else [])]
    calls: dict[str, tuple[Tensor, ExpertWeights, Tensor, Tensor]] = {
        "hidden_states": (displaced(hidden), experts, weights, ids),
        "topk_weights": (hidden, experts, displaced(weights), ids),
        "topk_ids, int32": (hidden, experts, weights, displaced(ids.int())),
        "topk_ids, int64": (hidden, experts, weights, displaced(ids.long())),
    }
    names = ("gate_up_scale", "down_scale", "gate_up_bias", "down_bias")
    for tensor in moved:
        tensors: dict[str, Any] = {other: getattr(experts, other) for other in names}
        tensors[tensor] = displaced(tensors[tensor])
        calls[tensor] = (hidden, ExpertWeights(experts.gate_up, experts.down, **tensors), weights, ids)
    for tensor, call in calls.items():
        print(f"{name} {dtype}: {tensor} displaced", flush=True)
        for config in made.configs(LAYER.layer.problem(33, precision.dtype, made.machine)):
            conform(made, config, Inputs(*call, inputs.truth))
            torch.cuda.synchronize()


@PRECISIONS
@LIBRARIES
def test_tensors_that_start_anywhere(name: str, precision: Precision) -> None:
    backend(name)
    alone(displaced_tensors, name, precision.dtype)


@PRECISIONS
@LIBRARIES
def test_weights_that_are_given_other_memory(name: str, precision: Precision) -> None:
    """Through ``.data``, as weight synchronisation and offloading do."""
    made = backend(name)
    old, new = (make_inputs(LAYER, precision, "cuda", seed) for seed in (1, 2))
    run(made, old)
    for tensor in ("gate_up", "down", "gate_up_scale", "down_scale"):
        if getattr(old.experts, tensor) is not None:
            getattr(old.experts, tensor).data = getattr(new.experts, tensor).clone()
    out = run(made, Inputs(new.hidden_states, old.experts, new.topk_weights, new.topk_ids, new.truth))
    assert relative_error(out, new.truth) <= made.tolerance[precision.dtype]


@LIBRARIES
def test_weights_that_require_a_gradient_without_recording_one(name: str) -> None:
    made, inputs = backend(name), make_inputs(LAYER, BF16, "cuda")
    for tensor in (inputs.experts.gate_up, inputs.experts.down):
        tensor.requires_grad_()
    assert relative_error(run(made, inputs), inputs.truth) <= made.tolerance["bf16"]


# NaN.


@PRECISIONS
@pytest.mark.parametrize("M", [2, 33, 300])
@LIBRARIES
def test_a_nan_stays_in_its_token(name: str, M: int, precision: Precision) -> None:
    made = backend(name)
    inputs = make_inputs(Case(M=M, E=32, topk=4, K=512, N=256, nan=True), precision, "cuda")
    for config in made.configs(LAYER.layer.problem(M, precision.dtype, made.machine)):
        conform(made, config, inputs)


# Switches of DeepGEMM that are global to the process.


def pdl_switch() -> None:
    """Whichever of the two libraries comes first, kernels are launched as programmatic dependents."""
    from moe_dispatch.backends.deep_gemm import library

    backend("deep_gemm")
    module = importlib.import_module(library.load().module)
    is_on = getattr(module, "get_pdl", None) or getattr(getattr(module, "_C", None), "get_pdl", None)
    if is_on is not None:
        assert is_on()
    try:
        importlib.import_module("vllm.utils.deep_gemm").is_deep_gemm_e8m0_used()
    except ImportError:
        return
    if is_on is not None:
        assert is_on()


def other_alignment(dtype: str) -> None:
    """vLLM lowers the alignment of experts for the time of a call; a layer laid out meanwhile must follow it."""
    from moe_dispatch.backends.deep_gemm import DeepGemmConfig, library

    made = backend("deep_gemm")
    module = importlib.import_module(library.load().module)
    usual = module.get_mk_alignment_for_contiguous_layout()
    inputs = make_inputs(LAYER, FP8 if dtype == "fp8" else BF16, "cuda")
    module.set_mk_alignment_for_contiguous_layout(usual // 2)
    conform(made, DeepGemmConfig(layout="psum"), inputs)
    torch.cuda.synchronize()
    module.set_mk_alignment_for_contiguous_layout(usual)
    conform(made, DeepGemmConfig(layout="psum"), inputs)


@pytest.mark.parametrize("name", ["deep_gemm"])
def test_programmatic_dependent_launch_is_on(name: str) -> None:
    backend(name)
    alone(pdl_switch)


@PRECISIONS
@pytest.mark.parametrize("name", ["deep_gemm"])
def test_another_alignment(name: str, precision: Precision) -> None:
    backend(name)
    alone(other_alignment, precision.dtype)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
