"""`moe_forward(…, out=…)`: written once where the caller wants it, or refused by name."""

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_dispatch import InvalidInputError, MoEDispatchWarning, moe_forward, stats, warm_up
from moe_dispatch.backend import BackendConfig, Inputs, Run
from moe_dispatch.dispatch.dispatcher import FAST_PATH_CALLS
from moe_dispatch.dispatch.process import get_dispatcher
from tests.core.test_bad_input import distributed, masked
from tests.core.test_dispatcher import Call, expected, is_right, make_call, ran
from tests.support.fakes import Greedy, Honest, Raising, ranked

pytestmark = pytest.mark.usefixtures("fixed_policy", "no_grad")


def memory(call: Call) -> Tensor:
    return torch.full_like(call[0], torch.nan)


class Writing(Honest):
    """Writes where it is told to, and says by `into` that it did."""

    name = "writing"
    into = 0

    def run_into(
        self, hidden_states: Tensor, experts: Any, topk_weights: Tensor, topk_ids: Tensor, config: BackendConfig,
        out: Tensor,
    ) -> Tensor:  # fmt: skip
        type(self).into += 1
        return out.copy_(self.run(hidden_states, experts, topk_weights, topk_ids, config))


def test_a_backend_that_can_writes_there(call: Call) -> None:
    Writing.into = 0
    with ranked(Writing):
        for _ in range(3):
            out = memory(call)
            assert moe_forward(*call, out=out) is out
            assert torch.equal(out, expected(call))
        assert Writing.into == 3
        assert is_right(call)
        assert Writing.into == 3


@pytest.mark.parametrize("backend", [Honest, "torch_grouped", "reference"])
def test_the_result_of_any_other_is_copied(backend: Any, call: Call) -> None:
    with ranked(backend):
        out = memory(call)
        assert moe_forward(*call, out=out) is out
        assert torch.equal(out, moe_forward(*call))


def test_only_the_given_rows_of_a_larger_buffer_are_written(call: Call) -> None:
    buffer = torch.full((9, call[0].shape[1]), torch.nan)
    with ranked(Honest):
        moe_forward(*call, out=buffer[2:8])
        assert torch.equal(buffer[2:8], expected(call))
        assert buffer[:2].isnan().all()
        assert buffer[8:].isnan().all()


def test_a_fast_path_is_copied(call: Call) -> None:
    class Preparing(Honest):
        name = "preparing"

        def fast_path(self, inputs: Inputs, config: BackendConfig) -> Run:
            return lambda hidden_states, *_: torch.full_like(hidden_states, 7.0)

    with ranked(Preparing):
        for _ in range(FAST_PATH_CALLS):
            out = moe_forward(*call, out=memory(call))
            assert torch.equal(out, expected(call))
        out = memory(call)
        assert moe_forward(*call, out=out) is out
        assert (out == 7.0).all()


def test_no_tokens_write_nothing() -> None:
    hidden, experts, weights, ids = make_call(3)
    out = torch.empty(0, hidden.shape[1])
    assert moe_forward(hidden[:0], experts, weights[:0], ids[:0], out=out) is out


def test_warm_up_proves_such_calls(call: Call) -> None:
    with ranked(Writing):
        warm_up(call[1], 2, [6], into_out=True)
        (plan,) = get_dispatcher("cpu")._plans.values()
        assert plan.into
        assert plan.proven
        moe_forward(*call, out=memory(call))
        assert len(get_dispatcher("cpu")._plans) == 1


def test_a_backend_after_a_failure_writes_there(call: Call) -> None:
    with ranked(Raising, Honest):
        out = memory(call)
        with pytest.warns(MoEDispatchWarning, match="'honest' runs instead"):
            assert moe_forward(*call, out=out) is out
        assert torch.equal(out, expected(call))


def test_a_call_split_for_lack_of_memory_writes_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Greedy, "most_tokens", 3)
    monkeypatch.setattr(Greedy, "workspace_bytes", lambda *_: 0)  # none needs less
    call = make_call(11)
    with ranked(Greedy):
        out = memory(call)
        with pytest.warns(MoEDispatchWarning, match="split along M into 5 and 6"):
            assert moe_forward(*call, out=out) is out
        assert torch.allclose(out, expected(call), atol=1e-6)


@pytest.mark.parametrize("needs_probe", [False, True])
def test_a_backend_that_returns_other_memory_is_replaced(needs_probe: bool, call: Call) -> None:
    class Elsewhere(Honest):
        name = "elsewhere"

        def run_into(self, *arguments: Any) -> Tensor:
            return self.run(*arguments[:-1])

    Elsewhere.needs_probe = needs_probe
    with ranked(Elsewhere, Honest):
        out = memory(call)
        with pytest.warns(MoEDispatchWarning, match="another tensor than the one.*'honest' runs instead"):
            assert moe_forward(*call, out=out) is out
        assert torch.equal(out, expected(call))


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda h: torch.empty(7, 64), r"\[6, 64\].*got \[7, 64\]"),
        (lambda h: torch.empty(6, 64, dtype=torch.float64), "float64"),
        (lambda h: torch.empty(6, 64, device="meta"), "meta"),
        (lambda h: torch.empty(64, 6).T, "contiguous"),
        (lambda h: torch.empty(6, 128)[:, ::2], "contiguous"),
        (lambda h: torch.empty(6, 64).to_sparse(), "sparse"),
        (lambda h: distributed(6, 64), "to_local"),
        (lambda h: masked(torch.randn(6, 64)), "MaskedTensor"),
        (lambda h: [1.0], "list"),
        (lambda h: h, "shares memory with hidden_states"),
        (lambda h: h.detach(), "shares memory with hidden_states"),
        (lambda h: torch.empty(6, 64, requires_grad=True), "gradient"),
        (torch.inference_mode()(torch.empty_like), "inference mode"),
    ],
)
def test_memory_that_will_not_do_is_refused(make: Any, says: str, known: bool, call: Call) -> None:
    with ranked(Honest):
        if known:
            moe_forward(*call, out=memory(call))
        before = stats()
        with pytest.raises(InvalidInputError, match=says):
            moe_forward(*call, out=make(call[0]))
        assert stats() == before


def test_memory_that_overlaps_at_a_later_call_is_refused(call: Call) -> None:
    """As views of one workspace may."""
    workspace = torch.zeros(12, 64)
    workspace[:6] = call[0]
    with ranked(Honest):
        moe_forward(workspace[:6], *call[1:], out=workspace[6:])
        assert torch.equal(workspace[6:], expected(call))
        with pytest.raises(InvalidInputError, match="shares memory with hidden_states"):
            moe_forward(workspace[:6], *call[1:], out=workspace[5:11])


@pytest.mark.parametrize("known", [False, True])
def test_memory_of_the_layers_weights_is_refused(known: bool, call: Call) -> None:
    with ranked(Honest):
        if known:
            moe_forward(*call, out=memory(call))
        with pytest.raises(InvalidInputError, match="shares memory with gate_up"):
            moe_forward(*call, out=call[1].gate_up.view(-1, 64)[:6])


def test_memory_made_in_inference_mode_is_written_to_there(call: Call) -> None:
    with ranked(Honest), torch.inference_mode():
        out = memory(call)
        assert torch.equal(moe_forward(*call, out=out), expected(call))


def test_autograd_sees_that_what_it_saved_was_written_over(call: Call) -> None:
    class LikeAKernel(Writing):
        """Writes without torch's knowledge."""

        name = "like_a_kernel"

        def run_into(self, *arguments: Any) -> Tensor:
            *inputs, out = arguments
            ctypes.memmove(out.data_ptr(), self.run(*inputs).data_ptr(), out.nbytes)
            return out  # type: ignore[no-any-return]

    out = memory(call)
    with ranked(LikeAKernel):
        for _ in range(FAST_PATH_CALLS):
            factor = torch.ones(64, requires_grad=True)
            with torch.enable_grad():
                product = (out * factor).sum()
            moe_forward(*call, out=out)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                product.backward()


def test_a_recorded_call_is_refused(call: Call) -> None:
    with torch.enable_grad(), pytest.raises(InvalidInputError, match=r"gradient.*no_grad"):
        moe_forward(call[0].clone().requires_grad_(), *call[1:], out=memory(call))


def test_a_call_under_vmap_is_refused(call: Call) -> None:
    stacked = torch.stack([call[0], call[0]])
    with ranked(Honest), pytest.raises(InvalidInputError, match=r"out.*torch.func"):
        torch.func.vmap(lambda h: moe_forward(h, *call[1:], out=memory(call)))(stacked)


def test_compiles_as_a_full_graph(call: Call) -> None:
    hidden, experts, weights, ids = call
    compiled = torch.compile(
        lambda h, w, i, out: moe_forward(h, experts, w, i, out=out), fullgraph=True, backend="aot_eager"
    )
    with ranked(Writing):
        out = memory(call)
        result = compiled(hidden, weights, ids, out)
        assert result.data_ptr() == out.data_ptr()
        assert torch.equal(out, expected(call))
        assert ran()["writing"] == 1


def test_memory_made_in_a_compiled_graph(call: Call) -> None:
    hidden, experts, weights, ids = call

    def layer(h: Tensor, w: Tensor, i: Tensor) -> Tensor:
        return moe_forward(h * 2, experts, w, i, out=torch.empty_like(h)) + 1

    with ranked(Honest):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(hidden, weights, ids), expected((hidden * 2, experts, weights, ids)) + 1)


def test_a_recorded_compiled_call_is_refused(call: Call) -> None:
    compiled = torch.compile(lambda h, out: moe_forward(h, *call[1:], out=out), backend="aot_eager")
    with torch.enable_grad(), pytest.raises(InvalidInputError, match="gradient"):
        compiled(call[0].clone().requires_grad_(), memory(call))


def test_fake_tensors_are_checked_and_returned(call: Call) -> None:
    hidden, experts, weights, ids = call
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(tensor) for tensor in (hidden, weights, ids, memory(call))]
        assert moe_forward(fake[0], experts, *fake[1:3], out=fake[3]) is fake[3]
        with pytest.raises(InvalidInputError, match=r"\[5, 64\]"):
            moe_forward(fake[0], experts, *fake[1:3], out=fake[3][:5])


@pytest.mark.parametrize("test", ["test_schema", "test_faketensor"])
def test_the_operators_keep_what_their_schemas_say(test: str, call: Call) -> None:
    hidden, experts, weights, ids = call
    tensors = (hidden, weights, ids, experts.gate_up, experts.down, None, None, None, None)
    arguments, operators = (*tensors, "silu", False, None, ""), torch.ops.moe_dispatch
    with ranked(Honest):
        torch.library.opcheck(operators.forward.default, arguments, test_utils=test)
        torch.library.opcheck(operators.forward_into.default, (*arguments, memory(call)), test_utils=test)
