"""What only a GPU can show of both products in one launch: no tile of down is too early, and none waits for ever."""

import itertools
from typing import Any

import pytest
import torch

from moe_dispatch.backends.triton_common.quantization import quantization_of
from moe_dispatch.testing import Case, Precision
from moe_dispatch.workloads import ROUTINGS, make_experts
from tests.support.refusals import available, require

pytestmark = pytest.mark.gpu
TURNS = 32


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("grid", ["slots", "experts"])
@pytest.mark.parametrize("M", [1, 8, 64])
@pytest.mark.parametrize("dtype", ["bf16", "fp8", "fp8_channel", "mxfp4"])
def test_it_equals_two_launches_beside_other_work(dtype: Any, M: int, grid: str, captured: bool) -> None:
    """On two streams with routings of their own, while products on a third one take multiprocessors away."""
    backend: Any = available("triton_splitk")
    case = Case(M=M, E=64, topk=8, K=1024, N=768)
    problem = case.problem(Precision(dtype, "bf16"), backend.machine)
    require(backend, problem)
    if quantization_of(problem).activations:
        pytest.skip("activations are quantised between the products here")
    default = backend.default_config(problem)
    one, two = (default.model_copy(update={"grid": grid, "one_launch": both}) for both in (True, False))
    experts = make_experts(case.layer, dtype, "cuda")
    hidden = torch.randn(M, case.K, device="cuda").bfloat16()
    routings = [ROUTINGS["uniform"].sample(M, case.E, case.topk, "cuda") for _ in range(4)]
    expected = [backend.run(hidden, experts, *routing, two) for routing in routings]
    backend.run(hidden, experts, *routings[0], one)  # compiled before it is captured
    streams = [torch.cuda.Stream() for _ in range(3)]
    wrong = torch.zeros(2, dtype=torch.int64, device="cuda")
    busy = torch.randn(2048, 2048, device="cuda").bfloat16()
    torch.cuda.synchronize()

    def turn(number: int) -> None:
        for routing, right in zip(routings[number::2], expected[number::2], strict=True):
            wrong[number] += (backend.run(hidden, experts, *routing, one) != right).any()

    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    if captured:
        for number, graph in enumerate(graphs):
            with torch.cuda.graph(graph):
                turn(number)
    for _, (number, stream) in itertools.product(range(TURNS), enumerate(streams)):
        with torch.cuda.stream(stream):
            if number == 2:
                torch.mm(busy, busy)
            elif captured:
                graphs[number].replay()
            else:
                turn(number)
    torch.cuda.synchronize()
    assert wrong.tolist() == [0, 0]
