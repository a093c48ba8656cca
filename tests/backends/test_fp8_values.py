"""Every e4m3 code becomes its value, in the dtypes of activations: exactly, NaN included."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_becomes_its_value(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from tests.support.fp8_values_kernel import _moe_values_of_codes_kernel

    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    values = torch.empty(256, dtype=dtype, device=DEVICE)
    _moe_values_of_codes_kernel[(1,)](codes, values)
    expected = codes.view(torch.float8_e4m3fn).to(dtype)
    assert torch.equal(values.isnan(), expected.isnan())
    assert int(expected.isnan().sum()) == 2
    values, expected = values.nan_to_num(), expected.nan_to_num()
    assert torch.equal(values, expected)
    assert torch.equal(values.signbit(), expected.signbit())
