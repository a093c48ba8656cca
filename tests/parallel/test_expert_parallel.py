"""Layers that are spread over the ranks of a gloo group: results, agreement, and the choice of the exchange."""

import importlib.util
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from moe_dispatch.dispatch.settled_plans import SETTLING_CALLS
from moe_dispatch.testing import CASES, Precision
from tests.parallel import programs, twins
from tests.support.ranks import Raised, Ranks, ranks

# Of 8 experts three ranks hold 2, 3 and 3.
NAMES = [name for name, case in CASES.items() if case.E >= 3]
FEWEST = ["M=17", "ids outside 0…E-1", "a NaN in one of many tokens"]
FEW = [*FEWEST, "gpt-oss", "neither of 128, several blocks"]
SERVES = (("sharded", "gather"), ("sharded", "alltoall"), ("replicated", "gather"), ("replicated", "replicated"))
# Exchanges for GPUs, whose kernels are interpreted here.
WITHOUT_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
TWINS = [pytest.param("sharded", name, marks=WITHOUT_TRITON) for name in twins.TWINS]
SHARDED = pytest.mark.parametrize(("tokens", "exchange"), [*SERVES[:2], *TWINS])


@pytest.mark.parametrize("spread", ["even", "uneven", "none on the last"])
@SHARDED
def test_sharded_tokens_conform(three: Ranks, tokens: str, exchange: str, spread: str) -> None:
    names = FEWEST if exchange in twins.TWINS else NAMES if spread == "uneven" else FEW
    assert three.run(programs.conformance, names, programs.FP32, tokens, exchange, spread) == [[], [], []]


@pytest.mark.parametrize("exchange", ["gather", "replicated"])
def test_replicated_tokens_conform(three: Ranks, exchange: str) -> None:
    assert three.run(programs.conformance, NAMES, programs.FP32, "replicated", exchange, "") == [[], [], []]


@pytest.mark.parametrize("precision", [Precision("bf16", "bf16"), Precision("fp8", "bf16")], ids=str)
@pytest.mark.parametrize(("tokens", "exchange"), SERVES)
def test_other_dtypes_conform(three: Ranks, tokens: str, exchange: str, precision: Precision) -> None:
    assert three.run(programs.conformance, FEW, precision, tokens, exchange, "uneven") == [[], [], []]


@pytest.mark.parametrize(("tokens", "exchange"), [*SERVES, *TWINS])
def test_all_tokens_may_need_one_rank(three: Ranks, tokens: str, exchange: str) -> None:
    assert max(three.run(programs.all_to_one_rank, tokens, exchange)) < 1e-6


def test_four_ranks(tmp_path: Any) -> None:
    with ranks(4, tmp_path) as four:
        for tokens, exchange in SERVES:
            for spread in ("uneven", "none on the last") if tokens == "sharded" else ("",):
                faults = four.run(programs.conformance, FEWEST, programs.FP32, tokens, exchange, spread)
                assert faults == [[], [], [], []], (tokens, exchange, spread)
            assert max(four.run(programs.all_to_one_rank, tokens, exchange)) < 1e-6
        for tokens in ("sharded", "replicated"):
            first, *others = four.run(programs.warmed, tokens)
            assert others == [first] * 3, "all ranks choose alike"


@SHARDED
def test_padding_rows_run_no_expert(three: Ranks, tokens: str, exchange: str) -> None:
    every = three.run(programs.slots_that_run, exchange, [1, 0, 9])
    assert sum(ran for ran, _ in every) == sum(own for _, own in every) == 20


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "exchange"), [*(case for case in SERVES if case[1] != "alltoall"), *TWINS])
def test_columns_may_be_divided(three: Ranks, tokens: str, exchange: str, *, bias: bool) -> None:
    assert max(three.run(partial(programs.columns, tokens, exchange, bias=bias))) < 1e-5


@pytest.mark.parametrize("tokens", ["sharded", "replicated"])
def test_every_rank_chooses_the_exchange_that_was_fastest(three: Ranks, tokens: str) -> None:
    every = three.run(programs.warmed, tokens)
    assert every[0] == every[1] == every[2]
    for chosen, us, failed in every[0]:
        assert set(us) == {exchange for serves, exchange in SERVES if serves == tokens}
        assert us[chosen] <= min(us.values()) * 1.02
        assert not failed


@pytest.mark.parametrize("other", ["alltoall", "replicated"])
def test_the_record_checks_what_it_measures(three: Ranks, tmp_path: Any, other: str) -> None:
    divisions = ["experts", "columns"]
    (wrong, rows), *_ = three.run(programs.recorded, str(tmp_path), other == "replicated", divisions)
    assert wrong == 0
    names = {division: ["gather", other, "chosen"] for division in divisions}
    if other == "alltoall":  # which sends a row to the ranks that hold its experts: all of them
        names["columns"].remove(other)
    every = [(M, division, name) for M in (4, 1) for division in divisions for name in names[division]]
    assert [(row["M"], row["division"], row["exchange"]) for row in rows] == every
    for M, division in itertools.product((4, 1), divisions):
        *timed, choice = (row for row in rows if (row["M"], row["division"]) == (M, division))
        times = {row["exchange"]: row["us"] for row in timed}
        assert choice["alike"]
        assert choice["regret"] == pytest.approx(times[choice["chosen"]] / min(times.values()) - 1, abs=2e-3)
    for row in rows:
        if row["exchange"] == "chosen":
            continue
        assert row["error"] < 1e-5
        assert row["speedup"] == pytest.approx(row["one_gpu_us"] / row["us"], rel=2e-3)
        assert min(row["us"], row["experts_us"], row["host_us"]) > 0


def test_a_new_choice_serves_the_next_call(three: Ranks) -> None:
    assert three.run(programs.exchanges_that_ran) == [["gather", "alltoall"]] * 3


def test_the_slowest_rank_decides_and_a_failure_on_one_rank_bars_everywhere(three: Ranks) -> None:
    every = three.run(programs.race_with_others)
    assert every[0] == every[1] == every[2]
    chosen, us, failed, reasons = every[0]
    assert us["slow"] > 50_000
    assert chosen in {"gather", "alltoall"}
    assert set(failed) == {"broken"}
    assert "no such luck (rank 2)" in failed["broken"]
    assert "failed in warm_up" in reasons[0]


@pytest.mark.parametrize("stated", [True, False])
def test_a_settled_kind_of_call_is_not_checked(three: Ranks, *, stated: bool) -> None:
    """And whatever differs from it is."""
    assert three.run(programs.calls_that_are_checked, stated) == [(SETTLING_CALLS + 1, [1, 1, 1, 0])] * 3


def test_a_gradient_is_refused_after_settled_calls_too(three: Ranks) -> None:
    for raised in three.run(programs.gradients_after_settled_calls):
        assert len(raised) == 2
        assert all("gradient" in reason for reason in raised)


def test_counts_that_are_stated_are_not_exchanged(three: Ranks) -> None:
    assert three.run(programs.stated_counts) == [(1, 0)] * 3


def test_a_backend_that_one_rank_lacks_runs_on_none(three: Ranks) -> None:
    assert three.run(programs.backends_that_ran) == [["reference"]] * 3


def test_a_rank_that_runs_out_of_memory_goes_on_by_itself(three: Ranks) -> None:
    """In three calls of 36 tokens, which are split to four or five, it fails once with each number on the way."""
    every = three.run(programs.lack_memory_on_one_rank)
    assert max(error for error, _ in every) < 1e-5
    assert [failures for _, failures in every] == [0, 0, 3]


MISMATCHES: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "policy": (
        partial(programs.create_with, "MOE_DISPATCH_POLICY", "rules"), ("MOE_DISPATCH_POLICY", "('rules',) on rank 2")
    ),
    "minimize": (partial(programs.create_with, "MOE_DISPATCH_MINIMIZE", "energy"), ("'energy' on rank 2",)),
    "max_tokens": (
        partial(programs.create_with, "", "", max_tokens=(4, 8)), ("max_tokens: 4 on rank 0, 4 on rank 1, 8 on rank 2",)
    ),
    "calibration": (
        programs.with_another_calibration, ("digest of the policies' tables", "one MOE_DISPATCH_CACHE_DIR serves")
    ),
    "N": (partial(programs.layer_with, "N"), ("N: 16 on rank 0, 16 on rank 1, 32 on rank 2",)),
    "experts": (partial(programs.layer_with, "experts"), ("2 + 2 + 2 experts, and experts=7",)),
    "topk": (partial(programs.call_with, "topk"), ("topk: 2 on rank 0",)),
    "tokens": (partial(programs.call_with, "tokens"), ("tokens: 4 on rank 0",)),
    "backend": (partial(programs.call_with, "backend"), ("named backend: ",)),
}  # fmt: skip


@pytest.mark.parametrize("other", MISMATCHES)
def test_ranks_that_do_not_agree_are_all_refused(three: Ranks, other: str) -> None:
    program, words = MISMATCHES[other]
    every = three.outcomes(program)
    assert [type(each) for each in every] == [Raised] * 3, every
    assert {each.name for each in every} <= {"ExpertParallelMismatchError", "InvalidInputError"}, every
    assert all(word in each.text for each in every for word in words), every


def test_a_name_is_checked_where_nothing_runs(three: Ranks) -> None:
    assert [each.name for each in three.outcomes(programs.call_without_tokens)] == ["UnknownNameError"] * 3


@pytest.mark.parametrize(
    ("what", "number", "said"),
    [
        ("hidden_states", 1, "hidden_states is torch.float64"),
        ("weights", 2, "the weights changed since"),
        ("backend", 1, "no backend is called 'no_such'"),
    ],
)
def test_arguments_that_one_rank_refuses_are_refused_by_all(three: Ranks, what: str, number: int, said: str) -> None:
    (first, M), (second, _), (third, _) = three.run(programs.refuse_on_one_rank, what)
    call = SETTLING_CALLS + 2 + number
    assert first == second == f"rank 2 refuses the arguments of call {call}, as its own error says; nothing was run"
    assert third.startswith(said)
    assert M == programs.LAYER.M, "the next call works"


@pytest.mark.parametrize("variable", [False, True])
def test_a_backend_that_cannot_run_the_layer_costs_one_call(three: Ranks, *, variable: bool) -> None:
    """It ended the group: every rank had to be started anew for a name."""
    assert three.run(programs.name_what_cannot_run, variable) == [("BackendUnsupportedError", programs.LAYER.M)] * 3


def test_what_is_no_layer_and_no_number_is_refused_by_name(three: Ranks) -> None:
    assert three.run(programs.unlike_what_is_said_of_bad_arguments) == [[]] * 3


FAULTS = {
    "killed": "its process has ended",
    "late": "nothing was heard of it",
    "failed": "it raised ValueError: this rank's experts failed",
}


@pytest.mark.parametrize("how", FAULTS)
def test_a_lost_rank_is_named_by_all_others(how: str, tmp_path: Any) -> None:
    timeout, victim = 3.0, 1
    with ranks(3, tmp_path) as started:
        every = started.outcomes(programs.lose_a_rank, how, victim, timeout, but=[victim] if how == "killed" else [])
    for rank in (0, 2):
        assert isinstance(every[rank], tuple), every[rank]
        name, text, lost, call, seconds, again = every[rank]
        assert name == again == "ExpertParallelLostError", text
        assert lost == (victim,), text
        assert call == 2
        assert f"rank {victim} in call 2: {FAULTS[how]}" in text
        assert seconds < timeout + 5
    if how == "late":
        assert every[victim][0] == "ExpertParallelLostError"
        assert "every rank waited for the others in vain" in every[victim][1]
