"""The shared stages: each kernel against its torch reference, on poisoned memory."""

import math
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch.activations import ACTIVATIONS, UNGATED, Activation
from moe_dispatch.arrived_rows import TravellingRows
from moe_dispatch.backends.stages import quantize as quantize_module
from moe_dispatch.backends.stages import route as route_module
from moe_dispatch.backends.stages.activate import activate, activate_quantize
from moe_dispatch.backends.stages.activate_backward import activate_backward, activate_backward_torch
from moe_dispatch.backends.stages.activate_partial import activate_partial, activate_partial_torch
from moe_dispatch.backends.stages.combine import combine, combine_torch
from moe_dispatch.backends.stages.quantize import gather, gather_quantize, quantize_rows
from moe_dispatch.backends.stages.route import Routing, buffer_rows, route, route_torch
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.numerics import QuantizedRows, activate_torch, quantize_rows_torch
from moe_dispatch.problem import DType
from moe_dispatch.workloads import Workload, make_experts

PARAMETRISED = (
    "swiglu(limit=10)",
    "swiglu(alpha=1.5,limit=6,shift=0.5,gate_cap=2,up_cap=3)",
    "swiglu(gate_cap=4,up_cap=25)",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass(frozen=True)
class Ids:
    why: str
    M: int
    topk: int
    E: int
    dtype: torch.dtype = torch.int32
    low: int = -1
    high: int = 1  # ids go up to E - 1 + high

    def __str__(self) -> str:
        return self.why

    def make(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.M)
        ids = torch.randint(self.low, self.E + self.high, (self.M, self.topk), generator=generator)
        return ids.to(device=DEVICE, dtype=self.dtype)


IDS = (
    Ids("one token, one expert", 1, 1, 1, low=0, high=0),
    Ids("fewer slots than experts", 2, 3, 40),
    Ids("sentinels and duplicates", 37, 4, 6),
    Ids("int64", 30, 2, 5, dtype=torch.int64),
    Ids("no slot is valid", 9, 2, 3, low=-5, high=-2 - 3 + 1),
    Ids("several blocks of slots", 700, 2, 9),
)


@pytest.mark.parametrize("few_slots", [4096, 0], ids=["one launch", "three launches"])
@pytest.mark.parametrize(("alignment", "capacity"), [(1, None), (8, None), (1, 1400), (1, 3)])
@pytest.mark.parametrize("case", IDS, ids=str)
def test_route(
    case: Ids, alignment: int, capacity: int | None, few_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route_module, "FEW_SLOTS", few_slots)
    ids = case.make()
    got = route(ids, case.E, alignment=alignment, capacity=capacity)
    expected = route_torch(ids, case.E, alignment=alignment, capacity=capacity)
    for field in fields(Routing):
        assert torch.equal(getattr(got, field.name), getattr(expected, field.name)), field.name
    unread = route(ids, case.E, alignment=alignment, capacity=capacity, by_row=False)
    assert unread.slot_of_row.shape == expected.slot_of_row.shape
    for name in ("row_of_slot", "starts", "ends"):
        assert torch.equal(getattr(unread, name), getattr(expected, name)), name


def test_route_compares_wide_ids_before_it_narrows_them() -> None:
    ids = torch.tensor([[2**32 + 1, 0]], dtype=torch.int64, device=DEVICE)
    assert route(ids, 4).row_of_slot.tolist() == [-1, 0]


def test_route_refuses_an_alignment_beside_a_capacity() -> None:
    with pytest.raises(InvalidInputError, match="not both"):
        buffer_rows(8, 4, alignment=8, capacity=8)


@pytest.mark.parametrize("columns", [1, 128, 300, 1200])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantize_rows(dtype: torch.dtype, columns: int) -> None:
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    x[2] = 0.0
    codes, scale = quantize_rows(x)
    _same_rows(codes, scale, *quantize_rows_torch(x))
    assert scale.is_contiguous()
    x[4, 0] = torch.nan
    codes, scale = quantize_rows(x, per_token=True)
    expected_codes, expected_scale = quantize_rows_torch(x, per_token=True)
    assert scale.shape == (5, 1)
    assert (codes.float() * scale)[4].isnan().all()
    _same_rows(codes[:4], scale[:4], expected_codes[:4], expected_scale[:4])


def _same_rows(codes: Tensor, scale: Tensor, expected_codes: Tensor, expected_scale: Tensor) -> None:
    assert torch.equal(codes.float(), expected_codes.float())
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_spoils_its_group_and_no_other(value: float) -> None:
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x[0, 3] = value
    codes, scale = quantize_rows(x)
    back = codes.float() * scale.repeat_interleave(128, 1)
    assert back[0, :128].isnan().any()
    assert back[0, 128:].isfinite().all()
    assert back[1].isfinite().all()


@pytest.mark.parametrize("spread_from", [1 << 30, 0], ids=["one pass", "multipliers in a second pass"])
@pytest.mark.parametrize("alignment", [1, 4])
def test_gather_and_gather_quantize_skip_rows_without_a_slot(
    alignment: int, spread_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_module, "_SPREAD_FROM", spread_from)
    _, routing, used, generator = _routed(6, 4, alignment)
    x = torch.randn(6, 200, generator=generator).to(DEVICE)
    expected = x[routing.slot_of_row[used].long() // 2]
    copied = gather(x, routing, 2)
    assert torch.equal(copied[used], expected)
    assert copied[~used].isnan().all(), "padding was written"
    codes, scale = gather_quantize(x, routing, 2, column_major_scales=True)
    expected_codes, expected_scale = quantize_rows_torch(expected)
    _same_rows(codes[used], scale[used], expected_codes, expected_scale)
    assert scale[~used].isnan().all(), "padding's multipliers were written"
    sent = QuantizedRows(*quantize_rows_torch(x), x.dtype)
    on_their_way: list[Any] = [TravellingRows(rows, x[2:4], 2, None, captured=False) for rows in (sent, x)]
    for arriving in (sent, *on_their_way):
        again, its_scale = gather_quantize(arriving, routing, 2, column_major_scales=True)
        _same_rows(again[used], its_scale[used], expected_codes, expected_scale)
    rows, row_codes = torch.zeros_like(copied), torch.zeros_like(codes)
    assert gather(x, routing, 2, out=rows) is rows
    assert gather_quantize(x, routing, 2, column_major_scales=True, out=row_codes)[0] is row_codes
    assert torch.equal(rows[used], expected)
    assert torch.equal(row_codes[used].float(), expected_codes.float())


@pytest.mark.parametrize("columns", [128, 200, 1100])
def test_with_a_capacity_multipliers_lie_expert_by_expert(columns: int) -> None:
    E, capacity, topk = 5, 8, 3
    ids = torch.tensor([[0, 3, -1], [4, 4, 1], [3, 0, 0], [-1, 3, 99]], device=DEVICE)
    routing = route(ids, E, capacity=capacity)
    used = routing.slot_of_row >= 0
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, columns, generator=generator).to(DEVICE)
    expected_codes, expected_scale = quantize_rows_torch(x[routing.slot_of_row[used].long() // topk])
    gate_up = torch.randn(E * capacity, columns, generator=generator).to(DEVICE)
    gate_up[~used] = torch.nan
    for codes, scale, expected in (
        (*gather_quantize(x, routing, topk, capacity=capacity), (expected_codes, expected_scale)),
        (
            *activate_quantize(gate_up, routing, "relu2", capacity=capacity),
            quantize_rows_torch(activate_torch(gate_up[used], "relu2")),
        ),
    ):
        groups = math.ceil(columns / 128)
        assert scale.shape == (E, capacity, groups)
        assert scale.stride() == (groups * capacity, 1, capacity)
        _same_rows(codes[used], scale[used.view(E, capacity)], *expected)
        assert scale[~used.view(E, capacity)].isnan().all(), "padding's multipliers were written"


def _routed(M: int, E: int, alignment: int = 1) -> tuple[Tensor, Routing, Tensor, torch.Generator]:
    """Ids of two experts a token, where their slots go, which rows are used, and a generator for their values."""
    ids = Ids("", M, 2, E).make()
    routing = route(ids, E, alignment=alignment)
    return ids, routing, routing.slot_of_row >= 0, torch.Generator().manual_seed(2)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, *PARAMETRISED])
def test_activate(activation: Activation, interleaved: bool) -> None:
    if interleaved and activation in UNGATED:
        interleaved = False
    N, width = 150, 150 if activation in UNGATED else 300
    ids, routing, used, generator = _routed(5, 3, alignment=4)
    gate_up = (5 * torch.randn(used.shape[0], width, generator=generator)).to(DEVICE)
    gate_up[~used] = torch.nan
    bias = torch.randn(3, width, generator=generator).to(DEVICE)
    expert = ids.flatten()[routing.slot_of_row[used].long()].long()
    expected = activate_torch(gate_up[used] + bias[expert], activation, interleaved=interleaved)
    out = activate(gate_up, routing, activation, interleaved=interleaved, bias=bias, topk_ids=ids)
    assert out.shape == (used.shape[0], N)
    torch.testing.assert_close(out[used], expected, rtol=1e-5, atol=1e-5)
    assert out[~used].isnan().all()
    codes, scale = activate_quantize(
        gate_up, routing, activation, interleaved=interleaved, bias=bias, topk_ids=ids, column_major_scales=True
    )
    expected_codes, expected_scale = quantize_rows_torch(expected)
    torch.testing.assert_close(scale[used], expected_scale, rtol=1e-5, atol=0)
    # Codes on a tie may differ by one step where exp does by one bit.
    torch.testing.assert_close(codes[used].float(), expected_codes.float(), rtol=0.13, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, *PARAMETRISED])
def test_activate_backward(activation: Activation, dtype: torch.dtype) -> None:
    """By the derivative that autograd takes of `activate_torch`, from values small and beyond every clamp.

    The weights may be in half precision, as their gradients then are.
    """
    N, width = 40, 40 if activation in UNGATED else 80
    _, routing, used, generator = _routed(5, 3)
    gate_up = (5 * torch.randn(used.shape[0], width, generator=generator)).to(DEVICE)
    d_inner = torch.randn(used.shape[0], N, generator=generator).to(DEVICE)
    weights = torch.rand(5, 2, generator=generator).to(DEVICE, dtype)
    share = weights.float().flatten()[routing.slot_of_row[used].long()][:, None]
    inner, d_gate_up = activate_backward_torch(gate_up[used], d_inner[used], share, activation)
    d_share = (inner * d_inner[used]).sum(dim=1)
    out, d_rows, d_weights = activate_backward(gate_up, d_inner, routing, weights, activation)
    torch.testing.assert_close(out[used], inner * share, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_rows[used], d_gate_up, rtol=1e-4, atol=1e-5)
    tolerance = max(1e-4, torch.finfo(dtype).eps)
    got = d_weights.flatten()[routing.slot_of_row[used].long()]
    torch.testing.assert_close(got, d_share.to(dtype), rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_activate_weights_rows(dtype: torch.dtype) -> None:
    _, routing, used, generator = _routed(9, 3)
    gate_up = torch.randn(used.shape[0], 300, generator=generator).to(DEVICE, dtype)
    gate_up[~used] = torch.nan
    weights = 3 * torch.randn(9, 2, generator=generator).to(DEVICE)  # of which the part up to 1 is meant
    weights[routing.row_of_slot.view(9, 2) < 0] = torch.nan
    share = weights.flatten()[routing.slot_of_row[used].long()][:, None].clamp(-1.0, 1.0)
    expected = activate_torch(gate_up[used].float(), "silu") * share
    out = activate(gate_up, routing, "silu", topk_weights=weights)
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(out[used].float(), expected, rtol=2 * tolerance, atol=tolerance)
    assert out[~used].isnan().all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("M", "topk", "K"), [(1, 1, 7), (5, 3, 300), (2, 8, 1100)])
def test_combine(M: int, topk: int, K: int, bias: bool, weighted: bool) -> None:
    ids = Ids("", M, topk, 4).make()
    routing = route(ids, 4)
    generator = torch.Generator().manual_seed(3)
    y = torch.randn(M * topk, K, generator=generator).to(DEVICE)
    y[routing.slot_of_row < 0] = torch.nan
    weights = 3 * torch.randn(M, topk, generator=generator).to(DEVICE)
    weights[routing.row_of_slot.view(M, topk) < 0] = torch.nan
    down_bias = torch.randn(4, K, generator=generator).to(DEVICE) if bias else None
    expected = combine_torch(y, routing.row_of_slot, weights, torch.float32, down_bias=down_bias, topk_ids=ids)
    out = torch.full((M, K), torch.nan, device=DEVICE)
    if weighted:
        y = y * weights.flatten()[routing.slot_of_row.clamp(min=0).long()][:, None].clamp(-1.0, 1.0)
    for combined in (
        combine(y, routing.row_of_slot, weights, out, down_bias=down_bias, topk_ids=ids, weighted=weighted),
        combine_torch(
            y, routing.row_of_slot, weights, torch.float32, down_bias=down_bias, topk_ids=ids, weighted=weighted
        ),
    ):
        assert combined.isfinite().all()
        torch.testing.assert_close(combined, expected, rtol=1e-5, atol=1e-5)
    sums = combine_torch(y, routing.row_of_slot, torch.ones_like(weights), torch.float32)
    torch.testing.assert_close(combine(y, routing.row_of_slot, None, out.fill_(torch.nan)), sums, rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Case:
    """A layer of 4 experts, and into how many splits the partial sums are divided."""

    dtype: DType
    activation: Activation = "silu"
    N: int = 200
    splits: int = 1
    bias: bool = False
    interleaved: bool = False


CASES = (
    Case("fp32"),
    Case("fp16", N=45, splits=3, bias=True),
    Case("fp16", N=700),
    Case("fp32", "swiglu_oai", bias=True, interleaved=True),
    Case("fp32", "relu2", bias=True),
    Case("fp8", N=136, bias=True),
    Case("fp8", N=600, splits=2),
    Case("fp8_channel", N=600, splits=2),
    Case("fp8_channel", "relu2", N=72, bias=True),
    Case("fp8", "swiglu_oai", N=72, bias=True, interleaved=True),
)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_equals_torch_where_the_id_is_valid(case: Case, ids_dtype: torch.dtype) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    layer = Workload("layer", 4, 2, 32, case.N, case.activation, bias=case.bias, interleaved=case.interleaved)
    act_dtype: DType = "fp32" if case.dtype.startswith("fp8") else case.dtype
    experts = make_experts(layer, case.dtype, DEVICE, generator, act_dtype=act_dtype)
    ids = torch.randint(-1, 5, (6, 2), generator=generator, device=DEVICE, dtype=ids_dtype)
    valid = ((ids >= 0) & (ids < 4)).flatten()
    parts = 2 if experts.gated else 1
    partial = torch.randn(case.splits, parts, 12, case.N, generator=generator, device=DEVICE)
    partial[:, :, ~valid] = torch.nan
    inner, scale = activate_partial(partial, experts, ids)
    expected, expected_scale = activate_partial_torch(partial, experts, ids)
    assert inner.dtype == expected.dtype == experts.down.dtype
    if scale is None or expected_scale is None:
        assert scale is expected_scale is None
        torch.testing.assert_close(inner[valid], expected[valid])
    else:
        torch.testing.assert_close(scale[valid], expected_scale[valid])
        # Sums differ in the last bit, so that a value on a tie between two codes may take either.
        same = inner[valid].float() == expected[valid].float()
        assert same.float().mean() > 0.99
