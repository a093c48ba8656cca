"""The kernels that carry tokens between ranks, in Triton's interpreter: their protocol, and whole layers over them."""

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch

from moe_dispatch.backends.exchange import pack
from moe_dispatch.parallel.direct import DirectExchange
from moe_dispatch.testing import Precision
from tests.parallel import programs, twins
from tests.support.ranks import Ranks

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("skewed", "quantizes", "aside"),
    [(False, False, False), (True, False, False), (True, True, False), (True, False, True), (True, True, True)],
)
def test_every_round_carries_what_was_sent(three: Ranks, *, skewed: bool, quantizes: bool, aside: bool) -> None:
    rounds = partial(twins.rounds_of_the_protocol, 9, skewed=skewed, quantizes=quantizes, aside=aside)
    assert three.run(rounds) == [[], [], []]


@pytest.mark.parametrize("stores", [False, True])
def test_a_rank_that_comes_too_late_is_named_and_all_results_are_nan(three: Ranks, *, stores: bool) -> None:
    victim = 1
    every = three.run(partial(twins.a_rank_that_comes_too_late, victim, 0.0005, stores=stores))
    for rank, (right, nan, (name, text)) in enumerate(every):
        assert right
        assert nan
        if rank != victim:
            assert name == "ExpertParallelLostError", text
            assert "lost rank 1" in text
            assert "whose results are NaN" in text


def test_layers_in_fp8_conform_where_codes_travel(three: Ranks) -> None:
    names, precision = ["M=17", "ids outside 0…E-1", "a NaN in one of many tokens"], Precision("fp8", "fp16")
    aside = partial(programs.conformance, rows_aside=0)
    assert three.run(aside, names, precision, "sharded", "direct_fp8_twin", "uneven") == [[], [], []]
    stores = partial(programs.conformance, backend="triton_persistent")
    assert three.run(stores, ["M=3"], precision, "sharded", "direct_fp8_twin", "uneven") == [[], [], []]


def test_timed_transfers_carry_results_also_where_experts_store_them(three: Ranks) -> None:
    assert three.run(programs.what_transfers_send, "direct_twin") == [["Tensor"]] * 3


def test_what_direct_cannot_serve_is_said() -> None:
    exchange = DirectExchange.__new__(DirectExchange)  # pure questions, which need no group
    assert exchange.unsupported_reasons(twins.KIND) == ()
    others: list[dict[str, Any]] = [{"hosts": 2}, {"K": 60}, {"tokens": "replicated"}]
    reasons = [exchange.unsupported_reasons(dataclasses.replace(twins.KIND, **other)) for other in others]
    assert reasons == [
        ("needs all ranks on one host, got 2 hosts",),
        ("needs rows of a multiple of 16 bytes, got 120",),
        ("takes tokens that are sharded, got replicated",),
    ]


@pytest.mark.parametrize(("M", "capacity", "K", "topk", "E"), [(3, 5, 16, 2, 9), (0, 2, 8, 3, 4), (40, 40, 64, 8, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packing_is_what_it_is_in_torch(
    dtype: torch.dtype, M: int, capacity: int, K: int, topk: int, E: int
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    hidden, weights = torch.randn(M, K, generator=generator).to(dtype), torch.rand(M, topk, generator=generator)
    ids = torch.randint(-2, E + 2, (M, topk), generator=generator)
    ids[:1] += 1 << 40  # outside, and inside where 32 bits are cut off
    rows = capacity + pack.spare_rows(capacity, topk, K * dtype.itemsize)
    wires = [torch.zeros(2 * rows, K, dtype=dtype) for _ in range(2)]
    for wire, packs in zip(wires, (pack.pack_tokens, pack.pack_tokens_torch), strict=True):
        for segment in wire.view(2, rows, K):
            packs(hidden, weights, ids, segment, capacity=capacity, E=E)
    assert torch.equal(wires[0].view(torch.uint8), wires[1].view(torch.uint8))
    facts = {"ranks": 2, "capacity": capacity, "topk": topk, "first_expert": 3}
    for left, right in zip(
        pack.unpack_slots(wires[0], **facts), pack.unpack_slots_torch(wires[1], **facts), strict=True
    ):
        assert torch.equal(left, right)
