"""The recipes by which models of transformers are trained and then used: autocast, checkpointing, copies, casts."""

import copy
import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5.17")

import transformers

from moe_dispatch.errors import MoEDispatchWarning
from moe_dispatch.integrations.transformers import own, register
from tests.integrations.transformers_models import build, call_of, calls, experts_of, gpt_oss, layer, logits, qwen3

BOTH = pytest.mark.parametrize("config", [qwen3, gpt_oss], ids=["straight", "transposed"])
TOKENS = torch.arange(1, 25).view(2, 12)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    """Registered, and every layer is dispatched: one that keeps its own implementation warns."""
    register()
    own._warned.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", MoEDispatchWarning)
        yield


def error(got: Tensor, exact: Tensor) -> float:
    assert exact.norm() > 0
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def with_gradients(
    module: Any, call: tuple[Tensor, ...], implementation: str, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The output of a layer, under autocast to a dtype, and the gradients of its tokens and weights."""
    module.config._experts_implementation = implementation
    hidden, *rest = call
    leaves = [hidden.clone().requires_grad_(), *module.parameters()]
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        out: Tensor = module(leaves[0], *rest)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", ["fp32", "half"])
def test_under_autocast_a_layer_is_as_exact_as_with_the_models_own(
    config: Callable[[], Any], dtype: torch.dtype, tokens: str
) -> None:
    """Both round tokens, weights, both products and the activation to autocast's dtype; half as much again is allowed.

    Of tokens in FP32 the model's own rounds neither the sum over experts nor, with biases, what is added to them, and
    so not their gradients either. That is one rounding more here, at most half the dtype's epsilon of each element.
    """
    module = layer(config())
    hidden, *rest = call_of(module, M=64)
    call = (hidden.to(dtype if tokens == "half" else torch.float32), *rest)
    exact = with_gradients(module, (call[0].float(), *rest), "eager")
    theirs = with_gradients(module, call, "eager", dtype)
    before = calls()
    mine = with_gradients(module, call, "moe_dispatch", dtype)
    assert calls() == before + 1
    eps = torch.finfo(dtype).eps
    for got, other, right in zip(mine, theirs, exact, strict=True):
        assert got.dtype == other.dtype
        allowed = 1.5 * error(other, right) + (eps / 2 if tokens == "fp32" else 0.0)
        assert eps / 10 < error(got, right) < allowed


def test_tokens_in_fp32_find_weights_in_half_precision_under_autocast() -> None:
    """As layers of norms leave them, which autocast runs in FP32, before a base model of LoRA in BF16."""
    module = layer(qwen3()).to(torch.bfloat16)
    hidden, *rest = call_of(module)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = calls()
        out = module(hidden.float(), *rest)
        assert calls() == before + 1
        assert torch.equal(out, module(hidden, *rest).float())


@BOTH
def test_graphs_cast_as_eager_calls_do(config: Callable[[], Any]) -> None:
    module = layer(config())
    call = call_of(module)
    with torch.autocast("cpu", torch.bfloat16):
        expected: Tensor = module(*call)
        expected.square().sum().backward()
        gradient, module.down_proj.grad = module.down_proj.grad, None
        compiled: Any = torch.compile(module, backend="aot_eager", fullgraph=True)
        out = compiled(*call)
    out.square().sum().backward()
    assert torch.equal(out, expected)
    assert out.dtype == module.down_proj.grad.dtype == torch.float32
    assert torch.equal(module.down_proj.grad, gradient)


def all_chosen() -> Any:
    """Every token goes to every expert: the router is in BF16 under autocast, and near experts would change places."""
    return qwen3(num_experts=4, num_experts_per_tok=4)


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(1, 128, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def trained(folder: Path, implementation: str, *, bf16: bool, **options: Any) -> Tensor:
    """What a few steps of transformers' Trainer change, all parameters in one vector."""
    model = build(all_chosen())
    model.set_experts_implementation(implementation)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    arguments = transformers.TrainingArguments(
        str(folder), bf16=bf16, use_cpu=True, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        optim="sgd", learning_rate=0.05, lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no",
        report_to=[], disable_tqdm=True, **options,
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=Texts()).train()
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    return nn.utils.parameters_to_vector(model.parameters()).detach() - before


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="the Trainer needs accelerate")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=["plain", "reentrant checkpointing", "checkpointing"],
)
def test_the_trainer_takes_steps_as_exact_as_with_the_models_own(options: dict[str, Any], tmp_path: Path) -> None:
    """With BF16 over FP32 weights, accumulated gradients included; the exact steps are FP32's."""
    exact = trained(tmp_path, "eager", bf16=False)
    before = calls()
    mine = trained(tmp_path, "moe_dispatch", bf16=True, **options)
    forwards = 2 if options else 1  # checkpointing runs each layer again
    assert calls() == before + 3 * 2 * 2 * forwards, "3 steps of 2 batches through 2 layers"
    assert error(mine, exact) < 1.5 * error(trained(tmp_path, "eager", bf16=True, **options), exact)


def stepped(model: Any, implementation: str, recipe: Callable[[Any], Any], dtype: torch.dtype | None) -> list[Tensor]:
    """The parameters of a copy after two steps, each of two accumulated batches, and its logits before and after."""
    model = copy.deepcopy(model).train()
    model.set_experts_implementation(implementation)
    run = recipe(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    results = [logits(model.eval(), implementation)]
    for _ in range(2):
        model.train()
        for batch in TOKENS.split(1):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = run(input_ids=batch, labels=batch).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        results.append(logits(model.eval(), implementation))
    return [*results, nn.utils.parameters_to_vector(model.parameters()).detach()]


def checkpointing(model: Any, *, reentrant: bool) -> Any:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


RECIPES: dict[str, Callable[[Any], Any]] = {
    "plain": lambda model: model,
    "reentrant checkpointing": functools.partial(checkpointing, reentrant=True),
    "checkpointing": functools.partial(checkpointing, reentrant=False),
    "compiled": functools.partial(torch.compile, backend="aot_eager"),
}


@BOTH
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipes_train_as_the_models_own(config: Callable[[], Any], recipe: Callable[[Any], Any]) -> None:
    """Optimisers change weights in place, and evaluation between the steps sees the changed ones."""
    model = build(config())
    theirs, mine = (stepped(model, each, recipe, None) for each in ("eager", "moe_dispatch"))
    assert not torch.allclose(mine[0], mine[1], atol=1e-3), "a step changes the logits"
    for got, expected in zip(mine, theirs, strict=True):
        assert error(got, expected) < 1e-4


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipes_take_steps_as_exact_as_the_models_own_under_autocast(recipe: Callable[[Any], Any]) -> None:
    model = build(all_chosen())
    begin = nn.utils.parameters_to_vector(model.parameters()).detach()
    exact = stepped(model, "eager", recipe, None)[-1] - begin
    theirs, mine = (stepped(model, each, recipe, torch.bfloat16)[-1] - begin for each in ("eager", "moe_dispatch"))
    assert 1e-3 < error(mine, exact) < 1.5 * error(theirs, exact)


def loaded(model: Any, *, assign: bool = False) -> Any:
    generator = torch.Generator().manual_seed(5)
    state = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state, assign=assign)
    return model


def averaged(model: Any) -> Any:
    """A copy as it is kept for an exponential moving average, which follows the model by half a step."""
    average = copy.deepcopy(model).requires_grad_(False)
    for mine, new in zip(average.parameters(), loaded(model).parameters(), strict=True):
        mine.lerp_(new.detach(), 0.5)
    return average.requires_grad_()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "half": lambda model: model.half(),
    "to bf16": lambda model: model.to(torch.bfloat16),
    "to bf16 and back": lambda model: model.to(torch.bfloat16).float(),
    "load_state_dict": loaded,
    "load_state_dict(assign=True)": functools.partial(loaded, assign=True),
    "a copy for an average": averaged,
}


@BOTH
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_changed_after_training_is_seen_as_it_is(
    config: Callable[[], Any], change: Callable[[Any], Any]
) -> None:
    """Calls before the change, recorded and not, leave nothing that a later one reads."""
    modes: tuple[Callable[[], Any], ...] = (torch.no_grad, torch.inference_mode, torch.enable_grad)
    model = build(config()).train()
    model.set_experts_implementation("moe_dispatch")
    for mode in modes:
        model(TOKENS, labels=TOKENS).loss.backward()
        with mode():
            model(TOKENS)
    changed = change(model).eval()
    dtype = experts_of(changed).down_proj.dtype
    theirs = logits(changed, "eager")
    for mode in modes:
        with mode():
            before = calls()
            mine = logits(changed, "moe_dispatch")
            assert calls() == before + 2
        assert error(mine, theirs) < {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    if dtype == torch.float32:  # and it trains on
        gradients = []
        for implementation in ("eager", "moe_dispatch"):
            changed.set_experts_implementation(implementation)
            changed.zero_grad()
            changed(TOKENS, labels=TOKENS).loss.backward()
            gradients.append(experts_of(changed).down_proj.grad)
        assert error(gradients[1], gradients[0]) < 1e-4
