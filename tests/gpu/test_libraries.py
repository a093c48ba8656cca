"""What only a GPU can show of the backends over foreign libraries alone: captures, gradients, global switches.

tests/gpu/test_faults.py has what they share with the other backends. A case that turns a switch of the whole process
runs in one of its own: ``python -m tests.gpu.test_libraries FUNCTION ARGUMENTS…``.
"""

import importlib

import pytest
import torch
from torch import Tensor

from moe_dispatch.backend import Backend
from moe_dispatch.backends.vllm_fused_moe import layers
from moe_dispatch.testing import Case, Inputs, Precision, conform, make_inputs, relative_error
from tests.gpu.test_faults import alone, backend, run_alone

pytestmark = pytest.mark.gpu
BF16, FP8 = Precision("bf16", "bf16"), Precision("fp8", "bf16")
LIBRARIES = pytest.mark.parametrize("name", ["vllm_fused_moe", "deep_gemm"])
PRECISIONS = pytest.mark.parametrize("precision", [BF16, FP8], ids=str)
LAYER = Case(M=64, E=32, topk=4, K=512, N=256)  # so many slots that vLLM sorts them, and then reads its expert map


def run(made: Backend, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return made.run(*inputs.arguments, made.default_config(LAYER.layer.problem(LAYER.M, "bf16", made.machine)))


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


@LIBRARIES
def test_weights_that_require_a_gradient_without_recording_one(name: str) -> None:
    made, inputs = backend(name), make_inputs(LAYER, BF16, "cuda")
    for tensor in (inputs.experts.gate_up, inputs.experts.down):
        tensor.requires_grad_()
    assert relative_error(run(made, inputs), inputs.truth) <= made.tolerance["bf16"]


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
    run_alone(globals())
