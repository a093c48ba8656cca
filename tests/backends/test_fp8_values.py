"""Every e4m3 code becomes its value, in the dtypes of activations: exactly, NaN included."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16, torch.float32]


@pytest.mark.parametrize("parts", [False, True], ids=["values", "parts"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_becomes_its_value(dtype: torch.dtype, parts: bool) -> None:
    pytest.importorskip("triton")
    from tests.support.fp8_values_kernel import _moe_parts_of_codes_kernel, _moe_values_of_codes_kernel

    # Four codes lie in a register: each of them meets each other one beside it.
    neighbours = torch.cartesian_prod(*[torch.arange(256, dtype=torch.uint8, device=DEVICE)] * 2)
    codes = torch.cat([neighbours, neighbours.flip(1)], 1).flatten()[: 1 << 14 if DEVICE == "cpu" else None]
    values = torch.empty(codes.shape, dtype=dtype, device=DEVICE)
    marks = torch.zeros(codes.shape, dtype=torch.int8, device=DEVICE)
    expected = codes.view(torch.float8_e4m3fn).to(dtype)
    for first in range(0, len(codes), 1 << 12):
        chunk = slice(first, first + (1 << 12))
        if parts:
            _moe_parts_of_codes_kernel[(1,)](codes[chunk], values[chunk], marks[chunk], SIZE=1 << 12)
        else:
            _moe_values_of_codes_kernel[(1,)](codes[chunk], values[chunk], SIZE=1 << 12)
    assert int(expected.isnan().sum()) > 0
    if parts:
        assert torch.equal(marks, torch.where(expected.isnan(), -128, 0).to(torch.int8))
        assert torch.equal(values[expected.isnan()].abs(), torch.full_like(values[expected.isnan()], 480))
        values[expected.isnan()] = float("nan")
    assert torch.equal(values.isnan(), expected.isnan())
    values, expected = values.nan_to_num(), expected.nan_to_num()
    assert torch.equal(values, expected)
    assert torch.equal(values.signbit(), expected.signbit())
