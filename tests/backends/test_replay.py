"""A replay does what the recorded run did, on other tensors and token counts too, or the run is refused."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_dispatch import BackendConfig, ExpertWeights, Machine
from moe_dispatch.dispatch.waiting import FIRST_WAIT
from moe_dispatch.problem import MoEProblem
from moe_dispatch.workloads import make_experts
from tests.support.fakes import Honest
from tests.support.stub_kernels import LAYER, StubKernel, floats, inputs

pytest.importorskip("triton")
import triton.language as tl

from moe_dispatch.backends.triton_common import backend as backend_module
from moe_dispatch.backends.triton_common import replay as replay_module
from moe_dispatch.backends.triton_common.backend import TritonBackend
from moe_dispatch.backends.triton_common.fast_launch import FastKernel
from moe_dispatch.backends.triton_common.launch_options import next_power_of_2
from moe_dispatch.backends.triton_common.replay import Replay, record
from moe_dispatch.backends.triton_common.stand_ins import MOST_TOKENS, Buffer, Extent, NotReplayableError, TokenRange

SIZE = 3 * LAYER.K


def double_signature(x_ptr, inner_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """inner = 2x, everywhere."""


def add_signature(inner_ptr, down_ptr, weights_ptr, out_ptr, n):  # type: ignore[no-untyped-def]
    """out = inner + down's first element + the first weight, everywhere."""


def double(x: int, inner: int, n: int, *_: object) -> None:
    floats(inner, n)[:] = 2 * floats(x, n)


def add(inner: int, down: int, weights: int, out: int, n: int, *_: object) -> None:
    floats(out, n)[:] = floats(inner, n) + floats(down, 1) + floats(weights, 1)


class Adding(TritonBackend):
    """Two launches with an intermediate between them, and what a case does between the launches."""

    name = "adding"
    requirements = Honest.requirements

    def __init__(self, between: "Callable[[Adding, Tensor, Tensor], object] | None" = None, **options: Any) -> None:
        super().__init__(Machine.inspect("cpu"))
        options = options or {"do_not_specialize": ["n"]}
        self.double = FastKernel(StubKernel(double_signature, double, **options))
        self.add = FastKernel(StubKernel(add_signature, add, **options))
        self.between = between or (lambda *_: None)
        self.kept = torch.zeros(SIZE)
        self.runs = 0

    def least_shared_memory(self, problem: MoEProblem) -> int:
        return 0

    def launch(self, hidden_states: Tensor, experts: Any, topk_weights: Tensor, *others: Any) -> Any:
        self.runs += 1
        *_, out = others
        size = hidden_states.numel()
        unused, inner = hidden_states.new_empty(size), hidden_states.new_empty(2, size)
        self.double[1,](hidden_states, inner, size, BLOCK=16 if size < 8 * LAYER.K else 32)
        self.double[1,](hidden_states, unused, size, BLOCK=16)
        replaced = self.between(self, inner, out)
        self.add[1,](inner, experts.down, topk_weights, out, size)
        return out if replaced is None else replaced


CONFIG = BackendConfig()

pytestmark = pytest.mark.usefixtures("cpu_launches_stubs")


def recorded(backend: Adding, M: int = 3) -> Replay:
    for _ in range(2):
        backend.run(*inputs(0, M), CONFIG)
    return record(backend, backend.launch, inputs(0, M), CONFIG)


def expected(hidden: Tensor, experts: ExpertWeights, weights: Tensor, _ids: Tensor) -> Tensor:
    return 2 * hidden + experts.down[0, 0, 0] + weights[0, 0]


def replayed() -> tuple[Adding, Replay, int]:
    """A backend, the replay of one of its runs, and how often it has run."""
    backend = Adding()
    return backend, recorded(backend), backend.runs


def test_token_counts_share_a_replay_as_far_as_the_run_does_not_decide_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a first call of a token count is played, too."""
    monkeypatch.setattr(Tensor, "is_cuda", True)
    backend = Adding()
    for M, first, last in ((3, 1, 7), (9, 8, MOST_TOKENS // LAYER.K)):
        for _ in range(2):
            backend.run(*inputs(0, M), CONFIG)
        replay = backend.fast_path(inputs(0, M), CONFIG)
        assert replay is not None
        assert (replay.tokens.first, replay.tokens.last) == (first, last)
        assert backend.fast_path(inputs(0, M - 1), CONFIG) is replay
    runs = backend.runs
    outs = {M: backend.run(*inputs(1, M), CONFIG) for M in (1, 2, 7, 8, 21)}
    assert backend.runs == runs
    for M, out in outs.items():
        assert torch.equal(out, expected(*inputs(1, M)))


def computed(M: Any, K: int) -> list[Any]:
    """What stages compute of a token count, with comparisons that come out differently for some."""
    blocks = math.ceil(M * 8 / 128)
    fewest = min(K, blocks + 3) * 2
    return [M - 1, 3 + M, blocks * blocks, fewest, (M + M) // 3, 4 if M > 100 else 5, M or 0, max(M - 4, 0) * 1,
            next_power_of_2(blocks), M == 7, M >= 40, 2 * M < M + 9, M * 3 == M + 14]  # fmt: skip


@pytest.mark.parametrize("M", [1, 6, 7, 8, 39, 40, 100, 101, 260, 5000])
def test_extents_are_the_numbers_of_every_token_count_of_their_range(M: int) -> None:
    tokens = TokenRange(M)
    extents = computed(Extent(tokens), 40)
    assert tokens.first <= M <= tokens.last
    for count in {tokens.first, M, min(tokens.last, 10000), *range(tokens.first, min(tokens.last, tokens.first + 70))}:
        assert [each.at(count) if isinstance(each, Extent) else each for each in extents] == computed(count, 40)


def test_what_falls_as_tokens_grow_is_no_extent() -> None:
    M: Any = Extent(TokenRange(8))
    falling = (lambda: 9 - M, lambda: M - M, lambda: M * -1, lambda: 8 // M, lambda: M % 2)
    undecided = (lambda: M == M // 2, lambda: M < M * M, lambda: max(M * M, M + 5), lambda: M > 1.5, lambda: M == "8")
    for compute in (*falling, *undecided, lambda: {M}, lambda: range(M)):
        with pytest.raises(TypeError):
            compute()


@pytest.mark.parametrize("M", [3, 64, 65])
def test_a_buffer_is_cut_as_a_tensor_is(M: int) -> None:
    tokens = TokenRange(M)
    buffer = Buffer([0], 0, torch.float32, (Extent(tokens), 4))
    slices = slice(64), slice(2, None), slice(1, 5), slice(100)
    cuts = [buffer[rows] for rows in slices]
    for count in {tokens.first, M, min(tokens.last, 200)}:
        for cut, tensor in zip(cuts, [torch.empty(count, 4)[rows] for rows in slices], strict=True):
            assert cut.offset == 4 * tensor.storage_offset()
            assert (Extent(tokens) * 0 + cut.shape[0]).at(count) == len(tensor)
    for refused in (slice(-2, None), slice(None, -1), slice(None, None, 2)):
        with pytest.raises(NotReplayableError):
            buffer[refused]


class Tuned(BackendConfig):
    blocks: int = 1


def test_calls_that_differ_in_what_launches_depend_on_share_no_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(backend_module, "MAX_KINDS", 2)
    backend, call = Adding(), inputs(0)
    recorded(backend)
    replay = backend.fast_path(call, Tuned())
    assert replay is not None
    same = (*call, Tuned())
    other = make_experts(dataclasses.replace(LAYER, activation="gelu"), "fp32", "cpu")
    changes = (0, call[0].half()), (1, other), (3, call[3][:, :1]), (3, call[3].long()), (4, Tuned(blocks=2))
    for place, value in changes:
        assert backend._replay(*same[:place], value, *same[place + 1 :]) is None
    assert backend._replay(*same) is replay
    for blocks in range(2, 5):
        backend.fast_path(call, Tuned(blocks=blocks))
    assert len(backend._replays) == 2


def test_sizes_are_bounded_and_only_of_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_module, "MAX_SIZES", 2)
    backend, replay, runs = replayed()
    for M in range(1, 9):
        assert torch.equal(replay(*inputs(1, M), CONFIG), expected(*inputs(1, M)))
        assert len(replay._sizes) <= 2
        assert backend.runs == runs + (M == 8)


def test_a_replay_of_many_tokens_is_verified_on_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """On as few as its range has, so that it takes no memory that a profile of the peak would count."""
    monkeypatch.setattr(replay_module, "_VERIFIED_ROWS", 4)
    backend, counts = Adding(), list[int]()
    backend.between = lambda _backend, _inner, out: counts.append(out.shape[0])
    assert list(recorded(backend, 40)._sizes) == [8]
    assert [count for count in counts if isinstance(count, int)] == [40, 40, 8]


def test_a_replay_that_fails_leaves_the_call_to_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, replay, runs = replayed()
    with monkeypatch.context() as patches:
        patches.setitem(vars(replay), "steps", (replay.steps[0], None))
        assert torch.equal(replay(*inputs(1), CONFIG), expected(*inputs(1)))
    assert backend.runs == runs + 1
    assert torch.equal(replay(*inputs(1), CONFIG), expected(*inputs(1)))
    assert backend.runs == runs + 2, "what raised is not tried again"


def test_a_replay_that_lacks_memory_leaves_calls_as_large_to_the_backend_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    new_empty, tries = Tensor.new_empty, list[int]()

    def without_memory(tensor: Tensor, *shape: Any, dtype: torch.dtype | None = None) -> Tensor:
        if dtype is torch.uint8 and tensor.shape[0] >= 3:
            tries.append(tensor.shape[0])
            raise torch.OutOfMemoryError
        return new_empty(tensor, *shape, dtype=dtype)

    backend, replay, runs = replayed()
    with monkeypatch.context() as patches:
        patches.setattr(Tensor, "new_empty", without_memory)
        for _ in range(1 + FIRST_WAIT):
            assert torch.equal(replay(*inputs(1), CONFIG), expected(*inputs(1)))
        assert tries == [3]
        assert torch.equal(replay(*inputs(1, 2), CONFIG), expected(*inputs(1, 2)))
        assert backend.runs == runs + 1 + FIRST_WAIT, "for two tokens it suffices"
        replay(*inputs(1), CONFIG)
        assert tries == [3, 3]
    runs = backend.runs
    for _ in range(2 * FIRST_WAIT):
        replay(*inputs(1), CONFIG)
    assert backend.runs == runs + 2 * FIRST_WAIT, "it is tried again after twice as many calls"
    assert torch.equal(replay(*inputs(1), CONFIG), expected(*inputs(1)))
    assert backend.runs == runs + 2 * FIRST_WAIT


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


def shifted(tensor: Tensor) -> Tensor:
    """The same values, one element off the boundary."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def test_a_misaligned_tensor_goes_the_long_way() -> None:
    backend, replay, runs = replayed()
    hidden, experts, weights, ids = inputs(1)
    for call in ((shifted(hidden), experts, weights, ids), (hidden, experts, shifted(weights), ids)):
        assert torch.equal(replay(*call, CONFIG), expected(*call))
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


def hiding_work(_backend: Adding, inner: Tensor, _out: Tensor) -> None:
    if not isinstance(inner, Buffer):
        floats(inner.data_ptr(), SIZE)[:] += np.float32(1)


def misaligning(backend: Adding, inner: Tensor, _out: Tensor) -> None:
    backend.double[1,](inner, inner.new_empty(SIZE + 4)[int(isinstance(inner, Buffer)) :], SIZE, BLOCK=16)


UNREPLAYABLE: dict[str, Callable[[], Adding]] = {
    "does what only tensors can do .*mul_": lambda: Adding(lambda _backend, inner, _out: inner.mul_(3.0)),
    "memory of unknown origin": lambda: Adding(
        lambda backend, inner, _out: backend.double[1,](inner, backend.kept, SIZE, BLOCK=16)
    ),
    "launched by Triton itself": lambda: Adding(
        lambda backend, x, _out: backend.double[1,](x, x, SIZE, BLOCK=16, num_warps=backend.runs)
    ),
    "(?#alignment)launched by Triton itself": lambda: Adding(misaligning),
    "no launch of a `fast_launch` kernel writes its output": lambda: Adding(lambda *_: torch.empty(4, LAYER.K)[1:]),
    "the replay's result is not the run's": lambda: Adding(hiding_work),
    "specialised on a number that depends on M": lambda: Adding(do_not_specialize=[]),
}


@pytest.mark.parametrize("reason", UNREPLAYABLE)
def test_what_cannot_be_played_back_is_not_recorded(reason: str) -> None:
    with pytest.raises(NotReplayableError, match=reason):
        recorded(UNREPLAYABLE[reason]())


def test_weights_that_share_memory_leave_an_address_in_doubt() -> None:
    backend, (hidden, experts, weights, ids) = Adding(), inputs(0)
    experts.down.data = experts.gate_up.data.flatten()[: experts.down.numel()].view(experts.down.shape)
    for _ in range(2):
        backend.run(hidden, experts, weights, ids, CONFIG)
    with pytest.raises(NotReplayableError, match="two weights share memory"):
        record(backend, backend.launch, (hidden, experts, weights, ids), CONFIG)
