"""Calls over rows that came from several ranks: which backend gets them, and what follows where it cannot take them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch.backend import ArrivedInputs, PeerRows
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.numerics import QuantizedRows, quantize_rows_torch
from moe_dispatch.problem import MoEProblem
from moe_dispatch.testing import Case, Precision, make_inputs, relative_error
from tests.core.test_dispatcher import ran
from tests.support.fakes import Honest, ranked

pytestmark = pytest.mark.usefixtures("fixed_policy", "no_grad")


class Taking(Honest):
    """Takes quantised rows, and notes what it was given."""

    name = "taking"
    given: list[type] = []  # noqa: RUF012 - emptied by each test

    def takes_quantized_rows(self, problem: MoEProblem) -> bool:
        return True

    def run_into(self, hidden_states: Any, *others: Any) -> Tensor:
        self.given.append(type(hidden_states))
        if isinstance(hidden_states, QuantizedRows):
            hidden_states = hidden_states.dequantized().to(hidden_states.act_dtype)
        return super().run_into(hidden_states, *others)


class Failing(Taking):
    """Says that it takes them, and raises."""

    name = "failing"

    def run_into(self, hidden_states: Any, *others: Any) -> Tensor:
        raise RuntimeError("no such kernel")


class Storing(Honest):
    """Stores in the memory of ranks."""

    name = "storing"
    stores_to_peers = True

    def run_into(self, *arguments: Any) -> Any:
        assert isinstance(arguments[-1], PeerRows)
        return arguments[-1]


def arrived(M: int = 3) -> tuple[ArrivedInputs, Tensor]:
    inputs = make_inputs(Case(M=M, E=4, K=256, N=128), Precision("fp8", "fp16"), "cpu")
    hidden, experts, weights, ids = inputs.arguments
    rows = QuantizedRows(*quantize_rows_torch(hidden), hidden.dtype)
    return ArrivedInputs(rows, experts, weights, ids), inputs.truth


def test_the_first_backend_that_takes_quantised_rows_gets_them() -> None:
    inputs, truth = arrived()
    Taking.given.clear()
    with ranked(Honest, Taking):
        out = get_dispatcher("cpu").arrived.forward(inputs)
        assert ran() == {"taking": 1}
    assert isinstance(out, Tensor)
    assert out.dtype == torch.float16
    assert Taking.given == [QuantizedRows]
    assert relative_error(out, truth) < 2e-2


def test_a_named_backend_that_does_not_take_them_gets_dequantised_rows() -> None:
    inputs, truth = arrived()
    with ranked(Taking, Honest):
        out = get_dispatcher("cpu").arrived.forward(inputs, "honest")
        assert ran() == {"honest": 1}
    assert isinstance(out, Tensor)
    assert relative_error(out, truth) < 2e-2


def test_a_backend_that_fails_is_barred_and_another_one_runs() -> None:
    inputs, truth = arrived()
    with ranked(Failing, Honest):
        out = get_dispatcher("cpu").arrived.forward(inputs)
        assert ran() == {"honest": 1}
        assert [entry.backend for entry in get_dispatcher("cpu").quarantine.entries()] == ["failing"]
    assert isinstance(out, Tensor)
    assert relative_error(out, truth) < 2e-2


@pytest.mark.parametrize(("M", "stores"), [(3, False), (300, True)])
def test_many_rows_go_to_the_memory_of_their_ranks(M: int, *, stores: bool) -> None:
    inputs, _ = arrived(M)
    peers = PeerRows(torch.zeros(1, dtype=torch.int64), 0, M, torch.empty(1, dtype=torch.float16))
    assert isinstance(inputs.rows, QuantizedRows)
    inputs = inputs._replace(rows=inputs.rows.dequantized().half(), out=peers)
    with ranked(Storing, Honest):
        out = get_dispatcher("cpu").arrived.forward(inputs)
        assert (out is peers) == stores
