"""The kernels that carry tokens between ranks, compiled for an H200 without one."""

from collections.abc import Iterator
from functools import partial as partial_of
from typing import Any

import pytest
import torch

from moe_dispatch.backends.exchange import pack, push
from tests.support.triton_compile import Launch, compile_launches


def launches(capability: int, M: int) -> Iterator[Launch]:
    K, topk, ranks = 2048, 8, 2
    row_bytes = 2 * K
    tokens = push.tokens_bytes(ranks, M, topk, row_bytes, K // 128)
    own = torch.empty(push.header_bytes(ranks) + tokens + push.results_bytes(ranks, M, row_bytes), dtype=torch.uint8)
    memory = push.PeerMemory(own, [0, 0], 0, tokens, 132, torch.zeros(1, dtype=torch.int64), pdl=True, aside=None)
    hidden, weights = torch.empty(M, K, dtype=torch.bfloat16), torch.empty(M, topk)
    ids = torch.empty(M, topk, dtype=torch.int64)
    first = torch.empty(ranks, dtype=torch.int32)
    facts: dict[str, Any] = {"first_experts": first, "capacity": M, "E": 128, "seconds": 60.0}
    yield Launch(lambda: memory.push_tokens(hidden, weights, ids, **facts))
    yield Launch(lambda: memory.push_tokens(hidden, weights, ids, **facts, quantize=True))
    partial = torch.empty(ranks * M, K, dtype=torch.bfloat16)
    for results in (partial, memory.peer_rows(M, K, torch.bfloat16)):
        yield Launch(partial_of(memory.push_results, results, M, K, capacity=M, seconds=60.0))
    rows = M + pack.spare_rows(M, topk, row_bytes)
    segment = torch.empty(rows, K, dtype=torch.bfloat16)
    yield Launch(lambda: pack.pack_tokens(hidden, weights, ids, segment, capacity=M, E=128))
    wire = torch.empty(ranks * rows, K, dtype=torch.bfloat16)
    yield Launch(lambda: pack.unpack_slots(wire, ranks=ranks, capacity=M, topk=topk, first_expert=64))


@pytest.mark.parametrize("M", [16, 4096])
def test_kernels_compile_and_copy_16_bytes_at_a_time(M: int) -> None:
    *tokens, results, stored, _, unpacks = every = compile_launches(launches, 90, M=M)
    assert [built.name for built in every] == [
        *["_moe_push_tokens_kernel"] * (2 if M == 16 else 4), "_moe_push_results_kernel", "_moe_push_results_kernel",
        "_moe_pack_tokens_kernel", "_moe_unpack_slots_kernel",
    ]  # fmt: skip
    slots_alone = [] if M == 16 else [tokens[0], tokens[2]]
    for built in every:
        if built is not unpacks and built not in slots_alone:
            assert built.wide_loads, built
            assert built.wide_stores, built
        assert not built.stack, built
    # One release, and a look before and in the loop.
    assert {built.system_scope for built in (*tokens, results, stored)} == {3}
