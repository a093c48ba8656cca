"""Routing, for any ids: what its result must satisfy. test_stages.py holds the kernels to it."""

from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_dispatch.backends.stages.route import buffer_rows, route_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ANY_CLOCK = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Case:
    ids: Tensor
    E: int
    alignment: int
    capacity: int | None


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Ids in and out of range, with duplicates in a row, in either integer type, with an alignment or a capacity."""
    M, topk, E = draw(st.integers(1, 24)), draw(st.integers(1, 5)), draw(st.integers(1, 12))
    row = st.lists(st.integers(-2, E + 1), min_size=topk, max_size=topk)
    ids = draw(st.lists(row, min_size=M, max_size=M))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    capacity = draw(st.none() | st.integers(1, M + 2))
    alignment = 1 if capacity is not None else draw(st.sampled_from([1, 2, 8, 128]))
    return Case(torch.tensor(ids, dtype=dtype, device=DEVICE), E, alignment, capacity)


@ANY_CLOCK
@given(case=cases())
def test_every_row_and_slot_is_where_the_contract_says(case: Case) -> None:
    routing = route_torch(case.ids, case.E, alignment=case.alignment, capacity=case.capacity)
    slot_of_row, row_of_slot = routing.slot_of_row.tolist(), routing.row_of_slot.tolist()
    starts, ends = routing.starts.tolist(), routing.ends.tolist()
    ids, topk = case.ids.flatten().tolist(), case.ids.shape[1]
    assert len(slot_of_row) == buffer_rows(len(ids), case.E, alignment=case.alignment, capacity=case.capacity)
    for slot, (expert, row) in enumerate(zip(ids, row_of_slot, strict=True)):
        if not 0 <= expert < case.E:
            assert row == -1
        elif row == -1:  # only a full expert turns a slot away
            assert case.capacity is not None
            assert ends[expert] - starts[expert] == case.capacity
        else:
            assert starts[expert] <= row < ends[expert]
            # The row belongs to this slot, or to an earlier slot of the same token and expert.
            owner = slot_of_row[row]
            assert ids[owner] == expert
            assert owner == slot or (case.capacity is not None and owner < slot and owner // topk == slot // topk)
    for expert, (start, end) in enumerate(zip(starts, ends, strict=True)):
        assert start == expert * case.capacity if case.capacity is not None else start % case.alignment == 0
        owners = slot_of_row[start:end]
        assert owners == sorted(set(owners))  # in the order of the slots, each once
        assert all(ids[owner] == expert for owner in owners)
    used = {row for start, end in zip(starts, ends, strict=True) for row in range(start, end)}
    assert len(used) == sum(end - start for start, end in zip(starts, ends, strict=True))  # no two experts share a row
    assert all(slot_of_row[row] == -1 for row in range(len(slot_of_row)) if row not in used)
