"""Recorded calls: the backend of a plain call runs them, and their gradients are the reference's."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moe_dispatch import ExpertWeights, InvalidInputError, MoEDispatchWarning, explain, moe_forward, stats
from moe_dispatch.activations import Activation
from moe_dispatch.backends import backward as backward_module
from moe_dispatch.backends.backward import by_expert, grouped
from moe_dispatch.backends.reference import ReferenceBackend, ReferenceConfig
from moe_dispatch.dispatch.gradients import Gradients, Wanted
from moe_dispatch.machine import Machine
from tests.support.fakes import Honest, ranked

M, K, N, E, TOPK = 7, 32, 24, 5, 3
EVERYTHING = Wanted(*[True] * len(Wanted._fields))


@dataclass(frozen=True)
class Layer:
    activation: Activation = "silu"
    bias: bool = False
    interleaved: bool = False
    transposed: bool = False
    dtype: torch.dtype = torch.float32
    scale: float = 1.0

    def __str__(self) -> str:
        features = ("bias", "interleaved", "transposed")
        return "-".join([self.activation, *(name for name in features if getattr(self, name))])

    def tensors(self) -> dict[str, Tensor]:
        rows = N if self.activation == "relu2" else 2 * N
        made = {"gate_up": torch.randn(E, rows, K) * self.scale / 4, "down": torch.randn(E, K, N) / 4}
        if self.transposed:
            made = {name: tensor.mT.contiguous().mT for name, tensor in made.items()}
        if self.bias:
            made |= {"gate_up_bias": torch.randn(E, rows), "down_bias": torch.randn(E, K)}
        return {name: tensor.to(self.dtype) for name, tensor in made.items()}

    def wrap(self, tensors: dict[str, Tensor]) -> ExpertWeights:
        options = {"interleaved": self.interleaved, "transposed": self.transposed}
        return ExpertWeights(**tensors, activation=self.activation, **options)  # type: ignore[arg-type]  # by name


LAYERS = (
    Layer(),
    Layer("gelu", bias=True),
    Layer("gelu_tanh", interleaved=True),
    Layer("swiglu_oai", bias=True, interleaved=True, scale=8.0),  # beyond the limits of its clamps
    Layer("swiglu(alpha=1.5,limit=3,shift=0.5,gate_cap=2,up_cap=4)", scale=4.0),
    Layer("relu2", bias=True),
    Layer("swiglu_oai", bias=True, interleaved=True, transposed=True),
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def routing() -> tuple[Tensor, Tensor]:
    """Weights and ids with slots of other ranks, an expert twice in a row, and an expert without a token."""
    weights, ids = torch.rand(M, TOPK), torch.randint(-1, E, (M, TOPK))
    ids[ids == 2] = E
    ids[0] = 1
    return weights, ids


def plain(layer: Layer) -> tuple[Tensor, ExpertWeights, Tensor, Tensor]:
    """The arguments of a call."""
    return torch.randn(M, K), layer.wrap(layer.tensors()), *routing()


def recorded(layer: Layer) -> tuple[Tensor, ExpertWeights, Tensor, Tensor]:
    """The same, with hidden_states that want a gradient."""
    call = plain(layer)
    call[0].requires_grad_()
    return call


def reference(hidden: Tensor, experts: ExpertWeights, weights: Tensor, ids: Tensor) -> Tensor:
    """The layer in fp32, by operations that torch differentiates."""
    config = ReferenceConfig(compute_fp32=True)
    return ReferenceBackend(Machine.inspect("cpu")).run(hidden, experts, weights.float(), ids, config)


def gradients(
    run: Callable[..., Tensor], layer: Layer, tensors: dict[str, Tensor], hidden: Tensor, weights: Tensor, ids: Tensor
) -> list[Tensor]:
    """The gradients of hidden_states, topk_weights and the layer's tensors under a fixed gradient of the output."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    out = run(hidden, layer.wrap(leaves), weights, ids)
    gradient = torch.linspace(-1, 1, out.numel()).view_as(out).sin().to(out.dtype)
    return list(torch.autograd.grad(out, [hidden, weights, *leaves.values()], gradient))


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_they_are_those_of_the_reference(layer: Layer) -> None:
    tensors, hidden, (weights, ids) = layer.tensors(), torch.randn(M, K), routing()
    expected = gradients(reference, layer, tensors, hidden, weights, ids)
    got = gradients(moe_forward, layer, tensors, hidden, weights, ids)
    assert [error(*pair) < 1e-5 for pair in zip(got, expected, strict=True)] == [True] * len(expected)
    for gradient, tensor in zip(got[2:], tensors.values(), strict=True):
        assert not gradient[2].any(), "an expert without a token has a gradient of zeros"
        assert gradient.stride() == tensor.stride(), "a parameter stored transposed takes it without a copy"
    assert not got[1][(ids < 0) | (ids >= E)].any()


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_grouped_products_give_the_same(layer: Layer, poisoned_memory: None) -> None:
    """On fresh memory full of NaN, of which rows past the last expert's and slots of other ranks must read nothing."""
    tensors, hidden, (weights, ids), gradient = layer.tensors(), torch.randn(M, K), routing(), torch.randn(M, K)
    weights[(ids < 0) | (ids >= E)] = torch.nan
    inputs = hidden, layer.wrap(tensors), weights, ids
    expected = by_expert.backward(gradient, inputs, EVERYTHING)
    got = grouped.backward(gradient, inputs, EVERYTHING)
    for name, want, have in zip(Gradients._fields, expected, got, strict=True):
        assert (want is None) == (have is None), name
        if want is not None:
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    assert got.gate_up is not None
    assert got.gate_up.stride() == tensors["gate_up"].stride()


@pytest.mark.parametrize("module", [by_expert, grouped])
def test_what_is_frozen_costs_nothing(module: Any) -> None:
    inputs, gradient = plain(LAYERS[1]), torch.randn(M, K)
    whole = module.backward(gradient, inputs, EVERYTHING)
    for i, name in enumerate(Wanted._fields):
        alone = module.backward(gradient, inputs, Wanted(*(j == i for j in range(len(EVERYTHING)))))
        assert [made is not None for made in alone] == [j == i for j in range(len(EVERYTHING))]
        torch.testing.assert_close(alone[i], getattr(whole, name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_the_truth_as_its_rounding(dtype: torch.dtype) -> None:
    layer = Layer(bias=True, dtype=dtype)
    tensors, hidden, (weights, ids) = layer.tensors(), torch.randn(M, K).to(dtype), routing()
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    truth = gradients(reference, layer, wide, hidden.float(), weights, ids)
    got = gradients(moe_forward, layer, tensors, hidden, weights, ids)
    assert [gradient.dtype for gradient in got] == [dtype, torch.float32, *[dtype] * 4]
    assert max(map(error, got, truth)) < torch.finfo(dtype).eps


def test_fp8_weights_give_gradients_to_hidden_states_and_weights() -> None:
    plain = Layer().tensors()
    experts = ExpertWeights.quantize(plain["gate_up"], plain["down"])
    hidden, (weights, ids) = torch.randn(M, K, requires_grad=True), routing()
    leaves = hidden, weights.requires_grad_()
    grads = [
        torch.autograd.grad(run(hidden, experts, weights, ids).square().sum(), leaves)
        for run in (moe_forward, reference)
    ]
    assert all(error(*pair) < 1e-5 for pair in zip(*grads, strict=True))


@pytest.mark.usefixtures("fixed_policy")
def test_the_policys_backend_runs_a_recorded_call() -> None:
    call = recorded(Layer())
    with ranked(Honest):
        moe_forward(*call).sum().backward()
        explanation = explain(*call)
        assert {name: counts["ran"] for name, counts in stats().items()} == {"honest": 1}
        assert explanation.chosen is not None
        assert explanation.chosen.choice.backend == "honest"
        assert any("gradients are computed expert by expert" in note for note in explanation.notes)
        with torch.no_grad():
            assert not explain(*call).notes


def test_which_layers_are_grouped() -> None:
    def layer(K: int, N: int) -> ExpertWeights:
        return ExpertWeights(torch.empty(2, 2 * N, K).bfloat16(), torch.empty(2, K, N).bfloat16())

    assert not grouped.reasons_against(layer(16, 16), Machine.load("h200"))
    (unrolled,) = grouped.reasons_against(layer(16, 16), Machine.load("h200"), topk=129)
    assert "topk ≤ 128" in unrolled
    (reason,) = grouped.reasons_against(layer(16, 16), Machine.load("a100-80gb"))
    assert "compute capability 9.x, got bf16 on compute capability 8.0" in reason
    reasons = grouped.reasons_against(layer(20, 12), Machine.load("h200"))
    assert [reason.split(", got ")[1] for reason in reasons] == ["K=20", "N=12"]


def test_where_grouped_products_fail_the_loop_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Gradients:
        raise RuntimeError("no kernel image")

    inputs, gradient = plain(Layer()), torch.randn(M, K)
    machine = Machine.inspect("cpu")
    monkeypatch.setattr(backward_module, "_failed", [])
    monkeypatch.setattr(grouped, "reasons_against", lambda *_, **__: ())
    monkeypatch.setattr(grouped, "backward", fail)
    with pytest.warns(MoEDispatchWarning, match=r"grouped products .* no kernel image"):
        got = backward_module.backward(gradient, inputs, EVERYTHING, machine)
    expected = by_expert.backward(gradient, inputs, EVERYTHING)
    assert got.gate_up is not None
    torch.testing.assert_close(got.gate_up, expected.gate_up, rtol=0, atol=0)
    assert "no kernel image" in backward_module.explain(inputs[1], machine)


def test_a_backward_that_lacks_memory_raises_and_is_tried_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training loop that makes its batch smaller has to see it."""
    free = list[int]()

    def lack(*arguments: Any) -> Gradients:
        if not free:
            raise torch.OutOfMemoryError("tried to allocate")
        return by_expert.backward(*arguments)

    monkeypatch.setattr(backward_module, "_failed", [])
    monkeypatch.setattr(grouped, "reasons_against", lambda *_, **__: ())
    monkeypatch.setattr(grouped, "backward", lack)
    inputs, gradient, machine = plain(Layer()), torch.randn(M, K), Machine.inspect("cpu")
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            backward_module.backward(gradient, inputs, EVERYTHING, machine)
    free.append(1)
    assert backward_module.backward(gradient, inputs, EVERYTHING, machine).gate_up is not None
    assert "failed" not in backward_module.explain(inputs[1], machine)


def test_second_derivatives_are_those_of_the_reference() -> None:
    layer = Layer(bias=True)
    tensors, (weights, ids), start = layer.tensors(), routing(), torch.randn(M, K)
    seconds = []
    for run in (moe_forward, reference):
        hidden = start.clone().requires_grad_()
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        out = run(hidden, layer.wrap(leaves), weights, ids)
        (first,) = torch.autograd.grad(out.square().sum(), hidden, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), [hidden, *leaves.values()]))
    assert all(error(*pair) < 1e-5 for pair in zip(*seconds, strict=True))


def test_a_gradient_for_each_of_several_outputs_at_once() -> None:
    """``is_grads_batched``, as vectorised Jacobians have it."""
    call = hidden, *_ = recorded(Layer())
    out, several = moe_forward(*call), torch.randn(2, M, K)
    (batched,) = torch.autograd.grad(out, hidden, several, is_grads_batched=True, retain_graph=True)
    for got, each in zip(batched, several, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(out, hidden, each, retain_graph=True)[0])


def test_autocast_around_the_backward_changes_nothing() -> None:
    call = hidden, *_ = recorded(Layer())
    out = moe_forward(*call).sum()
    (expected,) = torch.autograd.grad(out, hidden, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (got,) = torch.autograd.grad(out, hidden)
    assert torch.equal(got, expected)


class Experts(torch.nn.Module):
    """A layer as a model holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = torch.nn.Linear(K, E)
        tensors = Layer().tensors()
        self.gate_up, self.down = torch.nn.Parameter(tensors["gate_up"]), torch.nn.Parameter(tensors["down"])

    def forward(self, hidden: Tensor, run: Callable[..., Tensor] = moe_forward) -> Tensor:
        weights, ids = self.router(hidden).softmax(dim=-1).topk(TOPK)
        return hidden + run(hidden, ExpertWeights(self.gate_up, self.down), weights, ids)


def parameters_after(model: Experts, forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        forward(torch.randn(M, K)).square().mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def test_training_steps_agree_with_the_reference_compiled_and_checkpointed() -> None:
    start, graphs = Experts(), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(str(graph.graph))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def checkpointed(model: Experts) -> Callable[[Tensor], Tensor]:
        return lambda hidden: checkpoint(model, hidden, use_reentrant=False)

    torch.compiler.reset()
    ways: tuple[Callable[[Experts], Callable[[Tensor], Tensor]], ...] = (
        lambda model: lambda hidden: model(hidden, reference),
        lambda model: model,
        checkpointed,
        lambda model: torch.compile(model, fullgraph=True, backend=backend),
    )
    expected, *others = (parameters_after(model, way(model)) for way in ways for model in [copy.deepcopy(start)])
    for parameters in others:
        for got, want in zip(parameters, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert ["recorded_forward" in graph for graph in graphs] == [True]


def test_the_operator_keeps_what_it_promises() -> None:
    layer = Layer(bias=True)
    tensors = {name: tensor.requires_grad_() for name, tensor in layer.tensors().items()}
    hidden, (weights, ids) = torch.randn(M, K, requires_grad=True), routing()
    arguments = (hidden, weights, ids, tensors["gate_up"], tensors["down"], None, None, tensors["gate_up_bias"],
                 tensors["down_bias"], "silu", False, None, "")  # fmt: skip
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.moe_dispatch.recorded_forward.default, arguments, test_utils=checks)


def test_a_mode_sees_the_operator() -> None:
    """Without one it is passed by; selective checkpointing is one, and keeps results by the names of operators."""
    seen: set[str] = set()

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func.name())
            return func(*args, **(kwargs or {}))

    call = recorded(Layer())

    def gradient_of_hidden_states() -> Tensor:
        (gradient,) = torch.autograd.grad(moe_forward(*call).sum(), [call[0]])
        return gradient

    with Seeing():  # type: ignore[no-untyped-call]  # torch's
        seen_by_a_mode = gradient_of_hidden_states()
    assert {"moe_dispatch::forward", "moe_dispatch::backward"} <= seen
    assert torch.equal(gradient_of_hidden_states(), seen_by_a_mode)


def test_a_recorded_call_is_checked_as_any_other() -> None:
    layer = Layer()
    hidden, (weights, ids) = torch.randn(M, K), routing()
    experts = layer.wrap({name: tensor.requires_grad_() for name, tensor in layer.tensors().items()})
    bad: list[tuple[Any, ...]] = [
        (hidden.to("meta"), experts, weights, ids), (hidden, experts, weights.to("meta"), ids),
        (hidden[:, 1:], experts, weights, ids), (hidden, experts, weights, ids.float()),
        (hidden[0], experts, weights, ids), (hidden, experts, ids, weights),
    ]  # fmt: skip
    node = moe_forward(hidden, experts, weights, ids).grad_fn
    assert node is not None
    assert node.name() == "_RecordedBackward", "torch.library's own takes the host longer than many a call"
    for arguments in bad:
        with pytest.raises(InvalidInputError):
            moe_forward(*arguments)
    with pytest.raises(InvalidInputError, match="backend must be"):
        moe_forward(hidden, experts, weights, ids, backend=3)  # type: ignore[arg-type]
    experts.down.data = experts.down.double()
    with pytest.raises(InvalidInputError, match="changed since they were wrapped"):
        moe_forward(hidden, experts, weights, ids)


def test_fake_tensors_are_recorded_too() -> None:
    """A training step on fake tensors tells how much memory it will take."""
    layer = Layer()
    with FakeTensorMode() as mode:
        hidden = mode.from_tensor(torch.randn(M, K)).requires_grad_()
        leaves = {name: mode.from_tensor(tensor).requires_grad_() for name, tensor in layer.tensors().items()}
        weights, ids = map(mode.from_tensor, routing())
        moe_forward(hidden, layer.wrap(leaves), weights, ids).sum().backward()
        assert [tensor.grad.shape for tensor in (hidden, *leaves.values()) if tensor.grad is not None] == [
            (M, K), (E, 2 * N, K), (E, K, N)
        ]  # fmt: skip
    assert not stats()


@pytest.mark.parametrize("made_so", ["weights", "ids", "layer"])
def test_what_was_made_in_inference_mode_may_stand_beside_a_gradient(made_so: str) -> None:
    """As a frozen model's weights and a router's choice are, around an adapter that learns."""
    layer = Layer(bias=True)
    tensors, hidden, (weights, ids) = layer.tensors(), torch.randn(M, K, requires_grad=True), routing()
    (expected,) = torch.autograd.grad(moe_forward(hidden, layer.wrap(tensors), weights, ids).sum(), hidden)
    with torch.inference_mode():
        if made_so == "weights":
            weights = weights.clone()
        elif made_so == "ids":
            ids = ids.clone()
        else:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    (got,) = torch.autograd.grad(moe_forward(hidden, layer.wrap(tensors), weights, ids).sum(), hidden)
    assert torch.equal(got, expected)


def test_torch_func_takes_the_reference() -> None:
    call = hidden, *_ = recorded(Layer())
    moe_forward(hidden.detach(), *call[1:])  # of a kind that is known then
    (expected,) = torch.autograd.grad(moe_forward(*call).sum(), hidden)
    got = torch.func.grad(lambda h: moe_forward(h, *call[1:]).sum())(hidden.detach())
    torch.testing.assert_close(got, expected)
