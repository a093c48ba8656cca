"""A replay does what the recorded run did, on other tensors too; a run that it could not repeat is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_dispatch import BackendConfig, Machine
from tests.support.fakes import Honest
from tests.support.stub_kernels import LAYER, StubKernel, floats, inputs

pytest.importorskip("triton")
import triton.language as tl

from moe_dispatch.backends.triton_common.descriptors import Descriptors
from moe_dispatch.backends.triton_common.fast_launch import FastKernel
from moe_dispatch.backends.triton_common.replay import NotReplayableError, Replay, Tried, record

SIZE = 3 * LAYER.K


def double_signature(x_ptr, inner_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """inner = 2x, everywhere."""


def add_signature(inner_ptr, down_ptr, weights_ptr, out_ptr, n):  # type: ignore[no-untyped-def]
    """out = inner + down's first element + the first weight, everywhere."""


def double(x: int, inner: int, n: int, *_: object) -> None:
    floats(inner, n)[:] = 2 * floats(x, n)


def add(inner: int, down: int, weights: int, out: int, n: int, *_: object) -> None:
    floats(out, n)[:] = floats(inner, n) + floats(down, 1) + floats(weights, 1)


class Adding(Honest):
    """Two launches with an intermediate between them, and what a case does between the launches."""

    name = "adding"

    def __init__(self, between: "Callable[[Adding, Tensor, Tensor], object] | None" = None) -> None:
        super().__init__(Machine.inspect("cpu"))
        self.double = FastKernel(StubKernel(double_signature, double))
        self.add = FastKernel(StubKernel(add_signature, add))
        self.between = between or (lambda *_: None)
        self.descriptors = Descriptors()
        self.tried: Tried = {}
        self.kept = torch.zeros(SIZE)
        self.runs = 0

    def run(self, hidden_states: Tensor, experts: Any, topk_weights: Tensor, *_: object) -> Tensor:
        self.runs += 1
        size = hidden_states.numel()
        inner, out = torch.empty(2, size)[0], torch.empty_like(hidden_states)
        self.double[1,](hidden_states, inner, size, BLOCK=16)
        replaced = self.between(self, inner, out)
        self.add[1,](inner, experts.down, topk_weights, out, size)
        return replaced if isinstance(replaced, Tensor) else out


CONFIG = BackendConfig()

pytestmark = pytest.mark.usefixtures("cpu_launches_stubs")


def recorded(backend: Adding, *, before: int = 2) -> Replay:
    for _ in range(before):
        backend.run(*inputs(0), CONFIG)
    return record(backend, inputs(0), CONFIG, backend.descriptors, backend.tried)


def replayed() -> tuple[Adding, Replay, int]:
    """A backend, the replay of one of its runs, and how often it has run."""
    backend = Adding()
    return backend, recorded(backend), backend.runs


def test_another_token_count_of_the_same_launches_is_not_tried_again() -> None:
    backend = Adding()
    recorded(backend)
    for M in (5, 7):
        before = len(backend.double.kernel.started)
        replay = record(backend, inputs(0, M), CONFIG, backend.descriptors, backend.tried)
        assert len(backend.double.kernel.started) - before == 1, "the recorded run, and no replay beside it"
        assert torch.equal(replay(*inputs(1, M), CONFIG), backend.run(*inputs(1, M), CONFIG))
    assert len(backend.tried) == 1


def test_it_does_what_the_run_does_on_other_tensors_and_another_layer() -> None:
    backend, replay, runs = replayed()
    outs = [replay(*inputs(seed), CONFIG) for seed in (1, 2, 1)]
    assert backend.runs == runs, "only the replay ran"
    for seed, out in zip((1, 2, 1), outs, strict=True):
        assert torch.equal(out, backend.run(*inputs(seed), CONFIG))
    assert len({out.data_ptr() for out in outs}) == 3, "the output is fresh memory"


@pytest.mark.parametrize("off_the_boundary", [False, True])
def test_the_caller_may_bring_memory_for_the_output(off_the_boundary: bool) -> None:
    backend, replay, runs = replayed()
    out = torch.full((3, LAYER.K), torch.nan)
    out = shifted(out) if off_the_boundary else out
    assert replay.into(*inputs(1), CONFIG, out) is out
    assert backend.runs == runs + off_the_boundary, "it goes the long way only where memory is off the boundary"
    assert torch.equal(out, backend.run(*inputs(1), CONFIG))


def test_weights_that_move_are_found_where_they_are() -> None:
    _, replay, _ = replayed()
    hidden, experts, weights, ids = inputs(1)
    experts.down.data = torch.full_like(experts.down, 5.0)
    assert torch.equal(replay(hidden, experts, weights, ids, CONFIG), 2 * hidden + 5 + weights[0, 0])


def shifted(tensor: Tensor) -> Tensor:
    """The same values, one element off the boundary."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def test_a_misaligned_tensor_goes_the_long_way() -> None:
    backend, replay, runs = replayed()
    hidden, experts, weights, ids = inputs(1)
    for arguments in ((shifted(hidden), experts, weights, ids), (hidden, experts, shifted(weights), ids)):
        assert torch.equal(replay(*arguments, CONFIG), 2 * hidden + experts.down[0, 0, 0] + weights[0, 0])
    assert backend.runs == runs + 2


def test_a_profiler_sees_the_launches() -> None:
    from triton import knobs

    backend, replay, runs = replayed()
    knobs.runtime.launch_exit_hook.add(print)
    try:
        replay(*inputs(1), CONFIG)
    finally:
        knobs.runtime.launch_exit_hook.remove(print)
    assert backend.runs == runs + 1


def computing(_backend: Adding, inner: Tensor, _out: Tensor) -> None:
    inner.mul_(3.0)


def keeping(backend: Adding, inner: Tensor, _out: Tensor) -> None:
    backend.double[1,](inner, backend.kept, SIZE, BLOCK=16)


def launching_by_triton(backend: Adding, inner: Tensor, _out: Tensor) -> None:
    backend.double[1,](inner, inner, SIZE, BLOCK=16, num_warps=backend.runs)


def returning_a_part(_backend: Adding, _inner: Tensor, _out: Tensor) -> Tensor:
    return torch.empty(4, LAYER.K)[1:]


def hiding_work(_backend: Adding, inner: Tensor, _out: Tensor) -> None:
    floats(inner.data_ptr(), SIZE)[:] += np.float32(1)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (computing, "torch runs aten.mul_"),
        (keeping, "memory of unknown origin"),
        (launching_by_triton, "launched by Triton itself"),
        (returning_a_part, "output is not fresh memory of its own"),
        (hiding_work, "the replay's result is not the run's"),
    ],
)
def test_what_cannot_be_played_back_is_not_recorded(between: Callable[..., Any], reason: str) -> None:
    with pytest.raises(NotReplayableError, match=reason):
        recorded(Adding(between))


def test_a_first_run_is_too_early() -> None:
    with pytest.raises(NotReplayableError, match="launched by Triton itself"):
        recorded(Adding(), before=0)


def test_inputs_that_share_memory_leave_an_address_in_doubt() -> None:
    backend = Adding()
    hidden, experts, _, ids = inputs(0)
    shared = (hidden, experts, hidden.flatten()[:6].view(3, 2), ids)
    backend.run(*shared, CONFIG)
    with pytest.raises(NotReplayableError, match="two inputs share memory"):
        record(backend, shared, CONFIG, backend.descriptors, {})
