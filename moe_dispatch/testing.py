"""What every backend must compute, as cases grouped by why they exist: also for backends of other packages.

docs/own-backend.md shows how to run them. `conform` raises AssertionError and says what is wrong.
tests/backends/test_conformance.py runs it over the backends of this package, with poisoned memory, in every
configuration, and under CUDA graphs.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dispatch.activations import Activation
from moe_dispatch.backend import Backend, BackendConfig
from moe_dispatch.backends.reference import ReferenceBackend, ReferenceConfig
from moe_dispatch.dispatch.checks import result_fault
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine
from moe_dispatch.problem import DType, Mode, MoEProblem
from moe_dispatch.workloads import ROUTINGS, Workload, make_experts, torch_dtype


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer as in `MoEProblem`, a token count and a routing. A backend's own tests add the configuration.

    Attributes:
        routing: A name in ROUTINGS, or a special one: ``"all to one"``, ``"duplicates"`` (the same expert twice in a
            row), ``"sentinels"`` (some ids outside 0…E-1, with NaN for weights) or ``"none"`` (all of them).
        ids: The dtype of topk_ids.
        strided: Whether hidden_states is not contiguous.
        nan: Whether the second token has a NaN, which must stay in it and must not reach another.
    """

    M: int = 5
    E: int = 8
    topk: int = 2
    K: int = 128
    N: int = 128
    activation: Activation = "silu"
    bias: bool = False
    interleaved: bool = False
    transposed: bool = False
    routing: str = "uniform"
    ids: torch.dtype = torch.int32
    strided: bool = False
    nan: bool = False

    @property
    def layer(self) -> Workload:
        """The layer's shape, activation and biases."""
        return Workload(
            "case", E=self.E, topk=self.topk, K=self.K, N=self.N, activation=self.activation, bias=self.bias,
            interleaved=self.interleaved,
        )  # fmt: skip

    def problem(self, precision: "Precision", machine: Machine, mode: Mode = "eager") -> MoEProblem:
        """The problem that this case poses to a backend on a machine."""
        plain = self.layer.problem(self.M, "bf16", machine, mode)
        return dataclasses.replace(
            plain, dtype=precision.dtype, act_dtype=precision.act_dtype, transposed=self.transposed
        )


TOKENS = {f"M={M}": Case(M=M) for M in (1, 3, 17, 150)}
TOPK = {f"topk={topk}": Case(topk=topk, E=max(8, topk + 2)) for topk in (1, 5, 10)}
EXPERTS = {
    "one expert": Case(E=1, topk=1),
    "more experts than tokens": Case(E=256, topk=8, M=2),
}
ROUTING = {
    "one hot expert": Case(M=33, routing="one-hot"),
    "skewed": Case(M=33, E=16, topk=4, routing="dirichlet-4"),
    "all to one": Case(M=33, E=16, routing="all to one"),
    "ids outside 0…E-1": Case(M=9, routing="sentinels"),
    "ids outside 0…E-1, int64": Case(M=9, routing="sentinels", ids=torch.int64),
    "only ids outside 0…E-1": Case(M=3, routing="none"),
    "twice the same": Case(M=9, routing="duplicates"),
}
INPUTS = {
    "int64 ids": Case(ids=torch.int64),
    "strided input": Case(strided=True),
    "a NaN in one token": Case(nan=True),
    "a NaN in one of many tokens": Case(M=33, nan=True),
    "a NaN in one token, gpt-oss": Case(activation="swiglu_oai", bias=True, interleaved=True, nan=True),
    "a NaN in one token, relu2": Case(activation="relu2", nan=True),
}
SHAPES = {
    "K not of 128": Case(K=192),
    "N not of 128": Case(N=192),
    "neither of 128, several blocks": Case(M=17, K=320, N=208),
    "neither of 16": Case(K=136, N=72),
    "odd": Case(K=77, N=39),
    "experts stored by columns": Case(K=192, N=72, transposed=True),
    "narrow": Case(K=16, N=16),
}
ACTIVATIONS = {
    "gelu": Case(activation="gelu"),
    "gelu_tanh": Case(activation="gelu_tanh"),
    "relu2, no gate": Case(activation="relu2"),
    "clamped silu": Case(activation="swiglu(limit=0.5)"),
    "every parameter of swiglu": Case(activation="swiglu(alpha=1.5,limit=2,shift=0.5,gate_cap=2,up_cap=3)"),
    "silu with biases": Case(bias=True),
    "silu, interleaved": Case(interleaved=True),
    "gpt-oss": Case(activation="swiglu_oai", bias=True, interleaved=True, topk=4),
    "gpt-oss, odd shape": Case(activation="swiglu_oai", bias=True, interleaved=True, K=144, N=80),
    "relu2 with biases, odd shape": Case(activation="relu2", bias=True, K=80, N=72),
}
CASES = TOKENS | TOPK | EXPERTS | ROUTING | INPUTS | SHAPES | ACTIVATIONS

# The layers of real models, for which only a GPU is fast enough.
MODEL_CASES = {
    "qwen3-30b-a3b decode": Case(M=1, E=128, topk=8, K=2048, N=768),
    "qwen3-30b-a3b batch": Case(M=64, E=128, topk=8, K=2048, N=768),
    "qwen3-30b-a3b prefill": Case(M=2048, E=128, topk=8, K=2048, N=768, routing="dirichlet-4"),
    "mixtral slice": Case(M=300, E=8, topk=2, K=4096, N=1792),
    "deepseek-v3 slice, offsets beyond 2^31": Case(M=16, E=160, topk=8, K=7168, N=1024),
    "gpt-oss": Case(M=100, E=32, topk=4, K=2880, N=2880, activation="swiglu_oai", bias=True, interleaved=True),
}


@dataclass(frozen=True)
class Precision:
    """The dtypes of weights and of activations."""

    dtype: DType
    act_dtype: DType

    def __str__(self) -> str:
        return self.dtype if self.dtype == self.act_dtype else f"{self.dtype}-{self.act_dtype}"


PRECISIONS = (
    Precision("bf16", "bf16"),
    Precision("fp16", "fp16"),
    Precision("fp32", "fp32"),
    Precision("fp8", "bf16"),
    Precision("fp8", "fp16"),
    Precision("fp8_channel", "bf16"),
    Precision("fp8_channel", "fp16"),
    Precision("mxfp4", "bf16"),
    Precision("mxfp4", "fp16"),
)
# Without FP16, in which the other tests run: it would compile every configuration once more.
MODEL_PRECISIONS = tuple(precision for precision in PRECISIONS if precision.act_dtype != "fp16")


@dataclass(frozen=True)
class Inputs:
    """The arguments of a call.

    Attributes:
        hidden_states: ``[M, K]``.
        experts: The layer's weights.
        topk_weights: fp32 ``[M, topk]``.
        topk_ids: int32 or int64 ``[M, topk]``.
        truth: The right output, fp32 ``[M, K]``, with activations quantised where the weights are FP8.
    """

    hidden_states: Tensor
    experts: ExpertWeights
    topk_weights: Tensor
    topk_ids: Tensor
    truth: Tensor

    @property
    def arguments(self) -> tuple[Tensor, ExpertWeights, Tensor, Tensor]:
        """The arguments in the order of `moe_forward`."""
        return self.hidden_states, self.experts, self.topk_weights, self.topk_ids

    def expected(self, backend: Backend) -> Tensor:
        """What a backend's result is compared with: `truth`, or without quantised activations if it quantises none."""
        hidden, experts, weights, ids = self.arguments
        M, topk = ids.shape
        problem = experts.problem(M, topk, hidden.dtype, backend.machine.capability)
        if backend.quantizes_activations(problem):
            return self.truth
        return truth(hidden, experts, weights, ids, quantize_activations=False)


def make_inputs(case: Case, precision: Precision, device: str, seed: int = 0) -> Inputs:
    """Random tensors for a case, and the right output by the reference in fp32."""
    generator = torch.Generator(device).manual_seed(seed)
    experts = make_experts(
        case.layer, precision.dtype, device, generator, act_dtype=precision.act_dtype, transposed=case.transposed
    )
    hidden = torch.randn(case.M, 2 * case.K, generator=generator, dtype=torch.float32, device=device)
    hidden = hidden.to(torch_dtype(precision.act_dtype))
    hidden = hidden[:, :: 2] if case.strided else hidden[:, : case.K].contiguous()  # fmt: skip
    if case.nan:
        hidden[1, case.K // 2] = torch.nan
    weights, ids = _routing(case, seed)
    weights, ids = weights.to(device), ids.to(device=device, dtype=case.ids)
    return Inputs(hidden, experts, weights, ids, truth(hidden, experts, weights, ids))


def truth(
    hidden: Tensor, experts: ExpertWeights, weights: Tensor, ids: Tensor, *, quantize_activations: bool = True
) -> Tensor:
    """The output in fp32 by the reference, by default with activations quantised where the weights are FP8."""
    reference = ReferenceBackend(Machine.inspect(hidden.device))
    config = ReferenceConfig(compute_fp32=True, quantize_activations=quantize_activations)
    out: Tensor = reference.run(hidden.float().contiguous(), experts, weights, ids, config)
    return out


def relative_error(out: Tensor, expected: Tensor) -> float:
    """‖out − expected‖ / ‖expected‖; infinite if anything is not finite."""
    if not out.isfinite().all():
        return float("inf")
    scale = float(expected.norm())
    difference = float((out.float() - expected).norm())
    return difference / scale if scale else difference


def conform(backend: Backend, config: BackendConfig, inputs: Inputs, *, into: bool = False) -> float:
    """Run a backend and check its result: dtype, shape, memory, the inputs, and the error, which is returned.

    With `into` it is run by `Backend.run_into`, over memory filled with NaN.

    Raises:
        AssertionError: The backend breaks the contract of `Backend.run`; the message says how.
    """
    hidden, experts, weights, ids = inputs.arguments
    before = [tensor.clone() for tensor in (hidden, weights, ids)]
    arguments = (hidden.contiguous(), experts, weights.contiguous(), ids.contiguous())
    if into:
        memory = torch.full_like(arguments[0], torch.nan)
        out = backend.run_into(*arguments, config, memory)
        assert out is memory, "run_into must return the tensor that it writes into"
    else:
        out = backend.run(*arguments, config)
    fault = result_fault(out, arguments)
    assert not fault, fault
    for tensor, copy in zip((hidden, weights, ids), before, strict=True):
        assert torch.equal(tensor.nan_to_num(7.0), copy.nan_to_num(7.0)), "an input was written to"
    expected = inputs.expected(backend)
    spoilt = expected.isnan().any(dim=1)
    assert out[spoilt].isnan().all(), "a NaN in a token was lost"
    error = relative_error(out[~spoilt], expected[~spoilt])
    assert error <= backend.tolerance[experts.dtype], f"relative error {error:.2e} with {config.label}"
    return error


def _routing(case: Case, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    plain = ROUTINGS.get(case.routing, ROUTINGS["uniform"])
    weights, ids = plain.sample(case.M, case.E, case.topk, "cpu", generator)
    if case.routing == "all to one":
        ids = torch.full_like(ids, case.E // 2)
    elif case.routing == "duplicates":
        ids[:, 1] = ids[:, 0]
    elif case.routing == "none":
        ids = torch.full_like(ids, -1)
        ids[:, 0] = case.E
        weights = torch.full_like(weights, torch.nan)
    elif case.routing == "sentinels":
        ids[::2, 0], ids[1::3, 1], ids[2] = -1, case.E, -1
        weights = torch.where((ids < 0) | (ids >= case.E), torch.nan, weights)
    return weights, ids
