"""Layers of transformers under torch.compile and torch.export."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5.17")

from moe_dispatch.integrations.transformers import own, register, report
from tests.integrations.transformers_models import (
    TOLERANCE,
    build,
    call_of,
    calls,
    eager,
    gpt_oss,
    layer,
    logits,
    qwen3,
)


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()
    own._warned.clear()
    torch.compiler.reset()


class Stack(nn.Module):
    """Layers of experts one after the other, with the same routing."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(layers)

    def forward(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        for each in self.layers:
            rows = torch.nn.functional.normalize(each(rows, ids, weights))
        return rows


def compiled_whole(module: nn.Module) -> tuple[Any, list[int]]:
    """The module in one graph, and how often each graph that was compiled of it calls the operator."""
    counts: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        counts.append(sum("moe_dispatch.forward" in str(node.target) for node in graph.graph.nodes))
        return graph

    return torch.compile(module, backend=backend, fullgraph=True), counts


@pytest.mark.parametrize("ran", [False, True], ids=["cold", "after an eager call"])
def test_layers_are_compiled_whole_each_with_its_own_weights_and_gate(ran: bool) -> None:
    """Layers share the code that is traced; what it read of the one is guarded for the others."""
    stack = Stack(layer(qwen3()), layer(qwen3(hidden_act="gelu")), layer(qwen3()))
    call = call_of(stack.layers[0])
    with torch.no_grad():
        for number, each in enumerate(stack.layers):
            each.down_proj.mul_(1 + number)
        expected = eager(stack, call)
        if ran:
            stack(*call)
        compiled, counts = compiled_whole(stack)
        before = calls()
        torch.testing.assert_close(compiled(*call), expected, rtol=1e-4, atol=1e-5)
        assert counts == [3]
        assert calls() == before + 3
        # The graph has the layers' tensors as they are when it runs.
        stack.layers[0].down_proj.add_(0.1)
        stack.layers[1].gate_up_proj = nn.Parameter(torch.randn_like(stack.layers[1].gate_up_proj))
        torch.testing.assert_close(compiled(*call), eager(stack, call), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ran", [False, True], ids=["cold", "after an eager call"])
def test_a_gate_changed_after_compilation_is_noticed(ran: bool) -> None:
    stack = Stack(layer(qwen3()))
    call = call_of(stack.layers[0])
    with torch.no_grad():
        if ran:
            stack(*call)
        compiled, counts = compiled_whole(stack)
        compiled(*call)
        stack.layers[0].act_fn = nn.GELU()
        torch.testing.assert_close(compiled(*call), eager(stack, call), rtol=1e-4, atol=1e-5)
        assert counts == [1, 1]


@pytest.mark.filterwarnings("ignore:Qwen3MoeExperts keeps")
def test_layers_that_keep_their_own_stay_in_the_graph() -> None:
    stack = Stack(layer(qwen3(hidden_act="tanh")))
    call = call_of(stack.layers[0])
    with torch.no_grad():
        compiled, counts = compiled_whole(stack)
        torch.testing.assert_close(compiled(*call), eager(stack, call), rtol=1e-4, atol=1e-5)
    assert counts == [0]


def test_transposed_layers_are_read_in_place_by_graphs() -> None:
    stack = Stack(layer(gpt_oss()), layer(gpt_oss()))
    call = call_of(stack.layers[0])
    with torch.no_grad():
        compiled, counts = compiled_whole(stack)
        torch.testing.assert_close(compiled(*call), eager(stack, call), rtol=1e-4, atol=1e-5)
        stack.layers[0].down_proj.data.mul_(3.0)  # a copy would not see it
        torch.testing.assert_close(compiled(*call), eager(stack, call), rtol=1e-4, atol=1e-5)
    assert counts == [2]


def test_a_model_that_never_ran_is_compiled_whole() -> None:
    model, ids = build(qwen3(num_hidden_layers=2)), torch.arange(1, 12)[None]
    with torch.no_grad():
        expected = logits(model, "eager")
        model.set_experts_implementation("moe_dispatch")
        compiled, counts = compiled_whole(model)
        assert (compiled(ids).logits - expected).norm() / expected.norm() < TOLERANCE[torch.float32]
    assert counts == [2]


def test_blocks_compiled_one_by_one_share_a_graph_after_report() -> None:
    layers = [layer(qwen3()) for _ in range(4)]
    report(Stack(*layers))
    counts = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        counts.append(len(inputs))
        return graph

    with torch.no_grad():
        for each in layers:
            compiled: Any = torch.compile(each, backend=backend, fullgraph=True)
            compiled(*call_of(each))
    assert len(counts) == 1


@pytest.mark.parametrize("config", [qwen3, gpt_oss], ids=["straight", "transposed"])
def test_gradients_survive_compilation(config: Callable[[], Any]) -> None:
    gradients = []
    for compile_it in (False, True):
        module = layer(config())
        run: Any = torch.compile(module, backend="aot_eager", fullgraph=True) if compile_it else module
        run(*call_of(module)).square().sum().backward()
        gradients.append(module.down_proj.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "gradients enabled"])
@pytest.mark.parametrize("config", [qwen3, gpt_oss], ids=["straight", "transposed"])
def test_exported_layers_compute_the_same(config: Callable[[], Any], grad: bool) -> None:
    stack = Stack(layer(config()))
    call = call_of(stack.layers[0])
    with torch.set_grad_enabled(grad):
        program = torch.export.export(stack, call)
        torch.testing.assert_close(program.module()(*call), eager(stack, call), rtol=1e-4, atol=1e-5)
    operators = sum("moe_dispatch" in str(node.target) for node in program.graph.nodes)
    assert operators > 0
