"""Every baseline computes the layer, or says why it cannot."""

import pytest
import torch

from moe_dispatch.benchmarks.baselines import BASELINES
from moe_dispatch.machine import current_machine
from moe_dispatch.measure import make_inputs, reference_outputs
from moe_dispatch.problem import DType
from moe_dispatch.workloads import ROUTINGS, WORKLOADS, Workload, make_experts
from tests.benchmarks.helpers import H200, LAYER


def assert_correct(name: str, layer: Workload, M: int, dtype: DType, device: str) -> None:
    machine = current_machine(device)
    problem = layer.problem(M, dtype, machine)
    baseline = BASELINES[name](machine)
    if reasons := baseline.unsupported_reasons(problem):
        pytest.skip("; ".join(reasons))
    experts = make_experts(layer, dtype, device, torch.Generator(device).manual_seed(1))
    (inputs,) = make_inputs(problem, ROUTINGS["uniform"], device, count=1)
    (truth,) = reference_outputs(experts, (inputs,))
    out = baseline.prepare(experts, problem)(inputs).float()
    assert (out - truth).norm() / truth.norm() < baseline.tolerance[dtype]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_baseline_that_runs_on_a_cpu_is_right(dtype: DType) -> None:
    assert_correct("naive_loop", LAYER, 5, dtype, "cpu")


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_every_baseline_says_what_it_runs_and_refuses_what_it_cannot(name: str) -> None:
    baseline = BASELINES[name]
    assert baseline.__doc__
    assert baseline.name == name
    gpt_oss = WORKLOADS["gpt-oss-120b"].problem(4, "fp8", H200, "graph")
    assert baseline(current_machine("cpu")).unsupported_reasons(gpt_oss)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(BASELINES))
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_baselines_that_are_installed_are_right_on_a_gpu(name: str, dtype: DType) -> None:
    assert_correct(name, Workload("small", E=8, topk=2, K=512, N=256), 33, dtype, "cuda")
