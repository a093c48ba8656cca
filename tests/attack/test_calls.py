"""Hostile calls: every one gives the right answer, or is refused by name before anything runs."""

import dataclasses
from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from moe_dispatch import Machine, MoEProblem, explain, moe_forward, warm_up
from moe_dispatch.activations import ACTIVATIONS
from moe_dispatch.dispatch.process import get_dispatcher, reset_dispatchers
from moe_dispatch.errors import InvalidInputError, MoEDispatchError
from moe_dispatch.registry import BACKENDS
from tests.attack.harness import answer_or_refusal, attack, watched
from tests.attack.oracle import assert_right, truth
from tests.attack.strategies import (
    ALIKE,
    AMBIENT,
    FOREIGN,
    SCALARS,
    Call,
    CallShape,
    call_shapes,
    draw_layer,
    layer_shapes,
    make_call,
    wrap,
)

AREA = "calls"
ROLES = ("hidden_states", "topk_weights", "topk_ids")
NAMES = st.sampled_from([None] * 9 + ["reference", "torch_grouped", "triton_splitk", "gluon_hopper", "deep_gemm"])


def right_answer(call: Call, result: Tensor | MoEDispatchError, before: dict[str, Tensor], dtype: str) -> None:
    """A result is right, and the call's tensors are what they were."""
    assert not isinstance(result, MoEDispatchError), f"a valid call was refused: {result}"
    assert (result.dtype, result.device) == (before["hidden_states"].dtype, before["hidden_states"].device)
    assert_right(result, truth(before["hidden_states"], call.layer, before["topk_weights"], before["topk_ids"]), dtype)
    for role, copy in before.items():
        now = getattr(call, role).detach()
        assert torch.equal(now.nan_to_num(7.0) if now.is_floating_point() else now, copy.nan_to_num(7.0)), role


def copies(call: Call) -> dict[str, Tensor]:
    return {role: torch.Tensor.as_subclass(getattr(call, role).detach(), Tensor).clone() for role in ROLES}


@attack(4500)
@given(
    shape=call_shapes(),
    forms=st.fixed_dictionaries({role: st.sampled_from(["itself", "itself", *sorted(ALIKE)]) for role in ROLES}),
    ambient=st.sampled_from(["none", "none", *sorted(AMBIENT)]),
    backend=NAMES,
    cold=st.integers(0, 40),
)
def test_a_valid_call_is_answered(
    shape: CallShape, forms: dict[str, str], ambient: str, backend: str | None, cold: int
) -> None:
    """Whatever the shapes, the form of its tensors, and what torch is set to; plans of earlier calls are known."""
    if cold == 0:
        reset_dispatchers()
    call = make_call(shape)
    for role, form in forms.items():
        setattr(call, role, ALIKE[form](getattr(call, role)))
    before = copies(call)
    with watched(AREA):
        with AMBIENT[ambient]():
            result = answer_or_refusal(AREA, lambda: moe_forward(*call.arguments, backend=backend))
        if isinstance(result, MoEDispatchError) and backend not in (None, "reference"):
            assert backend in str(result)
            return
        halved = ambient == "autocast" and shape.layer.dtype == "fp32"
        right_answer(call, result, before, "bf16" if halved else shape.layer.dtype)


@attack(2500)
@given(
    shape=call_shapes(),
    role=st.sampled_from(ROLES),
    form=st.sampled_from(sorted(FOREIGN)),
    ambient=st.sampled_from(["none", "none", "no_grad", "autocast", "double by default", "inference mode"]),
    backend=NAMES,
    warm=st.booleans(),
)
def test_an_argument_that_is_wrong_is_refused_by_name(
    shape: CallShape, role: str, form: str, ambient: str, backend: str | None, *, warm: bool
) -> None:
    """Cold, and after a good call of the same kind, whose checks are not repeated."""
    # Without tokens an argument without columns is as empty as it should be, but for its shape.
    shape = dataclasses.replace(shape, M=max(shape.M, 1), spoilt="nothing")
    call = make_call(shape)
    if warm:
        moe_forward(*call.arguments)
    setattr(call, role, FOREIGN[form](getattr(call, role)))
    with watched(AREA), AMBIENT[ambient]():
        result = answer_or_refusal(AREA, lambda: moe_forward(*call.arguments, backend=backend))
        assert isinstance(result, InvalidInputError), f"accepted: {result}"
        assert role in str(result) or "experts" in str(result), result
        again = answer_or_refusal(AREA, lambda: explain(*call.arguments))
        assert isinstance(again, InvalidInputError)
    assert not get_dispatcher("cpu").quarantine.entries(), "the caller's fault was booked on a backend"


WEIGHTS = ("gate_up", "down", "gate_up_scale", "down_scale", "gate_up_bias", "down_bias", "activation", "interleaved")


@attack(1200)
@given(
    shape=call_shapes(),
    name=st.sampled_from(WEIGHTS),
    form=st.sampled_from([*sorted(FOREIGN), *sorted(ALIKE)]),
    scalar=SCALARS,
)
def test_weights_that_are_wrong_are_refused_by_name(shape: CallShape, name: str, form: str, scalar: object) -> None:
    """Or accepted, and then the layer is computed."""
    layer = draw_layer(shape.layer)
    tensor = {
        "gate_up": layer.gate_up, "down": layer.down,
        **dict(zip(("gate_up_scale", "down_scale"), layer.scales or (), strict=False)),
        **dict(zip(("gate_up_bias", "down_bias"), layer.biases or (), strict=False)),
    }.get(name)  # fmt: skip
    try:
        changed = scalar if tensor is None else ({**FOREIGN, **ALIKE}[form])(tensor)
    except (RuntimeError, IndexError, TypeError):
        assume(False)  # torch has no such tensor of three dimensions or in FP8
    call = make_call(shape)
    before = copies(call)
    with watched(AREA):
        wrapped = answer_or_refusal(AREA, lambda: wrap(layer, **{name: changed}))
        if isinstance(wrapped, MoEDispatchError):
            assert isinstance(wrapped, InvalidInputError)
            return
        call.experts, call.layer = wrapped, layer
        if wrapped.activation != layer.activation or wrapped.interleaved != layer.interleaved:
            call.layer = dataclasses.replace(
                layer, activation=wrapped.activation, interleaved=bool(wrapped.interleaved)
            )
        result = answer_or_refusal(AREA, lambda: moe_forward(*call.arguments))
        right_answer(call, result, before, shape.layer.dtype)


@attack(700)
@given(
    shape=layer_shapes(("fp32", "fp16")),
    topk=SCALARS | st.integers(1, 3),
    tokens=SCALARS | st.lists(SCALARS | st.integers(0, 4), max_size=3),
    act_dtype=st.sampled_from([None, torch.float32, torch.float16, torch.int32, "fp32", 5]),
    up_to=SCALARS | st.integers(0, 4),
    backend=SCALARS | NAMES,
)
def test_warm_up(shape: Any, topk: Any, tokens: Any, act_dtype: Any, up_to: Any, backend: Any) -> None:
    experts = wrap(draw_layer(shape))
    # What is valid and asks for a great many tokens may take as long as it likes.
    assume(not (type(up_to) is int and up_to > 8))
    assume(not any(type(count) is int and count > 64 for count in (tokens if isinstance(tokens, list | tuple) else ())))
    with watched(AREA):
        answer_or_refusal(AREA, lambda: warm_up(experts, topk, tokens, act_dtype, up_to=up_to, backend=backend))


PROBLEMS = st.fixed_dictionaries(
    {letter: st.sampled_from([1, 2, 3, 8, 64, 128, 600]) for letter in ("M", "K", "N", "E", "topk")},
    optional={
        "dtype": st.sampled_from(["bf16", "fp8"]),
        "activation": st.sampled_from(ACTIVATIONS),
        "bias": st.booleans(),
        "mode": st.sampled_from(["eager", "graph"]),
        "needs_grad": st.booleans(),
    },
)
FIELDS = [field.name for field in dataclasses.fields(MoEProblem)]
CHANGES = st.dictionaries(
    st.sampled_from(FIELDS), SCALARS | st.sampled_from([0, -1, 1 << 31, 1 << 60, (9, 0), "cpu", "fp16"]), max_size=2
)
MACHINES = (None, "h200", "a100-80gb", "l40s", "b200", "mi300x")


@attack(900)
@given(arguments=PROBLEMS, changes=CHANGES, machine=st.sampled_from(MACHINES))
def test_problems_and_their_explanations(
    arguments: dict[str, Any], changes: dict[str, Any], machine: str | None
) -> None:
    """A problem is refused, or explained on any machine: something is chosen, or every backend has its reasons."""
    with watched(AREA):
        problem = answer_or_refusal(AREA, lambda: MoEProblem(**arguments | changes))
        if isinstance(problem, MoEDispatchError):
            assert isinstance(problem, InvalidInputError)
            return
        here = Machine.load(machine) if machine else None
        explanation = answer_or_refusal(AREA, lambda: explain(problem, machine=here))
        if isinstance(explanation, MoEDispatchError):
            assert machine is None
            return
        named = {candidate.choice.backend for candidate in explanation.candidates} | set(explanation.unranked)
        assert named == set(BACKENDS.names())
        assert str(explanation)
        if explanation.chosen is None:
            assert all(candidate.against for candidate in explanation.candidates)
