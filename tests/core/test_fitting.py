"""What ran out of memory is left out of calls as large, is tried again after so many of them, and is told once."""

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from moe_dispatch import (
    BackendFailedError,
    ExpertWeights,
    MoEDispatchWarning,
    MoEProblem,
    Policy,
    explain,
    moe_forward,
    stats,
)
from moe_dispatch.backend import BackendConfig
from moe_dispatch.backends.reference import ReferenceBackend
from moe_dispatch.dispatch import fitting, waiting
from moe_dispatch.dispatch.dispatcher import Dispatcher
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.dispatch.settled_plans import SETTLING_CALLS
from moe_dispatch.machine import Machine
from moe_dispatch.settings import Settings
from moe_dispatch.system import failures
from tests.core.test_arrived_calls import Taking, arrived
from tests.core.test_dispatcher import FORKS, Call, barred, expected, is_right, make_call, ran
from tests.support.fakes import Greedy, Honest, Raising, ranked, registered_policy
from tests.support.processes import exit_code, start_child

WAIT = 48  # calls, in place of the usual number
pytestmark = pytest.mark.usefixtures("fixed_policy", "no_grad")


class Tight(Greedy):
    """Counts the calls on which it ran out of memory."""

    name = "tight"
    tries: ClassVar[list[int]] = []  # the token count of each
    free: ClassVar[int] = 2  # tokens that memory suffices for

    def run(self, hidden_states: Tensor, *others: Any) -> Tensor:
        if hidden_states.shape[0] > self.free:
            self.tries.append(hidden_states.shape[0])
            raise torch.OutOfMemoryError("tried to allocate")
        return Honest.run(self, hidden_states, *others)


@pytest.fixture(autouse=True)
def fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tight, "tries", [])
    monkeypatch.setattr(Tight, "free", 2)
    monkeypatch.setattr(waiting, "FIRST_WAIT", WAIT)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MoEDispatchWarning)
        yield


@contextlib.contextmanager
def one_warning(text: str) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield
    (message,) = [str(each.message) for each in warned if each.category is MoEDispatchWarning]
    assert text in message


def run_into(call: Call) -> Tensor:
    out = torch.full_like(call[0], torch.nan)
    assert moe_forward(*call, out=out) is out
    return out


def run_compiled(call: Call) -> Tensor:
    hidden, experts, weights, ids = call
    compiled = torch.compile(
        lambda *tensors: moe_forward(tensors[0], experts, *tensors[1:]), backend="eager", fullgraph=True
    )
    return compiled(hidden, weights, ids)


def run_recorded(call: Call) -> Tensor:
    hidden, experts, weights, ids = call
    with torch.enable_grad():
        out = moe_forward(hidden.detach().requires_grad_(), experts, weights, ids)
        assert out.requires_grad
    return out.detach()


@pytest.mark.parametrize("run", [lambda call: moe_forward(*call), run_into, run_compiled, run_recorded])
def test_the_next_calls_as_large_go_straight_to_what_takes_less(run: Any) -> None:
    with ranked(Tight, Honest):
        with one_warning("'tight' ran out of memory"):
            for M in (6, 6, 5, 8, 30, 30, *[6] * SETTLING_CALLS):
                assert torch.equal(run(make_call(M)), expected(make_call(M)))
        assert Tight.tries == [6], "5 is of the same power of two, and 30 is larger"
        assert is_right(make_call(2)), "what it suffices for stays"
        assert ran()["tight"] == 1
        assert stats()["tight"]["fell_back"] == 1
        assert not barred(), "it is not the backend's fault"


def test_a_settled_plan_is_left_when_memory_runs_out() -> None:
    with ranked(Tight, Honest), quiet():
        Tight.free = 8
        for _ in range(SETTLING_CALLS + 1):
            assert is_right(make_call(6))
        Tight.free = 2
        for _ in range(SETTLING_CALLS + 1):
            assert is_right(make_call(6))
        assert Tight.tries == [6]


@pytest.mark.parametrize("others", [(Honest,), ()], ids=["another choice", "halves"])
def test_it_is_tried_again_after_so_many_calls_and_then_twice_as_many(others: tuple[type[Honest], ...]) -> None:
    """The calls of all token counts that do without are counted together, and no other."""
    calls = [make_call(M) for M in (6, 7)]
    counted = 1 if others else 3  # of a call, with halves of three or four tokens, which are halved too

    def calls_until_it_is_tried() -> int:
        for number in range(1, 4 * WAIT):
            moe_forward(*calls[number % 2])
            if len(Tight.tries) > before:
                return number
        raise AssertionError

    with ranked(Tight, *others), quiet():
        for doubled in (1, 2):
            if doubled == 1:
                moe_forward(*calls[0])
            before = len(Tight.tries)
            moe_forward(*make_call(2))
            assert abs(calls_until_it_is_tried() - 1 - doubled * WAIT // counted) <= (counted > 1)
        Tight.free = 8
        for _ in range(4 * WAIT):
            moe_forward(*calls[0])
        done = ran()["tight"]
        assert torch.equal(moe_forward(*calls[0]), expected(calls[0]))
        assert ran()["tight"] == done + 1, "there is memory now"


def test_a_call_in_halves_is_split_at_once_from_then_on() -> None:
    call = make_call(16)
    with ranked(Tight):
        with one_warning("the call is split along M into 8 and 8 tokens"):
            assert torch.allclose(moe_forward(*call), expected(call), atol=1e-5)
        for run in (lambda call: moe_forward(*call), run_into, run_recorded):
            assert torch.allclose(run(call), expected(call), atol=1e-5)
        assert torch.allclose(moe_forward(*make_call(31)), expected(make_call(31)), atol=1e-5)
        assert Tight.tries == [16, 8, 4]
        assert set(ran()) == {"tight", "reference"}


def test_what_takes_as_much_is_not_tried_in_its_place() -> None:
    class Alike(Tight):
        name = "alike"

    class Larger(Tight):
        name = "larger"

        def workspace_bytes(self, problem: MoEProblem, config: BackendConfig) -> int:
            return 1 << 30

    with ranked(Tight, Alike, Larger, Honest), one_warning("'tight' ran out of memory"):
        for _ in range(3):
            assert is_right(make_call(6))
        assert Tight.tries == [6]
        against = {one.choice.backend: one.against for one in explain(*make_call(6)).candidates}
        assert "takes as much workspace as 'tight' (0.0 GiB), which ran out of memory at M=6" in against["larger"][0]
        assert not explain(*make_call(2)).candidates[2].against


def test_explain_says_why_and_until_when() -> None:
    call = make_call(6)
    with ranked(Tight), quiet():
        moe_forward(*call)
        moe_forward(*call)
        explanation = explain(*call)
        (reason,) = explanation.candidates[0].against
        assert reason.startswith("ran out of memory at M=3 (OutOfMemoryError: tried to allocate); calls of at least 3 ")
        assert "try it again after" in reason
        assert "or in a new process" in reason
        assert "computed in halves" in explanation.notes[-1]
        assert "computed in halves" not in "".join(explain(*make_call(2)).notes)


def test_one_token_is_never_left_without_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    run, lacking = ReferenceBackend.run, [True]

    def run_with_memory(*arguments: Any) -> Tensor:
        if lacking:
            raise torch.OutOfMemoryError("tried to allocate")
        return run(*arguments)

    monkeypatch.setattr(ReferenceBackend, "run", run_with_memory)
    Tight.free = 0
    with ranked(Tight), quiet():
        for M in (1, 6, 1):
            with pytest.raises(torch.OutOfMemoryError):
                moe_forward(*make_call(M))
        lacking.clear()
        assert torch.allclose(moe_forward(*make_call(6)), expected(make_call(6)), atol=1e-5)
        Tight.tries.clear()
        assert is_right(make_call(1))
        assert not Tight.tries


def test_a_named_backend_is_tried_in_every_call() -> None:
    call = make_call(6)
    with ranked(Tight, Honest), quiet():
        moe_forward(*call)
        for _ in range(2):
            with pytest.raises(BackendFailedError, match="OutOfMemoryError"):
                moe_forward(*call, backend="tight")
        assert len(Tight.tries) == 3


def test_a_capture_that_lacks_memory_is_followed_by_one_that_needs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(6)
    with ranked(Tight, Raising, Honest), quiet():
        monkeypatch.setattr(get_dispatcher("cpu"), "_on_cuda", True)
        with monkeypatch.context() as patches:
            patches.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            with pytest.raises(BackendFailedError, match=r"warm_up.*then capture again"):
                moe_forward(*call)
        assert not barred()
        get_dispatcher("cpu")._prepare_capture(call, None, None)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert torch.equal(moe_forward(*call), ReferenceBackend(Machine.inspect("cpu")).run(*call, *_default()))
        assert ran() == {"honest": 1}
        assert Tight.tries == [6]


def _default() -> tuple[Any]:
    return (ReferenceBackend.config_type(),)


def test_what_a_capture_will_run_in_halves_is_prepared_in_halves() -> None:
    with ranked(Tight), quiet():
        for _ in range(2):
            get_dispatcher("cpu")._prepare_capture(make_call(6), None, None)
        assert Tight.tries == [6, 3]
        planner = get_dispatcher("cpu").planner
        assert {(proof[0], proof[2].M) for proof in planner._proven} == {("tight", 1), ("tight", 2)}


class TightTaking(Taking):
    """Runs out of memory over rows of other ranks."""

    name = "tight_taking"

    def run_into(self, hidden_states: Any, *others: Any) -> Tensor:
        Tight.tries.append(len(others[1]))
        raise torch.OutOfMemoryError("tried to allocate")


def test_rows_of_other_ranks_go_straight_to_an_ordinary_call() -> None:
    inputs, _ = arrived()
    with ranked(TightTaking, Honest), one_warning("an ordinary call runs instead"):
        for _ in range(3):
            assert isinstance(get_dispatcher("cpu").arrived.forward(inputs), Tensor)
        assert len(Tight.tries) == 1
        assert stats()["tight_taking"]["fell_back"] == 1


@pytest.mark.parametrize("failing", [Tight, Raising])
def test_two_threads_that_fail_at_once_are_one_failure(failing: type[Honest], monkeypatch: pytest.MonkeyPatch) -> None:
    call, both = make_call(6), threading.Barrier(2)
    run = failing.run

    def together(*arguments: Any) -> Tensor:
        both.wait(60)
        return run(*arguments)

    def work() -> None:
        with torch.no_grad():
            outs.append(moe_forward(*call))

    monkeypatch.setattr(failing, "run", together)
    outs: list[Tensor] = []
    with ranked(failing, Honest), one_warning(f"{failing.name!r}"):
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(out, expected(call)) for out in outs)
        assert stats()[failing.name]["fell_back"] == 2
        assert stats()[failing.name]["quarantined"] == (failing is Raising)
        assert [one.wait for one in get_dispatcher("cpu").planner.fitting.shortages.values()] == (
            [] if failing is Raising else [WAIT]
        )


def test_a_probe_that_lacks_memory_says_nothing_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    class Probed(Tight):
        name = "probed"
        needs_probe = True

    with ranked(Probed, Honest), one_warning("'probed' could not be probed, because memory ran out"):
        for M in (6, 7, 2, 30):
            assert is_right(make_call(M))
        assert len(Tight.tries) == 1, "once for all token counts"
        assert not barred()
        assert "ran out of memory in its probe" in explain(*make_call(1)).candidates[0].against[0]
        Tight.free = 30
        for _ in range(WAIT):
            moe_forward(*make_call(6))
        assert is_right(make_call(6))
        assert ran()["probed"] >= 1


def test_where_not_even_one_token_fits_the_reference_runs_the_whole_call(monkeypatch: pytest.MonkeyPatch) -> None:
    Tight.free = 0
    with ranked(Tight), quiet():
        moe_forward(*make_call(6))
        before = ran()["reference"]
        assert torch.equal(moe_forward(*make_call(6)), moe_forward(*make_call(6), backend="reference"))
        assert ran()["reference"] == before + 2
        assert Tight.tries == [6, 3, 1]


@FORKS
def test_a_child_forgets_what_its_parent_lacked() -> None:
    def tries_again() -> None:
        Tight.free = 8
        moe_forward(*make_call(6))
        assert ran() == {"tight": 1}

    with ranked(Tight, Honest), quiet():
        moe_forward(*make_call(6))
        assert exit_code(start_child(tries_again)) == 0


@pytest.mark.parametrize(
    "text", ["CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "CUDA error: out of memory"]
)
def test_what_cudas_libraries_raise_without_memory_bars_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError(text)
    assert failures.out_of_memory(error)

    def run(*_: Any) -> Tensor:
        raise error

    monkeypatch.setattr(Raising, "run", run)
    with ranked(Raising, Honest), one_warning("ran out of memory"):
        assert is_right(make_call(1))
    assert not barred()


def test_a_policy_that_fails_anew_at_every_call_is_told_of_once() -> None:
    class Failing(Policy):
        name = "failing"

        def rank(self, problem: MoEProblem) -> Any:
            raise RuntimeError(f"nothing known at M={problem.M}")

    with registered_policy(Failing), one_warning("policy 'failing' is passed over: RuntimeError: nothing known at M=1"):
        planner = Dispatcher(Machine.inspect("cpu"), Settings(policies=("failing",))).planner
        experts: ExpertWeights = make_call(1)[1]
        for M in (1, 2, 3):
            planner.plan(experts.problem(M, 2, torch.float32, None), experts)
        assert len(planner.notes()) == 1


def differentiate(call: Call) -> None:
    hidden, experts, weights, ids = call
    with torch.autograd.forward_ad.dual_level():
        moe_forward(torch.autograd.forward_ad.make_dual(hidden, hidden), experts, weights, ids)


@pytest.mark.parametrize(("short", "names"), [(Tight, [Tight]), (ReferenceBackend, [Honest])])
def test_what_torch_differentiates_itself_is_neither_halved_nor_halves_others(
    short: type[Any], names: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the reference runs such a call; its memory is what autograd keeps, which no other call takes."""
    whole, sizes, call, lacking = ReferenceBackend.run, list[int](), make_call(16), short is ReferenceBackend

    def run(self: ReferenceBackend, hidden_states: Tensor, *others: Any) -> Tensor:
        sizes.append(hidden_states.shape[0])
        if lacking and hidden_states.shape[0] > 4:
            raise torch.OutOfMemoryError("tried to allocate")
        return whole(self, hidden_states, *others)

    monkeypatch.setattr(ReferenceBackend, "run", run)
    with ranked(*names), quiet():
        if short is Tight:
            moe_forward(*call)  # in halves, as nothing but the reference is left
            sizes.clear()
            differentiate(call)
            assert sizes == [16]
        else:
            differentiate(call)
            assert sizes == [16, 8, 4, 4, 8, 4, 4]
            lacking = False  # `honest` computes by the reference
            assert is_right(call)
            assert ran()["honest"] == 1


def test_a_plan_that_was_made_while_its_reason_ended_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(6)
    with ranked(Tight, Honest), quiet():
        moe_forward(*call)
        dispatcher = get_dispatcher("cpu")
        plan = dispatcher.planner.plan

        def planned(*arguments: Any, **options: Any) -> Any:
            made = plan(*arguments, **options)
            for _ in range(WAIT):  # the calls of another thread
                assert made.count is not None
                made.count()
            return made

        with monkeypatch.context() as patched:
            patched.setattr(dispatcher.planner, "plan", planned)
            moe_forward(*make_call(5))
        Tight.free = 6
        moe_forward(*make_call(5))
        assert ran() == {"honest": 2, "tight": 1}


def test_counts_that_threads_end_at_once_end() -> None:
    with ranked(Tight, Honest), quiet():
        moe_forward(*make_call(6))
        (shortage,) = get_dispatcher("cpu").planner.fitting.shortages.values()
        shortage.left = -1  # as where two threads without a lock between them count the last call
        problem = make_call(6)[1].problem(6, 2, torch.float32, None)
        assert not get_dispatcher("cpu").planner.fitting.holding(problem)


def test_another_configuration_did_not_run_out_itself() -> None:
    class Tiled(BackendConfig):
        tile: int

    backend, problem = Honest(Machine.load("h200")), make_call(6)[1].problem(6, 2, torch.float32, None)
    shortage = fitting.Shortage(problem.layer, 6, backend.name, Tiled(tile=1), "cause", 1.0, wait=WAIT, left=WAIT)
    assert shortage.reason(backend, Tiled(tile=1)).startswith("ran out of memory at M=6")
    assert shortage.reason(backend, Tiled(tile=2)).startswith("takes as much workspace as another of its")
