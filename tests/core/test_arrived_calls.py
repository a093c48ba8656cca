"""Calls over rows that came from several ranks: which backend gets them, and what follows where it cannot take them."""

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import DeviceLostError, MoEDispatchWarning
from moe_dispatch.arrived_rows import ArrivedInputs, PeerRows, TravellingRows
from moe_dispatch.backend import Backend
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.numerics import QuantizedRows, quantize_rows_torch
from moe_dispatch.problem import MoEProblem
from moe_dispatch.testing import Case, Precision, make_inputs, relative_error
from tests.core.test_dispatcher import barred, lose_context, ran
from tests.support.fakes import Honest, ranked

pytestmark = pytest.mark.usefixtures("fixed_policy", "no_grad")


class Taking(Honest):
    """Takes quantised rows and no others."""

    name = "taking"

    def takes_quantized_rows(self, problem: MoEProblem) -> bool:
        return True

    def run_into(self, hidden_states: Any, *others: Any) -> Tensor:
        return super().run_into(hidden_states.dequantized().to(hidden_states.act_dtype), *others)


class Failing(Taking):
    name = "failing"

    def run_into(self, *_: Any) -> Tensor:
        raise RuntimeError("no such kernel")


class ReturningElsewhere(Taking):
    """Leaves the memory that it was given as it is."""

    name = "returning_elsewhere"

    def run_into(self, *arguments: Any) -> Tensor:
        return super().run_into(*arguments[:-1], torch.empty_like(arguments[-1]))


class Writing(Taking):
    """Writes to all of its inputs."""

    name = "writing"

    def run_into(self, rows: Any, experts: Any, topk_weights: Tensor, topk_ids: Tensor, *others: Any) -> Tensor:
        out = super().run_into(rows, experts, topk_weights, topk_ids, *others)
        for tensor in (rows.codes, rows.scale, topk_weights, topk_ids):
            tensor.zero_()
        return out


class WritingAndFailing(Writing):
    name = "writing_and_failing"

    def run_into(self, *arguments: Any) -> Tensor:
        super().run_into(*arguments)
        raise RuntimeError("no such kernel")


class FailingInGraphs(Failing):
    """Is chosen for CUDA graphs alone."""

    name = "failing_in_graphs"

    def further_reasons(self, problem: MoEProblem) -> tuple[str, ...]:
        return () if problem.mode == "graph" else ("serves graphs alone",)


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


@pytest.mark.parametrize(
    ("order", "named", "runs", "bars"),
    [
        ((Honest, Taking), None, "taking", []),
        ((Taking, Honest), "honest", "honest", []),
        ((Failing, Honest), None, "honest", ["failing"]),
        ((ReturningElsewhere, Honest), None, "honest", ["returning_elsewhere"]),
        ((Writing, Honest), None, "honest", ["writing"]),
        ((WritingAndFailing, Honest), None, "honest", ["writing_and_failing"]),
    ],
    ids=[
        "the first that takes them", "named, and takes dequantised ones", "in place of one that fails",
        "in place of one that returns other memory", "in place of one that writes to its inputs",
        "in place of one that does and fails",
    ],
)  # fmt: skip
def test_quantised_rows_go_to(order: tuple[type[Backend], ...], named: str | None, runs: str, bars: list[str]) -> None:
    inputs, truth = arrived()
    with ranked(*order):
        out = get_dispatcher("cpu").arrived.forward(inputs, named)
        assert ran() == {runs: 1}
        assert barred() == bars
    assert isinstance(out, Tensor)
    assert out.dtype == torch.float16
    assert relative_error(out, truth) < 2e-2


def test_a_backend_that_is_barred_runs_no_more() -> None:
    inputs, _ = arrived()
    with ranked(FailingInGraphs, Taking, Honest):
        dispatcher = get_dispatcher("cpu")
        assert dispatcher.arrived.warm_up(inputs), "the next backend is warmed up in place of one that fails"
        dispatcher.arrived.forward(inputs)
        plans = {plan.problem.mode: plan for plan in dispatcher.arrived._plans.values() if plan}
        assert {mode: plan.choice.backend for mode, plan in plans.items()} == {"eager": "taking", "graph": "taking"}
        dispatcher._recovery.bar(plans["eager"], "it failed in an ordinary call")
        dispatcher.arrived.forward(inputs)
        assert ran() == {"taking": 2, "reference": 1}


def test_a_backend_that_ran_before_is_not_blamed_for_a_lost_context(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _ = arrived()
    with ranked(Taking):
        dispatcher = get_dispatcher("cpu")
        dispatcher.arrived.forward(inputs)
        monkeypatch.setattr(QuantizedRows, "dequantized", lose_context)
        with pytest.raises(DeviceLostError, match="only a suspect"):
            dispatcher.arrived.forward(inputs)
        assert not dispatcher.quarantine.entries()


@pytest.mark.parametrize(("M", "stores"), [(3, False), (300, True)])
def test_many_rows_go_to_the_memory_of_their_ranks(M: int, *, stores: bool) -> None:
    inputs, _ = arrived(M)
    peers = PeerRows(torch.zeros(1, dtype=torch.int64), 0, M, torch.empty(1, dtype=torch.float16))
    inputs = inputs._replace(rows=inputs.ordinary()[0], out=peers)
    with ranked(Storing, Honest):
        assert (get_dispatcher("cpu").arrived.forward(inputs) is peers) == stores


class Arriving(Honest):
    """Takes rows and memory of other ranks, and is probed before it is trusted."""

    name = "arriving"
    needs_probe = True
    stores_to_peers = starts_before_arrival = True

    def takes_quantized_rows(self, problem: MoEProblem) -> bool:
        return True

    def run_into(self, rows: Any, *others: Any) -> Any:
        *arguments, out = others
        rows = self.arrived(rows) if isinstance(rows, TravellingRows) else rows
        if isinstance(rows, QuantizedRows):
            rows = self.dequantized(rows).to(rows.act_dtype)
        result = self.run(rows, *arguments)
        return self.stored(result, out) if isinstance(out, PeerRows) else out.copy_(result)

    def arrived(self, rows: TravellingRows) -> Any:
        return rows.wait()

    def dequantized(self, rows: QuantizedRows) -> Tensor:
        return rows.dequantized()

    def stored(self, result: Tensor, peers: PeerRows) -> PeerRows:
        for row, values in enumerate(result):
            address = int(peers.addresses[row // peers.rows]) + peers.offset + row % peers.rows * values.nbytes
            ctypes.memmove(address, values.data_ptr(), values.nbytes)
        return peers


class IgnoringScales(Arriving):
    def dequantized(self, rows: QuantizedRows) -> Tensor:
        return rows.codes.float()


class WritingToScales(Arriving):
    def dequantized(self, rows: QuantizedRows) -> Tensor:
        values = rows.dequantized()
        rows.scale.zero_()
        return values


class TakingItsOwnRows(Arriving):
    def arrived(self, rows: TravellingRows) -> Any:
        return rows.own.repeat(3, 1)[:5]


class StoringInReverse(Arriving):
    def stored(self, result: Tensor, peers: PeerRows) -> PeerRows:
        return super().stored(result.flip(0), peers)


class StoringNothing(Arriving):
    def stored(self, result: Tensor, peers: PeerRows) -> PeerRows:
        return peers


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (IgnoringScales, "relative error .* over quantised rows"),
        (WritingToScales, "it wrote to its inputs"),
        (TakingItsOwnRows, "relative error .* over travelling rows"),
        (StoringInReverse, "relative error .* into the memory of several ranks"),
        (StoringNothing, "relative error nan .* into the memory of several ranks"),
    ],
)
def test_a_foreign_backend_is_probed_with_what_other_ranks_send(wrong: type[Backend], says: str) -> None:
    inputs, truth = arrived()
    with ranked(wrong, Honest):
        with pytest.warns(MoEDispatchWarning, match=f"probe was wrong.*{says}.*'honest' runs instead"):
            out = get_dispatcher("cpu").forward(*inputs.ordinary())
        assert relative_error(out, truth) < 2e-2
        get_dispatcher("cpu").arrived.forward(inputs)
        assert ran() == {"honest": 1, "reference": 1}


def test_one_that_is_right_runs_what_other_ranks_send() -> None:
    inputs, truth = arrived()
    with ranked(Arriving, Honest):
        out = get_dispatcher("cpu").arrived.forward(inputs)
        assert ran() == {"arriving": 1}
    assert isinstance(out, Tensor)
    assert relative_error(out, truth) < 2e-2
