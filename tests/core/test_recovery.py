"""Recovering: out of memory tries everything, and a failure that is the caller's is booked on no backend."""

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from moe_dispatch import (
    DeviceLostError,
    InvalidInputError,
    MoEDispatchWarning,
    MoEProblem,
    NoBackendError,
    moe_forward,
    stats,
)
from moe_dispatch.backend import BackendConfig
from moe_dispatch.backends.reference import ReferenceBackend
from moe_dispatch.dispatch.settled_plans import SETTLING_CALLS
from moe_dispatch.problem import DType
from moe_dispatch.settings import settings
from moe_dispatch.workloads import make_experts
from tests.core.test_dispatcher import Call, barred, expected, is_right, lose_context, make_call, ran
from tests.support.fakes import Greedy, Honest, Raising, ranked
from tests.support.stub_kernels import LAYER

pytestmark = pytest.mark.usefixtures("fixed_policy", "no_grad")


class Hungry(Greedy):
    """Declares no workspace and runs out of memory all the same."""

    name = "hungry"

    def workspace_bytes(self, problem: MoEProblem, config: BackendConfig) -> int:
        return 0


def test_out_of_memory_takes_one_token_to_every_backend() -> None:
    """In the policy's order, as a token cannot be split. A failure on the way is booked as such."""
    call = make_call(1)
    with ranked(Hungry, Greedy, Raising, Honest):
        with pytest.warns(MoEDispatchWarning) as warned:
            assert is_right(call)
        texts = [str(warning.message) for warning in warned]
        assert len(texts) == 3
        assert all("'honest'" in text and "runs instead" in text for text in texts)
        assert all(any(f"{name!r} ran out of memory" in text for text in texts) for name in ("hungry", "greedy"))
        assert any("'raising' failed" in text for text in texts)
        assert ran()["honest"] == 1
        assert stats()["hungry"]["fell_back"] == 1
        assert barred() == ["raising"], "memory may be there later"


def test_out_of_memory_takes_one_token_to_the_reference_last() -> None:
    call = make_call(1)
    with ranked(Hungry), pytest.warns(MoEDispatchWarning, match="'hungry' ran out of memory.*'reference' runs"):
        assert is_right(call)


def test_a_message_that_is_no_text_is_recorded_spelt_out(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    def run(*_: object) -> Tensor:
        raise RuntimeError("cannot open /opt/caf\udce9.so")  # as Python spells a file name that is not UTF-8

    monkeypatch.setattr(Raising, "run", run)
    with ranked(Raising, Honest), pytest.warns(MoEDispatchWarning, match=r"cannot open /opt/caf\\udce9\.so"):
        assert torch.equal(moe_forward(*call), expected(call))
    assert barred() == ["raising"]


def test_a_split_call_is_differentiated_as_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In forward mode its halves run on the reference too: a kernel's output has no tangent."""

    def run(self: ReferenceBackend, hidden_states: Tensor, *others: Any) -> Tensor:
        if hidden_states.shape[0] > 3:
            raise torch.OutOfMemoryError("tried to allocate")
        return whole(self, hidden_states, *others)

    hidden, experts, weights, ids = make_call(6)
    whole = ReferenceBackend.run
    monkeypatch.setattr(ReferenceBackend, "run", run)
    with ranked("torch_grouped"), forward_ad.dual_level():
        dual = forward_ad.make_dual(hidden, hidden)
        with pytest.warns(MoEDispatchWarning, match="split along M into 3 and 3"):
            moe_forward(dual, experts, weights, ids)
    assert ran() == {"reference": 2}


def mapped_over_tokens(call: Call, **options: Any) -> Tensor:
    """A layer under vmap, as ensembles and per-sample gradients write it."""
    stacked = torch.stack([call[0], -call[0]])
    out: Tensor = torch.func.vmap(lambda hidden: moe_forward(hidden, *call[1:], **options))(stacked)
    return out


@pytest.mark.parametrize("known", [False, True])
def test_vmap_over_ids_bars_nothing(known: bool, call: Call) -> None:
    with ranked("torch_grouped"):
        if known:
            moe_forward(*call)
        with pytest.raises(InvalidInputError, match="vmap, topk_ids cannot be mapped"):
            torch.func.vmap(lambda ids: moe_forward(*call[:3], ids))(torch.stack([call[3], call[3].flip(0)]))
        assert not barred()
        before = stats().get("torch_grouped", {}).get("ran", 0)
        assert torch.allclose(moe_forward(*call), expected(call), atol=1e-5)
        assert stats()["torch_grouped"]["ran"] == before + 1


@pytest.mark.parametrize("known", [False, True])
def test_vmap_over_tokens_takes_the_reference(known: bool, call: Call) -> None:
    hidden, *rest = call
    with ranked("torch_grouped"):
        if known:
            moe_forward(*call)
        out = mapped_over_tokens(call)
        assert torch.allclose(out[0], expected(call), atol=1e-5)
        assert torch.allclose(out[1], expected((-hidden, *rest)), atol=1e-5)  # type: ignore[arg-type]  # a Call
        assert not barred()


def test_vmap_with_a_backend_by_name_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"'torch_grouped'.*torch.func"):
        mapped_over_tokens(make_call(6), backend="torch_grouped")


def test_what_the_reference_cannot_run_either_is_bad_input(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    def fail(*_: Any) -> Tensor:
        raise IndexError("out of range")

    with ranked(Raising):
        monkeypatch.setattr("moe_dispatch.backends.reference.ReferenceBackend.run", fail)
        with pytest.raises(InvalidInputError, match=r"even 'reference'.*out of range"):
            moe_forward(*call)
        assert not barred()
        assert not ran()


def test_a_lost_context_is_not_the_callers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_dispatch.backends.reference.ReferenceBackend.run", lose_context)
    with ranked(Honest), pytest.raises(DeviceLostError, match="Restart the process"):
        mapped_over_tokens(make_call(6))


def test_without_a_last_resort_the_reasons_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_DISPATCH_DISABLE", "reference")
    settings.cache_clear()
    with ranked(Raising), pytest.raises(NoBackendError, match="RuntimeError: the launch failed"):
        moe_forward(*make_call(6))


def test_weights_that_change_under_a_call_are_the_callers(call: Call) -> None:
    """Freed by another thread between the check and the run."""

    class Late(Honest):
        name = "late"

        def run(self, hidden_states: Tensor, experts: Any, *rest: Any) -> Tensor:
            experts.down.untyped_storage().resize_(0)
            raise RuntimeError("setStorage: out of bounds")

    with ranked(Late, Honest), pytest.raises(InvalidInputError, match=r"changed since.*freed"):
        moe_forward(*call)
    assert not barred()


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("calls", [1, SETTLING_CALLS + 1])
@pytest.mark.parametrize("name", ["gate_up_scale", "down_scale", "gate_up_bias", "down_bias"])
def test_scales_and_biases_that_change_alone_are_refused(name: str, calls: int, recorded: bool) -> None:
    """A kernel, which is given addresses, would read past them."""

    class Unaware(Honest):
        name = "unaware"

        def run(self, hidden_states: Tensor, *_: Any) -> Tensor:
            return torch.zeros_like(hidden_states)

    experts = make_experts(dataclasses.replace(LAYER, bias=True), "fp8", "cpu", act_dtype="fp32")
    tensor = getattr(experts, name)
    hidden, _, *routing = make_call(6)
    with ranked(Unaware), torch.set_grad_enabled(recorded):
        for _ in range(calls):
            moe_forward(hidden.requires_grad_(recorded), experts, *routing)
        tensor.data = tensor.data.clone()
        assert not moe_forward(hidden, experts, *routing).any(), "other memory of the same kind will do"
        before = tensor.data
        tensor.data = tensor.data[:2].clone()
        with pytest.raises(InvalidInputError, match=f"changed since.*{name}"):
            moe_forward(hidden, experts, *routing)
        tensor.data = before
        assert not moe_forward(hidden, experts, *routing).any()
        tensor.untyped_storage().resize_(0)
        with pytest.raises(InvalidInputError, match=f"changed since.*{name}.*freed"):
            moe_forward(hidden, experts, *routing)
        assert not barred()


def test_weights_in_other_memory_are_taken(call: Call) -> None:
    """As RL weight sync and sleep modes do."""
    other = make_call(7)[1]
    with ranked("torch_grouped"):
        moe_forward(*call)
        call[1].gate_up.data, call[1].down.data = other.gate_up.data.clone(), other.down.data.clone()
        assert torch.allclose(moe_forward(*call), expected((call[0], other, *call[2:])), atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "fp8"])
def test_the_memory_of_replaced_weights_is_freed_at_once(dtype: DType) -> None:
    """Also after a call through torch's operator, which a recorded one is."""
    hidden, _, weights, ids = make_call(6)
    experts = make_experts(LAYER, dtype, "cpu", act_dtype="fp32")
    tensors = [tensor for _, tensor in experts.tensors()]
    with ranked(Honest), torch.enable_grad():
        for _ in range(2):
            out = moe_forward(hidden.requires_grad_(), experts, weights, ids)
            assert torch.allclose(out, expected((hidden, experts, weights, ids)), atol=1e-5)
            torch.autograd.grad(out.sum(), hidden)
            del out
            old = [weakref.ref(tensor.untyped_storage()) for tensor in tensors]
            for tensor in tensors:
                tensor.data = tensor.data.flip(0)
            assert [memory() for memory in old] == [None] * len(old)
