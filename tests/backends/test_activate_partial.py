"""`activate_partial`: the kernel against its torch reference, on poisoned memory."""

from dataclasses import dataclass

import pytest
import torch

from moe_dispatch.activations import Activation
from moe_dispatch.backends.stages.activate_partial import activate_partial, activate_partial_torch
from moe_dispatch.problem import DType
from moe_dispatch.workloads import Workload, make_experts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


@pytest.mark.usefixtures("poisoned_memory")
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
