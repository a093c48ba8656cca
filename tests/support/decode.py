"""Cases of the decode backends: a layer, a routing and a configuration, interpreted against the fp32 reference."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from moe_dispatch import testing as conformance
from moe_dispatch.backend import Backend, BackendConfig
from moe_dispatch.backends.reference import ReferenceBackend, ReferenceConfig
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine
from moe_dispatch.problem import DType
from moe_dispatch.workloads import make_experts, torch_dtype

SPREAD = "spread"  # ids from -1 to E: sentinels of both kinds, duplicates within a row
GPT_OSS: dict[str, Any] = {"activation": "swiglu_oai", "bias": True, "interleaved": True}
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
TOLERANCE = {"fp32": 2e-6, "fp16": 1e-3, "fp8": 2e-3, "fp8_channel": 2e-3, "mxfp4": 1e-3}


@dataclass(frozen=True, kw_only=True)
class Case(conformance.Case):
    """A layer, a routing (`SPREAD`, or the expert of every slot) and configuration fields; `why` names the test.

    `act` is the dtype of activations where the weights are FP8; with MXFP4 it is FP16.
    """

    why: str = field(kw_only=False)
    M: int = 3
    E: int = 4
    K: int = 64
    N: int = 32
    dtype: DType = "fp32"
    act: DType = "fp32"
    routing: str = SPREAD
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def act_dtype(self) -> DType:
        if self.dtype == "mxfp4":
            return "fp16"
        return self.act if self.dtype.startswith("fp8") else self.dtype

    def __str__(self) -> str:
        return self.why

    def experts(self, device: str = "cpu") -> ExpertWeights:
        generator = torch.Generator(device).manual_seed(1)
        return make_experts(
            self.layer, self.dtype, device, generator, act_dtype=self.act_dtype, transposed=self.transposed
        )

    def tokens(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(self.M, self.K, generator=generator).to(torch_dtype(self.act_dtype))
        weights = torch.rand(self.M, self.topk, generator=generator)
        if self.routing == SPREAD:
            ids = torch.randint(-1, self.E + 1, (self.M, self.topk), generator=generator)
            ids[0, 0] = 0
        else:
            ids = torch.full((self.M, self.topk), int(self.routing))
        weights[(ids < 0) | (ids >= self.E)] = torch.nan
        return x, weights, ids.to(self.ids)


def check_against_the_reference(
    case: Case, backend: Backend, config: BackendConfig, tolerance: float = 0.0, device: str = "cpu"
) -> None:
    """Compare one run; the tolerance is that of the weights' dtype unless activations are quantised in another way."""
    experts = case.experts(device)
    x, weights, ids = (tensor.to(device) for tensor in case.tokens())
    out = backend.run(x, experts, weights, ids, config)
    reference = ReferenceBackend(Machine.inspect(device))
    problem = experts.problem(case.M, case.topk, x.dtype, backend.machine.capability)
    judged = ReferenceConfig(compute_fp32=True, quantize_activations=backend.quantizes_activations(problem))
    truth = reference.run(x.float(), experts, weights, ids, judged)
    error = float((out.float() - truth).norm() / truth.norm().clamp(min=1e-30))
    assert out.dtype == x.dtype
    if not tolerance or not judged.quantize_activations:
        tolerance = TOLERANCE[case.dtype]
    assert error <= tolerance, error
    assert backend.deterministic(config)  # which the conformance suite holds it to
