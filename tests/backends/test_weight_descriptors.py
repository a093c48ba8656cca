"""Tensor descriptors follow the memory of their weights, and keep none of it alive.

Memory is replaced by weight updates (``weight.data = …``), by sleep modes, and by ``module.cpu(); module.cuda()``.
"""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_dispatch import BackendConfig, ExpertWeights
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.machine import Machine
from moe_dispatch.problem import MoEProblem
from moe_dispatch.workloads import make_experts
from tests.support.stub_kernels import LAYER, StubKernel, floats, inputs

pytest.importorskip("triton")
from moe_dispatch.backends.triton_common import descriptors as descriptors_module
from moe_dispatch.backends.triton_common.backend import TritonBackend
from moe_dispatch.backends.triton_common.descriptors import Descriptors, WeightView
from moe_dispatch.backends.triton_common.fast_launch import FastKernel
from moe_dispatch.backends.triton_common.replay import Replay, record
from moe_dispatch.backends.triton_common.stand_ins import NotReplayableError

SIZE = 3 * LAYER.K
VIEW = WeightView((LAYER.E, LAYER.K, LAYER.N), (1, 16, 16))
CONFIG = BackendConfig()

pytestmark = pytest.mark.usefixtures("cpu_launches_stubs")


def add_signature(x_ptr, down, out_ptr, n):  # type: ignore[no-untyped-def] # a kernel's
    """out = x + the first element of down, everywhere; down comes as a tensor descriptor."""


def add(x: int, down: int, *rest: int) -> None:
    *_sizes_and_strides, out, n = rest
    floats(out, n)[:] = floats(x, n) + floats(down, 1)


class Described(TritonBackend):
    """One launch, which sees a weight through a tensor descriptor."""

    name = "described"

    def __init__(self) -> None:
        super().__init__(Machine.inspect("cpu"))
        self.stub = StubKernel(add_signature, add)
        self.kernel = FastKernel(self.stub)

    def least_shared_memory(self, problem: MoEProblem) -> int:
        return 0

    def launch(self, hidden_states: Tensor, experts: ExpertWeights, *others: Any) -> Tensor:
        out: Tensor = others[-1]
        down = self._descriptor(experts, "down", VIEW.shape, VIEW.block)
        self.kernel[1,](hidden_states, down, out, SIZE)
        return out


def recorded(backend: Described) -> Replay:
    for _ in range(2):
        backend.run(*inputs(), CONFIG)
    return record(backend, backend.launch, inputs(), CONFIG)


def running(backend: Described) -> Callable[..., Tensor]:
    backend.run(*inputs(), CONFIG)
    return backend.run


@pytest.mark.parametrize("prepared", [running, recorded])
def test_weights_are_used_where_they_are_on_each_call(prepared: Callable[[Described], Callable[..., Tensor]]) -> None:
    backend = Described()
    run = prepared(backend)
    hidden, experts, weights, ids = inputs()
    first, second = torch.full_like(experts.down, 1.0), torch.full_like(experts.down, 2.0)
    for value, memory in ((1.0, first), (2.0, second), (1.0, first)):
        experts.down.data = memory
        compiled = backend.stub.compiled
        assert torch.equal(run(hidden, experts, weights, ids, CONFIG), hidden + value)
        assert backend.stub.compiled == compiled, "and without Triton's own path"


def test_other_weights_at_the_same_address_have_another_descriptor() -> None:
    kept = Descriptors()
    weight = make_experts(LAYER, "bf16", "cpu", torch.Generator().manual_seed(0)).down
    first = kept.get(weight, VIEW)
    assert kept.get(weight, VIEW) is first
    assert kept.get(weight.view(torch.float16), VIEW).base.dtype is torch.float16
    assert kept.get(weight, VIEW._replace(block=(1, 32, 16))).block_shape == [1, 32, 16]
    turned = kept.get(weight, WeightView((2, 2, LAYER.K, LAYER.N), (1, 1, 16, 16), (0, 1)))
    assert list(turned.strides[:2]) == [LAYER.K * LAYER.N, 2 * LAYER.K * LAYER.N]


def counted(values: np.ndarray[Any, Any]) -> tuple[Tensor, "weakref.ref[np.ndarray[Any, Any]]"]:
    """A weight in numpy's memory, and a reference that dies with that memory."""
    return torch.from_numpy(values), weakref.ref(values)


@pytest.mark.parametrize("prepared", [running, recorded])
def test_memory_that_was_replaced_is_freed(prepared: Callable[[Described], Callable[..., Tensor]]) -> None:
    backend = Described()
    run = prepared(backend)
    hidden, experts, weights, ids = inputs()
    experts.down.data, alive = counted(np.ones(experts.down.shape, np.float32))
    for _ in range(3):
        run(hidden, experts, weights, ids, CONFIG)
    assert alive() is not None
    experts.down.data = torch.zeros_like(experts.down)
    assert alive() is None


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "memory is freed": lambda down: down.untyped_storage().resize_(0),
    r"got \[2, 64, 32\]": lambda down: setattr(down, "data", torch.zeros(2, LAYER.K, LAYER.N)),
    r"got \[2": lambda down: setattr(down, "data", down.data[:2]),
    "with strides": lambda down: setattr(down, "data", down.data.transpose(1, 2)),
}


@pytest.mark.parametrize("prepared", [running, recorded])
@pytest.mark.parametrize("reason", CHANGES)
def test_weights_that_cannot_be_described_any_more_are_the_callers_fault(
    reason: str, prepared: Callable[[Described], Callable[..., Tensor]]
) -> None:
    run = prepared(Described())
    hidden, experts, weights, ids = inputs()
    CHANGES[reason](experts.down)
    with pytest.raises(InvalidInputError, match=reason):
        run(hidden, experts, weights, ids, CONFIG)


def test_descriptors_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors_module, "MAX_DESCRIPTORS", 8)
    backend = Described()
    hidden, experts, weights, ids = inputs()
    memories = [torch.full_like(experts.down, float(value)) for value in range(20)]
    for value, memory in enumerate(memories):
        experts.down.data = memory
        assert torch.equal(backend.run(hidden, experts, weights, ids, CONFIG), hidden + value)
    assert len(backend._descriptors) <= 8


def test_a_descriptor_of_no_weight_is_not_recorded() -> None:
    backend = Described()
    elsewhere = torch.zeros(LAYER.E, LAYER.K, LAYER.N)
    backend._descriptor = lambda *_: backend._descriptors.get(elsewhere, VIEW)  # type: ignore[method-assign]
    with pytest.raises(NotReplayableError, match="memory of unknown origin"):
        recorded(backend)
