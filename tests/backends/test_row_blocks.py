"""How the kernels for Hopper cut experts' rows into blocks, and where those end."""

import pytest
import torch

from moe_dispatch.backends.gluon_hopper.row_blocks import row_blocks
from moe_dispatch.backends.gluon_hopper.windows import Windows, rows_after_window
from moe_dispatch.backends.stages.route import Routing, route_torch

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
COUNTS = [1, 0, 64, 127, 128, 129, 144, 145, 160, 161, 256, 257, 272, 288, 289, 384, 385, 433, 0, 700]


@pytest.fixture(autouse=True)
def _any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the kernel before needs sm_90, and the interpreter does not know it."""
    if DEVICE == "cuda":
        if torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("needs sm_90")
    else:
        from triton.language.extra import cuda

        for name in ("gdc_wait", "gdc_launch_dependents"):
            monkeypatch.setattr(cuda, name, lambda **_: None)


def routed(counts: list[int]) -> Routing:
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[:, None].to(DEVICE)
    return route_torch(ids, len(counts))


@pytest.mark.parametrize(
    ("fp8", "heights"),
    [
        (False, {129: [129], 160: [160], 161: [128, 33], 289: [128, 128, 33], 288: [128, 160], 433: [128] * 3 + [49]}),
        (True, {144: [144], 145: [128, 17], 257: [128, 129], 272: [128, 144], 288: [144, 144], 385: [128, 128, 129]}),
    ],
    ids=["bf16", "fp8"],
)  # fmt: skip
def test_every_row_is_in_one_block_and_few_left_over_rows_join_others(fp8: bool, heights: dict[int, list[int]]) -> None:
    routing = routed(COUNTS)
    blocks, counts = row_blocks(routing, 3, fp8=fp8)
    listed = blocks[: counts[0], :3].tolist()
    assert counts[1:].tolist() == [0, 0]
    for e, count in enumerate(COUNTS):
        mine = [(row, end) for expert, row, end in listed if expert == e]
        rows = [row for start, end in mine for row in range(start, end)]
        assert rows == list(range(int(routing.starts[e]), int(routing.ends[e]))), count
        cut = [end - row for row, end in mine]
        assert cut == heights.get(count, cut)
        assert all(0 < height <= (144 if fp8 else 160) for height in cut)


def test_experts_with_a_tall_block_come_first() -> None:
    blocks, counts = row_blocks(routed([5, 0, 143, 128, 271, 300]), 8, fp8=False)
    listed = blocks[: counts[0], :3].tolist()
    assert [e for e, *_ in listed] == [2, 4, 4, 0, 3, 5, 5, 5]
    assert [end - row for _, row, end in listed] == [143, 128, 143, 5, 128, 128, 128, 44]


def test_a_group_is_of_one_expert_and_no_group_is_larger_than_asked() -> None:
    blocks, counts = row_blocks(routed([128 * 7, 0, 128, 128 * 4 + 16, 128 * 3]), 3, fp8=False)
    groups: dict[int, list[int]] = {}
    for place, (expert, _, _, first, size) in enumerate(blocks[: counts[0]].tolist()):
        assert first <= place < first + size
        assert {int(blocks[member, 0]) for member in range(first, first + size)} == {expert}
        if place == first:
            groups.setdefault(expert, []).append(size)
    assert groups == {0: [3, 3, 1], 2: [1], 3: [2, 2], 4: [3]}


@pytest.mark.parametrize(("row", "end"), [(0, 1), (0, 40), (0, 64), (30, 39), (36, 100), (84, 100), (99, 100)])
@pytest.mark.parametrize("height", [16, 32, 64])
def test_a_window_of_rows_ends_where_an_expert_does(height: int, row: int, end: int) -> None:
    rows = rows_after_window(torch.empty(0).bfloat16(), 100, 128)
    rows[:] = torch.arange(100)[:, None]
    descriptor = Windows(height).describe(rows)
    assert list(descriptor.block_shape) == [1, height, 64]
    # What `_load_rows` has TMA read; out of bounds it fills in zeros.
    window = min(row + 64, end)
    seen = descriptor.base[window, row + 64 - window :][:height]
    assert torch.equal(seen, rows[row : min(row + height, end)])
