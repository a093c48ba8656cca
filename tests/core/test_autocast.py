"""Under torch.autocast an FP32 layer is computed in autocast's dtype, as torch's linear layers are."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import ExpertWeights, InvalidInputError, MoELayer, explain, moe_forward, stats, warm_up
from moe_dispatch.backend import BackendConfig
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.measure.verify import relative_error
from tests.core.test_gradients import Layer, routing
from tests.support.fakes import Honest, ranked

M, K = 7, 32
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
LAYER = Layer()
LAYERS = (LAYER, Layer("swiglu_oai", bias=True, interleaved=True, transposed=True))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def under(dtype: torch.dtype = torch.bfloat16, *, enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype, enabled=enabled)


def by_hand(layer: Layer, tensors: dict[str, Tensor], hidden: Tensor, *rest: Tensor, dtype: torch.dtype) -> Tensor:
    """What a program would write without autocast: casts of tokens and weights, and one back."""
    cast = {name: tensor if name.endswith("bias") else tensor.to(dtype) for name, tensor in tensors.items()}
    return moe_forward(hidden.to(dtype), layer.wrap(cast), *rest).to(hidden.dtype)


@HALVES
@pytest.mark.parametrize("tokens", [torch.float32, None], ids=["fp32 tokens", "tokens in half precision"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_fp32_layers_are_computed_in_autocasts_dtype(
    layer: Layer, tokens: torch.dtype | None, dtype: torch.dtype, compiled: bool
) -> None:
    """Bit for bit what the casts by hand give, and so are the gradients, which arrive in the tensors' own dtypes."""
    tensors, (weights, ids) = layer.tensors(), routing()
    leaves = [each.requires_grad_() for each in (torch.randn(M, K).to(tokens or dtype), weights, *tensors.values())]
    upstream = torch.randn(M, K, dtype=leaves[0].dtype)
    expected = by_hand(layer, tensors, *leaves[:2], ids, dtype=dtype)
    gradients = torch.autograd.grad(expected, leaves, upstream)

    def call(hidden: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return moe_forward(hidden, layer.wrap(tensors), weights, ids)

    torch._dynamo.reset()  # the cases are of one function, which may be compiled eight times
    run: Any = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    with under(dtype):
        out = run(*leaves[:2], ids)
        with torch.no_grad():
            unrecorded = run(*leaves[:2], ids)
    assert torch.equal(out, expected)
    assert torch.equal(unrecorded, expected)
    exact = moe_forward(leaves[0].float(), layer.wrap(tensors), weights, ids)
    assert 1e-4 < relative_error(exact, out.float()) < (2e-2 if dtype == torch.bfloat16 else 3e-3)
    for leaf, got, right in zip(leaves, torch.autograd.grad(out, leaves, upstream), gradients, strict=True):
        assert got.dtype == leaf.dtype
        assert torch.equal(got, right)


@torch.no_grad()
def test_weights_in_half_precision_are_not_cast() -> None:
    """Tokens take their dtype, whichever autocast asks for. Torch's linear layers would turn BF16 weights into FP16."""
    tensors, call = Layer(dtype=torch.bfloat16).tensors(), routing()
    experts, hidden = LAYER.wrap(tensors), torch.randn(M, K)
    expected = moe_forward(hidden.bfloat16(), experts, *call)
    for dtype in (torch.bfloat16, torch.float16):
        with under(dtype):
            assert torch.equal(moe_forward(hidden.bfloat16(), experts, *call), expected)
            assert torch.equal(moe_forward(hidden, experts, *call), expected.float())


@torch.no_grad()
@pytest.mark.parametrize("form", ["block", "channel", "mxfp4"])
def test_quantised_weights_take_the_tokens_as_they_are(form: Any) -> None:
    experts = ExpertWeights.quantize(torch.randn(5, 64, 32), torch.randn(5, 32, 32), form=form)
    call = (torch.randn(M, K, dtype=torch.float16), experts, *routing())
    expected = moe_forward(*call)
    with under():
        assert torch.equal(moe_forward(*call), expected)


@torch.no_grad()
def test_where_autocast_is_off_nothing_is_cast() -> None:
    """Inside of autocast as outside, on another device's autocast, and with a dtype that layers are not computed in."""
    experts, hidden, call = LAYER.wrap(LAYER.tensors()), torch.randn(M, K), routing()
    expected = moe_forward(hidden, experts, *call)
    with under(), under(enabled=False):
        assert torch.equal(moe_forward(hidden, experts, *call), expected)
        with pytest.raises(InvalidInputError, match="bfloat16 and the experts are fp32"):
            moe_forward(hidden.bfloat16(), experts, *call)
    torch.set_autocast_enabled("cuda", True)
    try:
        assert torch.equal(moe_forward(hidden, experts, *call), expected)
    finally:
        torch.set_autocast_enabled("cuda", False)
    with under():
        torch.set_autocast_dtype("cpu", torch.float32)
        assert torch.equal(moe_forward(hidden, experts, *call), expected)


@pytest.mark.parametrize("change", [Tensor.double, Tensor.int, Tensor.to_sparse, Tensor.tolist])
def test_what_no_call_takes_is_refused_as_without_autocast(change: Callable[[Tensor], Any]) -> None:
    experts, hidden, call = LAYER.wrap(LAYER.tensors()), torch.randn(M, K), routing()
    with under(), pytest.raises(InvalidInputError, match="hidden_states"):
        moe_forward(change(hidden), experts, *call)


def test_weights_of_another_dtype_than_were_wrapped_are_refused() -> None:
    experts, call = LAYER.wrap(LAYER.tensors()), (torch.randn(M, K), *routing())
    experts.gate_up.data = experts.gate_up.double()
    with under(), pytest.raises(InvalidInputError, match="changed since they were wrapped"):
        moe_forward(call[0], experts, *call[1:])


@torch.no_grad()
@HALVES
def test_memory_for_the_output_is_filled_in_its_own_dtype(dtype: torch.dtype) -> None:
    tensors, call = LAYER.tensors(), routing()
    experts = LAYER.wrap(tensors)
    for hidden in (torch.randn(M, K), torch.randn(M, K, dtype=dtype)):
        out = torch.empty_like(hidden)
        with under(dtype):
            assert moe_forward(hidden, experts, *call, out=out) is out
            with pytest.raises(InvalidInputError, match="out shares memory with hidden_states"):
                moe_forward(hidden, experts, *call, out=hidden)
            with torch.enable_grad(), pytest.raises(InvalidInputError, match="gradient is needed"):
                moe_forward(hidden.clone().requires_grad_(), experts, *call, out=out)
        assert torch.equal(out, by_hand(LAYER, tensors, hidden, *call, dtype=dtype))


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "out",
    [torch.empty(M, K, dtype=torch.bfloat16), torch.empty(2, M, K), torch.empty(K, M).t(), torch.empty(M, 1)],
    ids=["dtype", "shape", "strides", "columns"],
)
def test_memory_that_the_output_does_not_fit_is_refused(out: Tensor, compiled: bool) -> None:
    experts, call = LAYER.wrap(LAYER.tensors()), routing()

    def run(hidden: Tensor, out: Tensor) -> Tensor:
        return moe_forward(hidden, experts, *call, out=out)

    torch._dynamo.reset()
    called: Any = torch.compile(run, backend="aot_eager") if compiled else run
    with under(), pytest.raises(InvalidInputError, match=r"^out "):
        called(torch.randn(M, K), out)


@torch.no_grad()
def test_tokens_that_no_call_takes_are_refused_by_the_dtypes_that_were_given() -> None:
    with under(), pytest.raises(InvalidInputError, match="float64 and the experts are fp32"):
        moe_forward(torch.randn(M, K, dtype=torch.float64), LAYER.wrap(LAYER.tensors()), *routing())


@torch.no_grad()
@pytest.mark.usefixtures("fixed_policy")
@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16], ids=str)
def test_what_writes_into_memory_is_warmed_up(tokens: torch.dtype) -> None:
    experts, (weights, ids) = LAYER.wrap(LAYER.tensors()), routing()
    hidden = torch.randn(M, K).to(tokens)
    with ranked(Honest), under():
        warm_up(experts, ids.shape[1], [M], into_out=True)
        proven = set(get_dispatcher("cpu").planner._proven)
        moe_forward(hidden, experts, weights, ids, out=torch.empty_like(hidden))
        assert get_dispatcher("cpu").planner._proven == proven


@torch.no_grad()
@pytest.mark.usefixtures("fixed_policy")
def test_calls_share_their_plan_and_leave_no_copy() -> None:
    """Each call has weights at another address, of a kind that is known; without a gradient their memory is freed."""
    alive: list[weakref.ref[Tensor]] = []

    class Watching(Honest):
        name = "watching"

        def run(
            self, hidden_states: Tensor, experts: ExpertWeights, weights: Tensor, ids: Tensor, config: BackendConfig
        ) -> Tensor:
            assert not torch.is_autocast_enabled("cpu")
            assert hidden_states.dtype == experts.gate_up.dtype == experts.down.dtype == torch.bfloat16
            alive.extend((weakref.ref(experts.gate_up), weakref.ref(experts.down)))
            return super().run(hidden_states, experts, weights, ids, config)

    experts, (weights, ids) = LAYER.wrap(LAYER.tensors()), routing()
    call = torch.randn(M, K), weights, ids.int()
    with ranked(Watching), under():
        warm_up(experts, 3, [M], torch.float32)
        plans = list(get_dispatcher("cpu")._plans)
        for _ in range(20):
            moe_forward(call[0], experts, *call[1:])
            assert all(each() is None for each in alive)
        assert list(get_dispatcher("cpu")._plans) == plans, "what was warmed up is what a call runs"
        assert stats()["watching"]["ran"] == 21


def test_explain_names_the_dtype_and_the_copies() -> None:
    hidden, call = torch.randn(M, K), routing()
    experts = LAYER.wrap({name: each.requires_grad_() for name, each in LAYER.tensors().items()})
    with under():
        explanation = explain(hidden, experts, *call)
        plain = explain(hidden, LAYER.wrap(Layer(dtype=torch.bfloat16).tensors()), *call)
    assert (explanation.problem.dtype, explanation.problem.act_dtype) == ("bf16", "bf16")
    assert any("autocast: each call copies all experts from fp32" in note for note in explanation.notes)
    assert any("got bf16 on a CPU" in note for note in explanation.notes), "how the gradients are computed"
    assert not any("autocast" in note for note in plain.notes)
    assert not any("autocast" in note for note in explain(hidden, experts, *call).notes)


@pytest.mark.parametrize("options", [{}, {"shared_N": 16, "shared_gate": True}], ids=["routed", "with shared experts"])
def test_a_layer_between_linear_layers_trains_under_autocast(options: dict[str, Any]) -> None:
    """Linear layers hand it BF16, and take what it returns."""
    model = torch.nn.Sequential(torch.nn.Linear(K, K), MoELayer(K, 16, 8, 2, **options), torch.nn.Linear(K, 1))
    hidden = torch.randn(64, K)
    target = hidden.sum(1, keepdim=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        with under():
            out = model(hidden)
        loss = (out.float() - target).square().mean()
        loss.backward()
        assert all(each.grad is not None and each.grad.dtype == torch.float32 for each in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4, losses
