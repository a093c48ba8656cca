"""What expert parallelism is made of, each by itself."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_dispatch.errors import InvalidInputError
from moe_dispatch.parallel import exchange as exchanges
from moe_dispatch.parallel.all_to_all import rounded_rows
from moe_dispatch.parallel.exchange import CallKind, Exchange
from moe_dispatch.parallel.expert_parallel import ExpertParallel
from moe_dispatch.parallel.parts import columns_of, share_of_columns
from moe_dispatch.parallel.placement import Placement
from moe_dispatch.parallel.registry import EXCHANGES
from moe_dispatch.parallel.watch import ProcessIdentity
from moe_dispatch.problem import DType
from moe_dispatch.testing import Case, Precision, make_inputs, relative_error, truth
from tests.parallel.twins import KIND


def test_ids_outside_the_layer_belong_to_no_rank() -> None:
    place = Placement(rank=1, held=(2, 3, 3))
    ids = torch.tensor([[0, 2], [4, 5], [-1, 8], [2**40, -(2**40)], [2**32 + 3, 7]])
    wire = place.wire_ids(ids)
    assert wire.dtype == torch.int32
    assert place.destinations(wire).tolist() == [
        [True, True, False], [False, True, True], [False] * 3, [False] * 3, [False, False, True],
    ]  # fmt: skip
    local = place.local_ids(wire)
    mine = (local >= 0) & (local < 3)
    assert local[mine].tolist() == [0, 2]
    owners = place.destinations(torch.arange(8, dtype=torch.int32)[:, None])
    assert owners.nonzero().tolist() == [[e, rank] for e, rank in enumerate([0, 0, 1, 1, 1, 2, 2, 2])]


FORMS = [
    ("fp32", {}), ("fp32", {"interleaved": True, "bias": True}), ("fp32", {"transposed": True}),
    ("fp32", {"transposed": True, "interleaved": True}), ("fp32", {"activation": "relu2"}),
    ("fp8", {"bias": True}), ("fp8", {"interleaved": True}), ("fp8", {"activation": "relu2"}),
    ("fp8_channel", {}), ("fp8_channel", {"interleaved": True}), ("mxfp4", {}), ("mxfp4", {"interleaved": True}),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "form"), FORMS)
def test_shares_of_columns_add_up_to_the_layer(dtype: DType, form: dict[str, Any]) -> None:
    """In every form of weights: each share is a layer of its own, which the reference runs."""
    precision = Precision(dtype, "fp32" if dtype == "fp32" else "bf16")
    inputs = make_inputs(Case(M=5, E=4, topk=2, K=128, N=384, **form), precision, "cpu")
    shares = [columns_of(share_of_columns(inputs.experts, rank, 3), rank) for rank in range(3)]
    for name, tensor in shares[1].tensors():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, f"{name} keeps the whole layer's memory"
    hidden, _, weights, ids = inputs.arguments
    # Not with quantised activations, as a row's multiplier follows from the columns that there are.
    whole, *partial = (
        truth(hidden, each, weights, ids, quantize_activations=False) for each in (inputs.experts, *shares)
    )
    assert relative_error(torch.stack(partial).sum(0), whole) < 1e-5
    same = share_of_columns(inputs.experts, 0, 1)
    for (_, ours), (_, theirs) in zip(same.tensors(), inputs.experts.tensors(), strict=True):
        assert torch.equal(*(each.contiguous().view(torch.uint8) for each in (ours, theirs)))
        assert ours.data_ptr() != theirs.data_ptr()


@pytest.mark.parametrize(
    ("dtype", "N", "said"),
    [("fp32", 32, "multiple of 3;"), ("fp8", 256, "multiple of 3 × 128"), ("mxfp4", 128, "multiple of 3 × 32")],
)
def test_columns_that_cannot_be_divided_are_refused(dtype: DType, N: int, said: str) -> None:
    experts = make_inputs(Case(M=1, E=2, topk=1, K=128, N=N), Precision(dtype, "bf16"), "cpu").experts
    with pytest.raises(InvalidInputError, match=said):
        share_of_columns(experts, 0, 3)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 255, 257, 1000, 16385])
def test_arriving_rows_are_padded_by_at_most_an_eighth(count: int) -> None:
    room = rounded_rows(count)
    assert count <= room <= count * 9 / 8


def test_arriving_rows_have_few_counts() -> None:
    assert len({rounded_rows(count) for count in range(1, 1 << 14)}) < 130


def test_every_exchange_says_what_speaks_against_it() -> None:
    exchanges: dict[str, type[Exchange]] = {name: EXCHANGES.load(name) for name in EXCHANGES.names()}
    reasons = {name: exchange.requirements.reasons_against(KIND) for name, exchange in exchanges.items()}
    assert reasons["gather"] == reasons["alltoall"] == []
    assert reasons["replicated"] == ["takes tokens that are replicated, got sharded"]
    captured = CallKind(**{**vars(KIND), "mode": "graph", "division": "columns"})
    assert exchanges["alltoall"].requirements.reasons_against(captured) == [
        "takes a layer divided by experts, got columns", "cannot be captured in a CUDA graph",
    ]  # fmt: skip
    assert exchanges["gather"].requirements.reasons_against(captured) == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("deep_ep", ["needs sgl-deep-ep 0.1.0, got none", "needs torch 2.13, for which its wheels are built"]),
        ("nccl_ep", ["needs nccl-extensions 0.1.0, got none", "needs NCCL 2.30.7, got 2.28.9"]),
    ],
)
def test_an_exchange_of_a_library_says_what_it_lacks(
    name: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = EXCHANGES.load(name)(SimpleNamespace(library="gloo", device=None))  # type: ignore[arg-type]
    monkeypatch.setattr(exchanges, "torch_version", "2.11.0+cu130")
    monkeypatch.setattr(exchanges, "library_versions", lambda _: {"NCCL": "2.28.9"})
    transport, *lacking, uncalled = exchange.unavailable_reasons()
    assert transport == "takes a process group on nccl, got gloo"
    assert [reason.partition(", got 2.11.0")[0] for reason in lacking] == said
    assert "no code calls it yet" in uncalled
    monkeypatch.setattr(exchanges, "torch_version", "2.130.0")
    assert ("2.130.0" in str(exchange.unavailable_reasons())) == (name == "deep_ep"), "2.130 is not 2.13"
    monkeypatch.setattr(exchanges, "torch_version", "2.13.1")
    monkeypatch.setattr(exchanges, "library_version", lambda _: "0.1.0")
    monkeypatch.setattr(exchanges, "library_versions", lambda _: {"NCCL": "2.31.0"})
    assert exchange.unavailable_reasons() == (transport, uncalled)
    fp16 = dataclasses.replace(KIND, act_dtype="fp16")
    assert exchange.unsupported_reasons(fp16) == ("takes hidden_states in bf16, got fp16",)
    monkeypatch.setattr(exchanges, "library_version", lambda _: "")
    direct = EXCHANGES.load("direct")(exchange.collectives)
    assert direct.unavailable_reasons()[:2] == (transport, "needs triton, got none")


def test_a_process_that_ended_is_gone() -> None:
    assert not ProcessIdentity.here().gone
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    host = ProcessIdentity.here().host
    started = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
    identity = ProcessIdentity(host, child.pid, started)
    assert not identity.gone
    assert ProcessIdentity(host, os.getpid(), "0").gone, "the number was given to another process"
    assert not ProcessIdentity("another host", child.pid, "0").gone, "nothing is known of another host's processes"
    child.kill()
    deadline = time.monotonic() + 250
    while not identity.gone and time.monotonic() < deadline:  # a zombie, as nothing has waited for it
        time.sleep(0.01)
    assert identity.gone
    child.wait()
    assert identity.gone


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": "split"}, "'sharded' or 'replicated', got 'split'"),
        ({"max_tokens": 0}, "positive integer or None, got 0"),
        ({"timeout": 0}, "finite number of seconds above 0, got 0"),
        ({"first_timeout": "60"}, "finite number of seconds above 0, got '60'"),
        ({}, "torch.distributed is not initialised"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        ExpertParallel(**options)  # type: ignore[arg-type]
