"""An activation is one string, whichever way it was written."""

import math

import pytest
import torch

from moe_dispatch.activations import SWIGLU_OAI, SwiGLU, canonical, swiglu
from moe_dispatch.backend import Requirements
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.numerics import activate_torch
from moe_dispatch.policies.measurements.schema import LayerShape, layer_key
from moe_dispatch.problem import MoEProblem

ALL = "swiglu(alpha=1.5,limit=2,shift=0.5,gate_cap=2,up_cap=3)"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("swiglu()", "silu"),
        ("swiglu(alpha=1, shift=0.0)", "silu"),
        ("swiglu(shift=1,limit=7.0,alpha=1.702)", "swiglu_oai"),
        (" swiglu( limit = 1e1 ) ", "swiglu(limit=10)"),
        (ALL, ALL),
        ("relu2", "relu2"),
    ],
)
def test_the_same_function_has_one_string(written: str, expected: str) -> None:
    assert canonical(written) == expected
    experts = ExpertWeights(torch.ones(2, 8, 8), torch.ones(2, 8, 4 if expected != "relu2" else 8), activation=written)
    problem = MoEProblem(M=1, K=8, N=4, E=2, topk=1, activation=written)
    assert experts.activation == problem.activation == expected
    assert problem == MoEProblem(M=1, K=8, N=4, E=2, topk=1, activation=expected)
    shape = LayerShape(K=8, N=4, E=2, topk=1, dtype="bf16", act_dtype="bf16", activation=written)
    assert shape.key == layer_key(problem)


def test_a_string_and_its_parameters_are_each_others_inverse() -> None:
    assert swiglu("silu") == SwiGLU()
    assert swiglu("swiglu_oai") == SWIGLU_OAI
    assert swiglu("gelu") is None
    assert swiglu(ALL) == SwiGLU(1.5, 2, 0.5, 2, 3)
    assert str(SwiGLU(1.5, 2, 0.5, 2, 3)) == ALL
    third = SwiGLU(alpha=1 / 3)
    assert swiglu(str(third)) == third


@pytest.mark.parametrize(
    "wrong",
    ["swiglu", "swish", "swiglu(limit)", "swiglu(limit=x)", "swiglu(beta=1)", "swiglu(limit=1,limit=2)",
     "swiglu(limit=7", "swiglu(limit=0)", "swiglu(alpha=-1)", "swiglu(shift=inf)", "swiglu(up_cap=nan)", None, 7],
)  # fmt: skip
def test_what_is_none_is_refused_with_what_is_allowed(wrong: str) -> None:
    with pytest.raises(InvalidInputError, match=r"must be (one of silu, gelu|positive, got|a finite number, got)"):
        canonical(wrong)


def test_the_formula() -> None:
    gate, up = torch.tensor([[-3.0, 0.5, 1.5, 9.0]]), torch.tensor([[-5.0, 0.25, 1.0, 5.0]])
    outs = activate_torch(torch.cat([gate, up], 1), ALL)[0].tolist()
    for out, raw_gate, raw_up in zip(outs, gate[0].tolist(), up[0].tolist(), strict=True):
        g, u = min(raw_gate, 2.0), max(-2.0, min(raw_up, 2.0))
        expected = (3 * math.tanh(u / 3) + 0.5) * 2 * math.tanh(g / 2) / (1 + math.exp(-1.5 * g))
        assert out == pytest.approx(expected, rel=1e-5)


def test_a_backend_without_parameters_says_so() -> None:
    problem = MoEProblem(M=1, K=8, N=4, E=2, topk=1, activation=ALL)
    assert not Requirements({"bf16": (8, 0)}).reasons_against(problem)
    (reason,) = Requirements({"bf16": (8, 0)}, activations=frozenset({"silu"})).reasons_against(problem)
    assert ALL in reason
