"""A result does not depend on torch's default dtype or device: every tensor is made with both.

The default device is ``meta`` here, so that a tensor made without a device fails at its first use.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from moe_dispatch.numerics import dequantize_blocks, quantize_blocks, quantize_rows_torch
from moe_dispatch.registry import BACKENDS
from moe_dispatch.testing import Case, Precision, make_inputs
from tests.support.ambient import default_dtype
from tests.support.interpreter import with_few_programs
from tests.support.refusals import available, require

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = [pytest.mark.gpu] if DEVICE == "cuda" else []
# A default that is wider than any dtype here, together with a device that computes nothing, and one that is narrower.
STATES: tuple[tuple[torch.dtype, str | None], ...] = ((torch.float64, "meta"), (torch.bfloat16, None))
CASES = {
    "silu": Case(M=3, E=4, topk=2, K=64, N=32, routing="sentinels"),
    "gpt-oss": Case(M=3, E=4, topk=2, K=64, N=32, activation="swiglu_oai", bias=True, interleaved=True),
    "relu2": Case(M=3, E=4, topk=2, K=64, N=32, activation="relu2"),
}
PRECISIONS = (Precision("fp32", "fp32"), Precision("fp16", "fp16"), Precision("fp8", "fp16"))


@contextmanager
def ambient(dtype: torch.dtype, device: str | None) -> Iterator[None]:
    with default_dtype(dtype), torch.device(device) if device else nullcontext():
        yield


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", [pytest.param(name, marks=ON_GPU) for name in BACKENDS.names()])
def test_a_backend_gives_the_same_under_every_default(name: str, case: Case, precision: Precision) -> None:
    backend = available(name)
    inputs = make_inputs(case, precision, DEVICE)
    hidden = inputs.hidden_states
    problem = inputs.experts.problem(case.M, case.topk, hidden.dtype, backend.machine.capability)
    require(backend, problem)
    config = with_few_programs(backend.default_config(problem))
    expected = backend.run(*inputs.arguments, config)
    for state in STATES:
        with ambient(*state):
            out = backend.run(*inputs.arguments, config)
        assert (out.dtype, out.device) == (hidden.dtype, hidden.device), state
        assert torch.equal(out, expected), state


@pytest.mark.parametrize("state", STATES, ids=str)
def test_quantisation_gives_the_same_under_every_default(state: tuple[torch.dtype, str | None]) -> None:
    values = torch.randn(2, 130, 140, generator=torch.Generator().manual_seed(0))
    values[0, 3, 5], values[1, 7, 9] = torch.inf, torch.nan
    codes, scale = quantize_blocks(values)
    row_codes, row_scale = quantize_rows_torch(values[0])
    back = dequantize_blocks(codes, scale)
    with ambient(*state):
        again = quantize_blocks(values)
        rows_again = quantize_rows_torch(values[0])
        back_again = dequantize_blocks(codes, scale)
    for tensor, other in zip(
        (codes, scale, row_codes, row_scale, back), (*again, *rows_again, back_again), strict=True
    ):
        assert tensor.dtype == other.dtype
        assert torch.equal(tensor.float().nan_to_num(7.0), other.float().nan_to_num(7.0))
