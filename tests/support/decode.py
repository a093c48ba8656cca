"""Cases of the decode backends: a layer, a routing and a configuration, interpreted against the fp32 reference."""

from dataclasses import dataclass, field
from typing import Any

import torch

from moe_dispatch import testing as conformance
from moe_dispatch.backend import Backend, BackendConfig
from moe_dispatch.backends.reference import ReferenceBackend, ReferenceConfig
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.problem import DType
from moe_dispatch.workloads import make_experts, torch_dtype

SPREAD = "spread"  # ids from -1 to E: sentinels of both kinds, duplicates within a row
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

    def experts(self) -> ExpertWeights:
        generator = torch.Generator().manual_seed(1)
        return make_experts(
            self.layer, self.dtype, "cpu", generator, act_dtype=self.act_dtype, transposed=self.transposed
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


def check_against_the_reference(case: Case, backend: Backend, config: BackendConfig) -> None:
    experts = case.experts()
    x, weights, ids = case.tokens()
    out = backend.run(x, experts, weights, ids, config)
    reference = ReferenceBackend(backend.machine)
    problem = experts.problem(case.M, case.topk, x.dtype, backend.machine.capability)
    judged = ReferenceConfig(compute_fp32=True, quantize_activations=backend.quantizes_activations(problem))
    truth = reference.run(x.float(), experts, weights, ids, judged)
    error = float((out.float() - truth).norm() / truth.norm().clamp(min=1e-30))
    assert out.dtype == x.dtype
    assert error <= TOLERANCE[case.dtype]
    assert backend.deterministic(config)  # which the conformance suite holds it to
