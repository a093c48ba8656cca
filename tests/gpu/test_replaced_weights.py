"""Weights replaced between calls are used by the next call, on every Triton backend, with and without replays.

``weight.data = …`` is what weight updates in RL, sleep modes and ``module.cpu(); module.cuda()`` do.
"""

import pytest
import torch

from moe_dispatch import ExpertWeights, moe_forward
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.problem import DType
from moe_dispatch.registry import BACKENDS
from moe_dispatch.testing import relative_error, truth
from moe_dispatch.workloads import ROUTINGS, Workload, make_experts

pytestmark = pytest.mark.gpu

OURS = ("triton_splitk", "triton_vector", "triton_persistent", "gluon_hopper")
LAYER = Workload("replaced", E=16, topk=4, K=1024, N=512)
CALLS = 4  # a kind of call is prepared for (see `Dispatcher`) from its third on
TENSORS = ("gate_up", "down", "gate_up_scale", "down_scale")


def layer(dtype: DType, seed: int) -> ExpertWeights:
    return make_experts(LAYER, dtype, "cuda", torch.Generator("cuda").manual_seed(seed))


def weights_of(experts: ExpertWeights) -> dict[str, torch.Tensor]:
    return {name: tensor for name in TENSORS if (tensor := getattr(experts, name)) is not None}


class Checker:
    """Calls a backend by name on one set of inputs and compares with the reference on the weights of now."""

    def __init__(self, name: str, dtype: DType, M: int) -> None:
        if name not in BACKENDS.names():
            pytest.skip(f"{name} is not registered")
        machine = get_dispatcher().machine
        reasons = get_dispatcher().planner.backend(name).unsupported_reasons(LAYER.problem(M, dtype, machine))
        if reasons:
            pytest.skip("; ".join(reasons))
        generator = torch.Generator().manual_seed(M)
        self.name, self.dtype = name, dtype
        self.hidden = torch.randn(M, LAYER.K, generator=generator).to("cuda", torch.bfloat16)
        weights, ids = ROUTINGS["uniform"].sample(M, LAYER.E, LAYER.topk, "cpu", generator)
        self.weights, self.ids = weights.cuda(), ids.cuda()

    def __call__(self, experts: ExpertWeights) -> None:
        backend = get_dispatcher().planner.backend(self.name)
        M, topk = self.ids.shape
        problem = experts.problem(M, topk, self.hidden.dtype, backend.machine.capability)
        quantized = backend.quantizes_activations(problem)
        expected = truth(self.hidden, experts, self.weights, self.ids, quantize_activations=quantized)
        tolerance = backend.tolerance[self.dtype]
        for call in range(CALLS):
            out = moe_forward(self.hidden, experts, self.weights, self.ids, backend=self.name)
            error = relative_error(out, expected)
            assert error <= tolerance, f"call {call}: error {error:.1e} against the weights of now"


@pytest.mark.parametrize("M", [1, 16, 64, 512])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("name", OURS)
class TestReplacedWeights:
    def test_by_new_tensors(self, name: str, dtype: DType, M: int) -> None:
        check, experts = Checker(name, dtype, M), layer(dtype, 0)
        check(experts)
        for seed in (1, 2):
            for attribute, tensor in weights_of(layer(dtype, seed)).items():
                getattr(experts, attribute).data = tensor
            check(experts)

    def test_by_tensors_that_take_the_place_of_freed_ones(self, name: str, dtype: DType, M: int) -> None:
        """The allocator hands out the old addresses again, for other weights."""
        check, experts = Checker(name, dtype, M), layer(dtype, 0)
        check(experts)
        others = {attribute: tensor.cpu() for attribute, tensor in weights_of(layer(dtype, 3)).items()}
        for attribute, tensor in weights_of(experts).items():
            tensor.data = torch.empty(0, dtype=tensor.dtype, device="cuda")
            tensor.data = others[attribute].cuda()
        check(experts)

    def test_that_move_to_the_cpu_and_back(self, name: str, dtype: DType, M: int) -> None:
        check, experts = Checker(name, dtype, M), layer(dtype, 0)
        module = torch.nn.Module()
        for attribute, tensor in weights_of(experts).items():
            module.register_parameter(attribute, torch.nn.Parameter(tensor, requires_grad=False))
        experts = ExpertWeights(**dict(module.named_parameters()))  # type: ignore[arg-type] # names are its own
        check(experts)
        module.cpu()
        hole = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")  # so that they come back elsewhere
        module.cuda()
        check(experts)
        del hole

    def test_in_place(self, name: str, dtype: DType, M: int) -> None:
        check, experts = Checker(name, dtype, M), layer(dtype, 0)
        check(experts)
        for attribute, tensor in weights_of(layer(dtype, 4)).items():
            getattr(experts, attribute).copy_(tensor)
        check(experts)


@pytest.mark.parametrize("name", OURS)
def test_replaced_memory_is_freed(name: str) -> None:
    check, experts = Checker(name, "bf16", 16), layer("bf16", 0)
    check(experts)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for tensor in weights_of(experts).values():
        tensor.data = torch.empty(0, dtype=tensor.dtype, device="cuda")
    torch.cuda.synchronize()
    freed = before - torch.cuda.memory_allocated()
    expected = (2 * LAYER.N + LAYER.N) * LAYER.K * LAYER.E * 2
    assert freed >= expected, f"{freed} of {expected} bytes are freed"
