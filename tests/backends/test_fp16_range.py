"""FP16 layers whose experts put out more than FP16 can hold, although the weighted sum does not.

Whether such a layer is finite must not depend on which backend was chosen, so on how many tokens there are.
"""

from typing import Any

import pytest
import torch

from moe_dispatch.backends.reference import ReferenceBackend, ReferenceConfig
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine
from moe_dispatch.registry import BACKENDS
from moe_dispatch.testing import Case, Inputs, Precision, conform, make_inputs, truth
from tests.support.interpreter import with_few_programs
from tests.support.refusals import available, require

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
FP16_MAX = 65504.0
FP16 = Precision("fp16", "fp16")
CASES = {
    "silu": Case(M=7, E=4, topk=2, K=64, N=64),
    "gpt-oss": Case(M=7, E=4, topk=2, K=64, N=64, activation="swiglu_oai", bias=True, interleaved=True),
    "some experts elsewhere": Case(M=9, E=4, topk=2, K=64, N=64, routing="sentinels"),
}


def overflowing(case: Case, device: str) -> Inputs:
    """Experts whose output reaches three times the greatest FP16 number, and weights that make about 1500 of it."""
    plain = make_inputs(case, FP16, device)
    hidden, experts, weights, ids = plain.arguments
    everything = torch.ones_like(weights)
    largest = float(truth(hidden, experts, everything, ids).abs().max())
    down = (experts.down.float() * (3 * FP16_MAX / largest)).to(experts.down.dtype)
    tensors: dict[str, Any] = dict(experts.tensors()) | {"down": down}
    experts = ExpertWeights(**tensors, activation=experts.activation, interleaved=experts.interleaved)
    weights = weights * (1500 / (3 * FP16_MAX))
    expected = truth(hidden, experts, weights, ids)
    assert float(truth(hidden, experts, torch.ones_like(weights), ids).abs().max()) > FP16_MAX
    assert float(expected.abs().max()) < 0.1 * FP16_MAX
    return Inputs(hidden, experts, weights, ids, expected)


def heavy(device: str) -> Inputs:
    """An intermediate of 40000 and a weight of 2.5, whose product exceeds FP16's range; the result is 50000."""
    M, E, K, N = 5, 2, 64, 64
    gate_up = torch.full((E, N, K), 200 / K, dtype=torch.float16, device=device)
    down = torch.full((E, K, N), 20000 / (40000 * N), dtype=torch.float16, device=device)
    experts = ExpertWeights(gate_up, down, activation="relu2")
    hidden = torch.ones(M, K, dtype=torch.float16, device=device)
    weights, ids = torch.full((M, 1), 2.5, device=device), torch.arange(M, device=device)[:, None] % E
    return Inputs(hidden, experts, weights, ids, truth(hidden, experts, weights, ids))


@DEVICES
@pytest.mark.parametrize("name", BACKENDS.names())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_experts_may_exceed_the_range_of_fp16(name: str, case: Case, device: str) -> None:
    check_finite(name, overflowing(case, device))


@DEVICES
@pytest.mark.parametrize("name", BACKENDS.names())
def test_weights_above_one_carry_nothing_beyond_the_range_of_fp16(name: str, device: str) -> None:
    """torch_grouped weights rows before the second product."""
    check_finite(name, heavy(device))


def check_finite(name: str, inputs: Inputs) -> None:
    """A backend's result is right, which is finite."""
    backend = available(name, inputs.hidden_states.device)
    M, topk = inputs.topk_ids.shape
    problem = inputs.experts.problem(M, topk, torch.float16, backend.machine.capability)
    require(backend, problem)
    for config in backend.configs(problem)[: 2 if inputs.hidden_states.is_cuda else 1]:
        conform(backend, with_few_programs(config), inputs)


def test_the_reference_multiplies_fp16_in_fp32_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it always does, so this looks at the dtypes of its products and not at a result."""
    inputs = make_inputs(CASES["silu"], FP16, "cpu")
    linear = torch.nn.functional.linear
    dtypes: set[torch.dtype] = set()

    def watched(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        dtypes.update((rows.dtype, weight.dtype))
        return linear(rows, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    ReferenceBackend(Machine.inspect("cpu")).run(*inputs.arguments, ReferenceConfig())
    assert dtypes == {torch.float32}
