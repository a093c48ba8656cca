"""A backend of another package may do anything: each fault is a reason that names it, and the layer is computed."""

import concurrent.futures
import functools
import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import pydantic
import pytest
import torch
from torch import Tensor

from moe_dispatch import (
    BackendUnavailableError,
    BackendUnsupportedError,
    Choice,
    InvalidInputError,
    Machine,
    MoEDispatchWarning,
    MoEProblem,
    Policy,
    explain,
    moe_forward,
)
from moe_dispatch.backend import Backend, BackendConfig, Inputs, Run
from moe_dispatch.dispatch import first_calls
from moe_dispatch.dispatch.dispatcher import FAST_PATH_CALLS
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.guard import GuardedBackend
from moe_dispatch.registry import ENTRY_POINT_GROUP, Registry, make_backend
from moe_dispatch.settings import settings
from tests.attack import misbehaviour
from tests.attack.misbehaviour import Spoil, UnprintableError, raising
from tests.core.test_dispatcher import FORKS, Call, is_right, make_call, ran
from tests.support.fakes import Honest, ranked, registered, registered_policy
from tests.support.processes import exit_code, start_child

pytestmark = pytest.mark.usefixtures("fixed_policy", "no_grad")


class Foreign(Honest):
    """Right, and probed before it is trusted."""

    name = "foreign"
    needs_probe = True


def foreign(**members: Any) -> type[Backend]:
    """A backend called ``foreign`` with some members replaced."""
    return type("Foreign", (Foreign,), members)


def test_the_wrapper_asks_the_backend_itself_for_everything() -> None:
    """A method that it inherits asks no backend."""
    wrapper = make_backend("triton_splitk", Machine.load("a100-80gb")).backend
    assert wrapper is not None
    methods = {name for name, member in vars(Backend).items() if name[0] != "_" and inspect.isfunction(member)}
    own = vars(GuardedBackend).keys() | vars(wrapper).keys()
    assert methods - own == {"further_reasons"}, "which unsupported_reasons asks for"
    problem = MoEProblem(M=1, K=128, N=128, E=2, topk=1, dtype="fp8", capability=(8, 0))
    assert not wrapper.quantizes_activations(problem)


QUESTIONS = {
    "further_reasons raises": foreign(further_reasons=raising(KeyError("sm"))),
    "further_reasons exits": foreign(further_reasons=raising(SystemExit(3))),
    "further_reasons gives one text": foreign(further_reasons=lambda *_: "no GPU"),
    "unsupported_reasons gives None": foreign(unsupported_reasons=lambda *_: None),
    "unavailable_reasons raises": foreign(unavailable_reasons=raising(OSError("no such library"))),
    "measured_versions gives nonsense": foreign(measured_versions=lambda *_: [1, 2]),
    "measured_versions gives numbers": foreign(measured_versions=lambda *_: {"torch": 2.13}),
    "measured_versions raises": foreign(measured_versions=raising(AttributeError("__version__"))),
    "configs raises": foreign(configs=raising(ZeroDivisionError("division by zero"))),
    "configs gives nothing": foreign(configs=lambda *_: ()),
    "default_config gives a dictionary": foreign(default_config=lambda *_: {}),
    "the constructor raises": foreign(__init__=raising(RuntimeError("no GPU"))),
    "the constructor exits": foreign(__init__=raising(SystemExit("bye"))),
    "config_type is none": foreign(config_type=dict),
    "tolerance is a number": foreign(tolerance=1e-2),
    "tolerance is of another dtype": foreign(tolerance={"bf16": 1e-2}),
    "tolerance raises": foreign(tolerance=property(raising(KeyError("bf16")))),
    "needs_probe is a string": foreign(needs_probe="yes"),
}


@pytest.mark.parametrize("broken", QUESTIONS.values(), ids=QUESTIONS.keys())
def test_a_question_that_fails_is_a_reason(broken: type[Backend], call: Call) -> None:
    with ranked(broken, Honest):
        with pytest.warns(MoEDispatchWarning, match="'foreign'.*'honest' runs instead"):
            assert is_right(call)
        candidate = explain(*call).candidates[0]
        assert candidate.choice.backend == "foreign"
        assert all(len(reason) > 1 for reason in candidate.against), "a text's letters are no reasons"
        assert candidate.against
        statuses = get_dispatcher("cpu").planner.statuses()  # what doctor prints
        assert any(status.name == "foreign" for status in statuses)
        with pytest.raises((BackendUnavailableError, BackendUnsupportedError), match="foreign"):
            moe_forward(*call, backend="foreign")


@pytest.mark.parametrize("method", ["workspace_bytes", "deterministic", "quantizes_activations"])
def test_an_estimate_that_fails_is_replaced(method: str) -> None:
    broken = foreign(**{method: raising(KeyError("sm"))})
    with registered(broken):
        backend = make_backend("foreign", Machine.inspect("cpu")).require()
        problem = MoEProblem(M=2, K=8, N=8, E=2, topk=1, dtype="fp32", act_dtype="fp32", device="cpu", capability=None)
        assert backend.workspace_bytes(problem, BackendConfig()) == 2 * (16 + 8 + 8) * 4
        assert backend.deterministic(BackendConfig()) is (method != "deterministic")
        assert backend.quantizes_activations(problem)


@pytest.mark.parametrize(
    "code",
    ["import sys; sys.exit(3)", "raise SystemExit", "raise KeyError('x')", "1 +", "raise BaseException('panic')"],
)
def test_a_module_that_ends_at_import(code: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ends_at_import.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with registered(ends="ends_at_import:Anything"), ranked("ends", Honest):
        with pytest.warns(MoEDispatchWarning, match=r"'ends'.*does not import.*'honest' runs instead"):
            assert is_right(call)
        assert "does not import" in explain(*call).candidates[0].against[0]
        status = next(each for each in get_dispatcher("cpu").planner.statuses() if each.name == "ends")
        assert not status.available
        assert "does not import" in status.reasons[0]
        with pytest.raises(BackendUnavailableError, match="does not import"):
            moe_forward(*call, backend="ends")


def test_ctrl_c_in_a_task_is_not_caught(call: Call) -> None:
    """Which comes out in a group with what ended the other tasks."""
    interrupted = BaseExceptionGroup("two tasks", [ValueError(), BaseExceptionGroup("inner", [KeyboardInterrupt()])])
    with ranked(foreign(run=raising(interrupted), needs_probe=False), Honest), pytest.raises(BaseExceptionGroup):
        moe_forward(*call)


def test_ctrl_c_is_not_caught(call: Call) -> None:
    with ranked(foreign(further_reasons=raising(KeyboardInterrupt())), Honest), pytest.raises(KeyboardInterrupt):
        moe_forward(*call)
    with ranked(foreign(run=raising(KeyboardInterrupt())), Honest), pytest.raises(KeyboardInterrupt):
        moe_forward(*call)


class Server:
    """A program that ends itself when it is asked to, in the ways that programs do."""

    def stop(self, number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        raise SystemExit(7)

    def __call__(self, *_: object) -> None:
        raise SystemExit(7)


HANDLERS = {
    "a method": Server().stop,
    "an object": Server(),
    "a function of a library": functools.partial(lambda status, *_: sys.exit(status), 7),
}
MOMENTS = ("run", "default_config", "further_reasons", "__init__")


@pytest.mark.parametrize("method", MOMENTS)
@pytest.mark.parametrize("handler", HANDLERS.values(), ids=HANDLERS.keys())
def test_a_signal_ends_the_program_in_the_middle_of_a_backend(
    handler: Callable[..., None], method: str, call: Call
) -> None:
    """It is not the backend's own `sys.exit`, after which the program would live on."""

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return getattr(Honest, method)(*arguments)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with ranked(foreign(**{method: interrupted}), Honest):
            with pytest.raises(SystemExit, match="7"):
                moe_forward(*call)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            assert is_right(call)
            assert ran() == {"foreign": 1, "reference": 1}, (
                "it was not to blame; the reference is what it is compared with"
            )
    finally:
        signal.signal(signal.SIGUSR1, before)


class PanicException(BaseException):
    """As an extension in Rust raises; there is one such class in each extension."""


@pytest.mark.parametrize(
    "error", [SystemExit(1), PanicException("index"), UnprintableError(), AssertionError()], ids=repr
)
@pytest.mark.parametrize("needs_probe", [False, True])
def test_a_run_may_raise_anything(error: BaseException, needs_probe: bool, call: Call) -> None:
    failing = foreign(run=raising(error), needs_probe=needs_probe)
    says = pytest.warns(MoEDispatchWarning, match=r"'foreign' failed.*'honest' runs instead")
    with ranked(failing, Honest), says:
        assert is_right(call)


@pytest.mark.parametrize(
    ("error", "says"), [(KeyError(6), "KeyError: 6"), (InvalidInputError("the table is gone"), "the table is gone")]
)
def test_a_policy_that_fails_is_passed_over(
    error: Exception, says: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Policy):
        name = "failing"

        def rank(self, problem: MoEProblem) -> tuple[Choice, ...]:
            raise error

        def notes(self) -> tuple[str, ...]:
            raise SystemExit

    monkeypatch.setenv("MOE_DISPATCH_POLICY", "failing,fixed")
    settings.cache_clear()
    with registered_policy(Failing), ranked(Honest):
        with pytest.warns(MoEDispatchWarning, match=f"policy 'failing' is passed over: {says}"):
            assert is_right(call)
        with pytest.warns(MoEDispatchWarning, match="policy 'failing' is passed over: SystemExit"):
            notes = explain(*call).notes
        assert sum("'failing' is passed over" in note for note in notes) == 2


def tell_nothing(M: int) -> tuple[str, float]:
    raise ZeroDivisionError(f"at M={M}")


UNFIT = {
    "no choice": ("reference",),
    "no name": (Choice(5, "because"),),  # type: ignore[arg-type]
    "a list for a name": (Choice(["reference"], "because"),),  # type: ignore[arg-type]
    "no reason": (Choice("honest", None),),  # type: ignore[arg-type]
    "a number for a configuration": (Choice("honest", "because", 5),),  # type: ignore[arg-type]
    "a list in a configuration": (Choice("honest", "because", {"x": []}),),  # type: ignore[dict-item]
    "a text for a time": (Choice("honest", "because", None, "1 µs"),),  # type: ignore[arg-type]
    "a number for a name, its reason told later": (Choice.between((1, 64), 8, 5, None, "", tell_nothing),),  # type: ignore[arg-type]
    "nothing that can be listed": 5,
}


@pytest.mark.parametrize("answer", UNFIT.values(), ids=UNFIT.keys())
def test_a_ranking_that_is_none_is_passed_over(answer: Any, call: Call) -> None:
    with ranked(Honest, ranking=answer):
        with pytest.warns(MoEDispatchWarning, match="policy 'fixed' is passed over: TypeError"):
            assert is_right(call)
        assert "'fixed' is passed over" in str(explain(*call))


def test_a_reason_that_cannot_be_told_ends_no_call(call: Call, caplog: pytest.LogCaptureFixture) -> None:
    M = call[0].shape[0]
    choice = Choice.between((0, M + 2), M, "honest", None, "fixed", tell_nothing)
    with ranked(Honest, ranking=(choice,)), caplog.at_level("INFO", "moe_dispatch"):
        assert is_right(call)
        other = choice.also_at(M + 1)
        assert other is not None
        assert (other.us, other.reason) == (None, f"no reason: ZeroDivisionError: at M={M + 1}")
        assert f"no reason: ZeroDivisionError: at M={M}" in str(explain(*call))


class Unhashable(BackendConfig):
    sizes: list[int] = pydantic.Field(default_factory=list)


class Validating(BackendConfig):
    """Raises what pydantic does not turn into an error of its own."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        raise KeyError("sizes")


def test_a_configuration_that_cannot_be_hashed_is_a_reason(call: Call) -> None:
    """Plans are kept by configuration."""
    says = pytest.warns(MoEDispatchWarning, match=r"'foreign'.*unhashable.*'honest' runs instead")
    with ranked(foreign(config_type=Unhashable), Honest), says:
        assert is_right(call)


class Strict(BackendConfig):
    x: pydantic.StrictBool = False


@pytest.mark.parametrize(
    ("kind", "says"), [(Validating, "cannot read the configuration"), (Strict, "valid boolean")], ids=str
)
def test_a_configuration_that_its_type_refuses_is_a_reason(kind: type[BackendConfig], says: str, call: Call) -> None:
    """Also after an equal one of another type was accepted, as 1 equals True."""
    ranking = *(Choice("foreign", "because", {"x": x}) for x in (True, 1)), Choice("honest", "because")
    failing = foreign(config_type=kind, default_config=lambda *_: kind.model_construct())
    with ranked(failing, Honest, ranking=ranking):
        assert is_right(call)
        assert says in explain(*call).candidates[1].against[0]


def test_damaged_metadata_cost_their_package_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, entries in (("a_damaged", "honest tests"), ("healthy", "honest = tests.support.fakes:Honest")):
        info = tmp_path / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\n{entries}\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("backend", Backend, {}, group=ENTRY_POINT_GROUP)  # type: ignore[type-abstract]
    assert "honest" in registry.names()
    assert registry.load("honest") is Honest


# What a backend does to the state of torch.

CHANGES: dict[str, Callable[[], object]] = {
    "whether gradients are recorded": lambda: torch.set_grad_enabled(not torch.is_grad_enabled()),
    "the default device": lambda: torch.set_default_device("meta"),
    "whether autocast is enabled": lambda: torch.set_autocast_enabled("cpu", True),
}


@pytest.fixture
def settings_of_torch() -> Iterator[None]:
    yield
    torch.set_default_device(None)
    torch.set_autocast_enabled("cpu", False)


@pytest.mark.usefixtures("settings_of_torch")
@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("needs_probe", [False, True])
@pytest.mark.parametrize("what", CHANGES)
def test_what_it_changes_of_torch_is_undone(what: str, needs_probe: bool, raises: bool, call: Call) -> None:
    def run(self: Foreign, *arguments: Any) -> Tensor:
        out = Foreign.run(self, *arguments)
        CHANGES[what]()
        if raises:
            raise RuntimeError("no such kernel")
        return out

    def now() -> tuple[object, ...]:
        return torch.is_grad_enabled(), torch.get_default_device(), torch.is_autocast_enabled("cpu")

    says = "no such kernel" if raises else f"it changed {what}"
    with ranked(foreign(run=run, needs_probe=needs_probe), Honest):
        before = now()
        with pytest.warns(MoEDispatchWarning, match=f"{says}.*'honest' runs instead"):
            moe_forward(*call)
        assert now() == before
        assert ran() == {"honest": 1}


def test_a_default_device_of_a_with_statement_stays(call: Call) -> None:
    with ranked(foreign(run=lambda *_: torch.set_default_device("cpu")), Honest):
        with torch.device("meta"):
            with pytest.warns(MoEDispatchWarning, match="'honest' runs instead"):
                moe_forward(*call)
            assert torch.get_default_device().type == "meta"
        assert torch.get_default_device().type == "cpu"


# What a backend returns.


def returning(spoil: Spoil, **members: Any) -> type[Backend]:
    """A foreign backend that returns what a function makes of the right answer and of the inputs."""
    return foreign(run=misbehaviour.returning(spoil), **members)


class IgnoringSentinels(Foreign):
    """Takes an id outside 0…E-1 for the last expert."""

    def run(self, *arguments: Any) -> Tensor:
        hidden, experts, weights, ids, config = arguments
        return super().run(hidden, experts, weights, ids.clamp(0, experts.E - 1), config)


class MultiplyingSentinels(Foreign):
    """Multiplies what an id outside 0…E-1 adds by zero, which leaves NaN where its weight is NaN."""

    def run(self, *arguments: Any) -> Tensor:
        _, _, weights, ids, _ = arguments
        return super().run(*arguments).add(((ids < 0) * weights).sum(dim=1, keepdim=True) * 0)


class CountingOnce(Foreign):
    """Counts the same expert twice in a row once."""

    def run(self, *arguments: Any) -> Tensor:
        hidden, experts, weights, ids, config = arguments
        ids = ids.clone()
        ids[:, 1:][ids[:, 1:] == ids[:, :1]] = -1
        return super().run(hidden, experts, weights, ids, config)


# What a backend makes of the right answer, and what is said of it.
SPOILT = {
    "None": "NoneType",
    "a list": "list",
    "fewer columns": r"\] on cpu for hidden_states of .* must be the same",
    "double": "float64",
    "the meta device": "meta",
    "hidden_states": "memory of hidden_states",
    "part of a weight": "memory of down",
    "strided": "not contiguous",
}
PROBED = {
    kind: (returning((misbehaviour.SEEN | misbehaviour.PROBED)[kind]), says)
    for kind, says in {
        **SPOILT,
        **{f"written to {name}": "wrote to its inputs" for name in ("hidden_states", "topk_ids", "down")},
        "NaN": "relative error",
        "one buffer": "same memory for two calls",
    }.items()
} | {
    "inference mode": (foreign(run=torch.inference_mode()(Foreign.run)), "inference mode"),
    "a gradient": (returning(lambda out, _: out.requires_grad_()), "requires a gradient"),
    "foreign ids": (IgnoringSentinels, "relative error"),
    "NaN beside a foreign id": (MultiplyingSentinels, "relative error"),
    "duplicates": (CountingOnce, "relative error"),
}


@pytest.mark.parametrize(("wrong", "says"), PROBED.values(), ids=PROBED.keys())
def test_the_probe_finds_it(wrong: type[Backend], says: str, call: Call) -> None:
    with ranked(wrong, Honest):
        with pytest.warns(MoEDispatchWarning, match=f"probe was wrong.*{says}.*'honest' runs instead"):
            assert is_right(call)
        with pytest.raises(BackendUnavailableError, match=says):
            moe_forward(*call, backend="foreign")


@pytest.mark.parametrize("kind", [kind for kind in SPOILT if kind != "part of a weight"])
def test_a_first_run_finds_what_its_probe_did_not_show(kind: str, call: Call) -> None:
    """As where a fault depends on the number of tokens. No layer's values are looked at, so that nothing waits."""
    wrong, says = PROBED[kind]
    unprobed = cast("type[Backend]", type("Unprobed", (cast("type", wrong),), {"needs_probe": False}))
    warned = pytest.warns(MoEDispatchWarning, match=f"'foreign' failed.*{says}.*'honest' runs instead")
    with ranked(unprobed, Honest), warned:
        assert is_right(call)


@pytest.mark.parametrize("place", [0, 2, 3], ids=["hidden_states", "topk_weights", "topk_ids"])
@pytest.mark.parametrize("raises", [False, True])
def test_what_a_first_run_writes_to_its_inputs_is_undone(place: int, raises: bool, call: Call) -> None:
    """As a backend may that is right in its probe, and writes at other numbers of tokens."""

    def write(out: Tensor, inputs: Inputs) -> Tensor:
        cast("Tensor", inputs[place]).zero_()
        if raises:
            raise RuntimeError("wrote to and failed")
        return out

    before = [tensor.clone() for tensor in call if isinstance(tensor, Tensor)]
    warned = pytest.warns(MoEDispatchWarning, match="'foreign' failed.*wrote to.*'honest' runs instead")
    with ranked(returning(write, needs_probe=False), Honest), warned:
        assert is_right(call)
    assert all(map(torch.equal, before, (tensor for tensor in call if isinstance(tensor, Tensor))))


def test_a_first_run_takes_any_stride_of_a_dimension_of_one(call: Call) -> None:
    """Torch counts such a tensor as contiguous, and no view of its bytes can be had."""
    hidden, experts, weights, ids = call
    columns = (hidden, experts, weights[:, :1].T.contiguous().T, ids[:, :1].T.contiguous().T)
    with ranked(Foreign):
        assert is_right(columns)
        assert ran()["foreign"] == 1


def test_a_fast_path_is_looked_at_before_it_is_used(call: Call) -> None:
    def fast_path(self: Backend, inputs: Inputs, config: BackendConfig) -> Run:
        return lambda hidden_states, *_: hidden_states

    with ranked(foreign(fast_path=fast_path)):
        for _ in range(FAST_PATH_CALLS + 2):
            assert is_right(call)


# A backend that calls moe_forward.


class Calling(Foreign):
    """Calls moe_forward, naming no backend: the policy chooses this one again."""

    def run(self, *arguments: Any) -> Tensor:
        return moe_forward(*arguments[:4])


class CallingFromAThread(Foreign):
    """The same from a thread of its own, which knows nothing of the call that it belongs to."""

    named: ClassVar[str | None] = None

    def run(self, *arguments: Any) -> Tensor:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(moe_forward, *arguments[:4], backend=self.named).result()


class Wrapping(CallingFromAThread):
    """Runs another backend by name, from a thread."""

    named = "honest"


@pytest.mark.parametrize("needs_probe", [False, True])
@pytest.mark.parametrize("calling", [Calling, CallingFromAThread])
@pytest.mark.filterwarnings("ignore::moe_dispatch.MoEDispatchWarning")
def test_one_that_calls_itself_is_stopped(
    calling: type[Backend], needs_probe: bool, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_calls, "MAX_CONCURRENT", 4)  # threads that may wait for one another before it is
    with ranked(cast("type[Backend]", type("Calling", (calling,), {"needs_probe": needs_probe})), Honest):
        for _ in range(3):
            assert is_right(call)


@pytest.mark.parametrize("needs_probe", [False, True])
def test_one_that_wraps_another_runs(needs_probe: bool, call: Call) -> None:
    with ranked(cast("type[Backend]", type("Wrapping", (Wrapping,), {"needs_probe": needs_probe})), Honest):
        assert is_right(call)
        assert ran()["foreign"] == 1


def test_no_lock_is_held_while_foreign_code_runs(call: Call) -> None:
    """Each of these waits for another thread that makes a call."""

    def calling_from_a_thread(answer: Any) -> Callable[..., Any]:
        def method(*_: object) -> Any:
            thread = threading.Thread(target=lambda: moe_forward(*make_call(3), backend="reference"))
            thread.start()
            thread.join()
            return answer

        return method

    for name, answer in (("unavailable_reasons", ()), ("further_reasons", ()), ("configs", (BackendConfig(),))):
        with ranked(foreign(**{name: calling_from_a_thread(answer)})):
            assert is_right(call)


@FORKS
def test_a_first_call_forks_safely() -> None:
    """A fork while another thread is in its first call, and holds a lock: the child would wait for ever for it."""
    held, lock = threading.Event(), threading.Lock()

    class Slow(Honest):
        """Holds a lock when it is asked first, as the import of a library does."""

        name = "slow"

        def unavailable_reasons(self) -> tuple[str, ...]:
            with lock:
                held.set()
                time.sleep(0.5)
            return ()

    with ranked(Slow):
        thread = threading.Thread(target=lambda: moe_forward(*make_call(6)))
        thread.start()
        assert held.wait(30)
        assert exit_code(start_child(lambda: moe_forward(*make_call(2)))) == 0
        thread.join()
