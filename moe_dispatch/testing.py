"""What every backend must compute, as cases grouped by why they exist; run by test_conformance over the registry.

A backend of another package runs them too: register it and call `conform`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_dispatch.backend import Backend, BackendConfig
from moe_dispatch.backends.reference import ReferenceBackend, ReferenceConfig
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.problem import Activation, DType
from moe_dispatch.workloads import ROUTINGS, Workload, make_experts, torch_dtype


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer, a token count and a routing; a backend's own tests add the configuration.

    Attributes:
        M: Tokens.
        E: Experts.
        topk: Experts per token.
        K: Hidden size.
        N: Intermediate size.
        activation: See `MoEProblem`.
        bias: Whether the projections add one.
        interleaved: Whether gate and up rows alternate.
        routing: A name in ROUTINGS, or one of those in `_ids`.
        ids: Dtype of topk_ids.
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
    routing: str = "uniform"
    ids: torch.dtype = torch.int32
    strided: bool = False
    nan: bool = False

    @property
    def layer(self) -> Workload:
        """Its weights' shape."""
        return Workload(
            "case", E=self.E, topk=self.topk, K=self.K, N=self.N, activation=self.activation, bias=self.bias,
            interleaved=self.interleaved,
        )  # fmt: skip


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
    "nobody's experts": Case(M=9, routing="sentinels"),
    "nobody's experts, int64": Case(M=9, routing="sentinels", ids=torch.int64),
    "nothing is ours": Case(M=3, routing="none"),
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
    "narrow": Case(K=16, N=16),
}
ACTIVATIONS = {
    "gelu": Case(activation="gelu"),
    "gelu_tanh": Case(activation="gelu_tanh"),
    "relu2, no gate": Case(activation="relu2"),
    "silu with biases": Case(bias=True),
    "silu, interleaved": Case(interleaved=True),
    "gpt-oss": Case(activation="swiglu_oai", bias=True, interleaved=True, topk=4),
    "gpt-oss, odd shape": Case(activation="swiglu_oai", bias=True, interleaved=True, K=144, N=80),
    "relu2 with biases, odd shape": Case(activation="relu2", bias=True, K=80, N=72),
}
CASES = TOKENS | TOPK | EXPERTS | ROUTING | INPUTS | SHAPES | ACTIVATIONS

# What only a GPU has the time for: the layers of real models.
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
    """Dtypes of weights and activations."""

    dtype: DType
    act_dtype: DType

    def __str__(self) -> str:
        return self.dtype if self.dtype == self.act_dtype else f"{self.dtype}-{self.act_dtype}"


# Each configuration again in FP16 would find what the other tests find of it, and compile as much.
MODEL_PRECISIONS = (Precision("bf16", "bf16"), Precision("fp32", "fp32"), Precision("fp8", "bf16"))

PRECISIONS = (
    Precision("bf16", "bf16"),
    Precision("fp16", "fp16"),
    Precision("fp32", "fp32"),
    Precision("fp8", "bf16"),
    Precision("fp8", "fp16"),
)


@dataclass(frozen=True)
class Inputs:
    """The arguments of a call, and the right answer in fp32."""

    hidden_states: Tensor
    experts: ExpertWeights
    topk_weights: Tensor
    topk_ids: Tensor
    truth: Tensor

    @property
    def arguments(self) -> tuple[Tensor, ExpertWeights, Tensor, Tensor]:
        """In the order of `moe_forward`."""
        return self.hidden_states, self.experts, self.topk_weights, self.topk_ids


def make_inputs(case: Case, precision: Precision, device: str, seed: int = 0) -> Inputs:
    """Random tensors for a case, and its truth by the reference in fp32."""
    generator = torch.Generator(device).manual_seed(seed)
    experts = make_experts(case.layer, precision.dtype, device, generator, act_dtype=precision.act_dtype)
    hidden = torch.randn(case.M, 2 * case.K, generator=generator, device=device).to(torch_dtype(precision.act_dtype))
    hidden = hidden[:, :: 2] if case.strided else hidden[:, : case.K].contiguous()  # fmt: skip
    if case.nan:
        hidden[1, case.K // 2] = torch.nan
    weights, ids = _routing(case, seed)
    weights, ids = weights.to(device), ids.to(device=device, dtype=case.ids)
    return Inputs(hidden, experts, weights, ids, truth(hidden, experts, weights, ids))


def truth(hidden: Tensor, experts: ExpertWeights, weights: Tensor, ids: Tensor) -> Tensor:
    """The layer in fp32 by the naive loop, activations quantised where the weights are block FP8."""
    from moe_dispatch.machine import Machine

    reference = ReferenceBackend(Machine.inspect(hidden.device))
    config = ReferenceConfig(compute_fp32=True)
    # The reference has no special case for NaN beside a foreign id: it never looks at such a slot.
    out: Tensor = reference.run(hidden.float().contiguous(), experts, weights, ids, config)
    return out


def relative_error(out: Tensor, expected: Tensor) -> float:
    """‖out − expected‖ / ‖expected‖; infinite if anything is not finite."""
    if not out.isfinite().all():
        return float("inf")
    scale = float(expected.norm())
    difference = float((out.float() - expected).norm())
    return difference / scale if scale else difference


def conform(backend: Backend, config: BackendConfig, inputs: Inputs) -> float:
    """Run a backend on inputs and check dtype, shape, freshness and error; returns the error."""
    hidden, experts, weights, ids = inputs.arguments
    before = [tensor.clone() for tensor in (hidden, weights, ids)]
    out = backend.run(hidden.contiguous(), experts, weights.contiguous(), ids.contiguous(), config)
    assert out.shape == hidden.shape
    assert out.dtype == hidden.dtype
    assert out.data_ptr() != hidden.data_ptr(), "the output must be fresh memory"
    for tensor, copy in zip((hidden, weights, ids), before, strict=True):
        assert torch.equal(tensor.nan_to_num(7.0), copy.nan_to_num(7.0)), "an input was written to"
    spoilt = inputs.truth.isnan().any(dim=1)
    assert out[spoilt].isnan().all(), "a NaN in a token was lost"
    error = relative_error(out[~spoilt], inputs.truth[~spoilt])
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


def in_interpreter(case: Case, name: str) -> Case:
    """The case as Triton's interpreter can afford it: many experts or tokens, but then a small layer."""
    if name.startswith("triton") and max(case.M * case.topk, case.E) > 32:
        return replace(case, M=min(case.M, 70), K=min(case.K, 64), N=min(case.N, 32), E=min(case.E, 64))
    return case


def worth_interpreting(case: Case, name: str, precision: Precision) -> bool:
    """Whether Triton's interpreter, which takes seconds for a layer, is to run a case in a precision.

    All of them run in FP16, with the weights in FP8 or not; the rest is a matter of the first load and the last store.
    """
    return not name.startswith("triton") or precision.act_dtype == "fp16" or case in TOKENS.values()


def on_gpu(case: Case) -> Case:
    """The case as a GPU can afford it: more tokens where tokens are the point."""
    return replace(case, M=case.M * 16) if case.M >= 33 else case
