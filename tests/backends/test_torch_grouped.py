"""The torch_grouped backend: its reasons on machines that are not here, and its results on this one."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from moe_dispatch.activations import ACTIVATIONS, Activation
from moe_dispatch.backends.reference import ReferenceBackend, ReferenceConfig
from moe_dispatch.backends.torch_grouped import TorchGroupedBackend
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine
from moe_dispatch.problem import DType, MoEProblem
from moe_dispatch.workloads import Workload, make_experts, torch_dtype
from tests.support.refusals import Refusal

CPU = Machine(device="cpu", name="a cpu", sms=4, memory_bytes=1 << 34, torch="2.13.0+cpu")


def gpu(name: str, capability: tuple[int, int]) -> Machine:
    return Machine(
        device="cuda",
        name=name,
        capability=capability,
        sms=108,
        memory_bytes=80 << 30,
        torch="2.11.0+cu130",
        cuda="13.0",
        triton="3.6.0",
    )


H200, B200, A100, RTX5090 = (
    gpu("NVIDIA H200", (9, 0)), gpu("NVIDIA B200", (10, 0)), gpu("NVIDIA A100", (8, 0)), gpu("RTX 5090", (12, 0)),
)  # fmt: skip


def problem(machine: Machine, dtype: DType = "bf16", **changes: object) -> MoEProblem:
    plain = MoEProblem(
        M=4, K=64, N=32, E=4, topk=2, dtype=dtype, act_dtype="bf16" if dtype == "fp8" else dtype,
        device=machine.device, capability=machine.capability,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


REFUSALS = {
    # What torch would do with a host synchronisation.
    "graph on sm_80": Refusal(problem(A100, mode="graph"), ("bf16 on sm_80", "9.x and 10.x", "host")),
    "graph on sm_120": Refusal(problem(RTX5090, mode="graph"), ("bf16 on sm_120",)),
    "graph in fp16 on sm_90": Refusal(problem(H200, "fp16", mode="graph"), ("fp16 on sm_90",)),
    # What torch refuses.
    "strides of bf16": Refusal(problem(H200, K=60, N=36), ("K % 8 == 0", "K=60", "N % 8 == 0", "N=36")),
    "strides of fp32": Refusal(problem(CPU, "fp32", K=62, N=30), ("K % 4 == 0", "K=62", "N % 4 == 0", "N=30")),
    # torch prepares the arguments of its kernel by one block with a thread for each expert.
    "1024 experts": Refusal(problem(H200, E=1024), ("at most 1023 experts", "E=1024")),
    "2048 experts": Refusal(problem(B200, E=2048, topk=32), ("at most 1023 experts", "E=2048")),
    "block fp8": Refusal(problem(H200, "fp8"), ("got fp8",)),
    "gradient": Refusal(problem(H200, needs_grad=True), ("no gradient",)),
    "sm_75": Refusal(problem(gpu("NVIDIA T4", (7, 5))), ("8.0 or newer", "got 7.5")),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_refuses_with_limit_and_value(refusal: Refusal) -> None:
    refusal.check(TorchGroupedBackend(H200))


@pytest.mark.parametrize(
    "taken",
    [
        problem(H200, mode="graph"),
        problem(B200, mode="graph"),
        problem(H200, "fp16"),
        problem(A100),
        problem(CPU),
        problem(CPU, "fp16"),
        problem(CPU, "fp32", K=4, N=12),
        problem(H200, bias=True, interleaved=True, activation="swiglu_oai"),
    ],
    ids=str,
)
def test_takes(taken: MoEProblem) -> None:
    assert TorchGroupedBackend(H200).unsupported_reasons(taken) == ()


def test_the_limit_of_experts_is_the_grouped_kernels() -> None:
    """Elsewhere torch multiplies expert by expert, and takes any number of them."""
    for other in (problem(H200, E=1023), problem(A100, E=2048), problem(H200, "fp16", E=2048), problem(CPU, E=2048)):
        assert TorchGroupedBackend(H200).unsupported_reasons(other) == (), other


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"triton": ""}, "triton is not installed"),
        ({"cuda": "", "capability": (9, 4), "name": "AMD Instinct MI300X"}, "never run on ROCm"),
        ({"cuda": "", "capability": (9, 0), "name": "AMD Instinct MI250X"}, "never run on ROCm"),
    ],
)
def test_its_stages_need_triton_on_a_gpu(changes: dict[str, object], words: str) -> None:
    machine = H200.model_copy(update=changes)
    (reason,) = TorchGroupedBackend(machine).unsupported_reasons(problem(machine))
    assert words in reason
    assert TorchGroupedBackend(CPU).unsupported_reasons(problem(CPU)) == ()


def test_measurements_depend_on_torch() -> None:
    assert TorchGroupedBackend(H200).measured_versions() == {"torch": "2.11.0+cu130"}


def layer(dtype: DType, activation: Activation = "silu", *, bias: bool = False, E: int = 6) -> ExpertWeights:
    interleaved = activation == "swiglu_oai"
    shape = Workload("tiny", E=E, topk=3, K=24, N=40, activation=activation, bias=bias, interleaved=interleaved)
    return make_experts(shape, dtype, "cpu", torch.Generator().manual_seed(1))


def relative_error(experts: ExpertWeights, weights: torch.Tensor, ids: torch.Tensor) -> float:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(ids.shape[0], experts.K, generator=generator).to(torch_dtype(experts.dtype))
    backend = TorchGroupedBackend(CPU)
    out = backend.run(hidden, experts, weights, ids, backend.config_type())
    assert out.dtype == hidden.dtype
    assert out.data_ptr() != hidden.data_ptr()
    truth = ReferenceBackend(CPU).run(hidden, experts, weights, ids, ReferenceConfig(compute_fp32=True)).float()
    assert out.shape == truth.shape
    return float((out.float() - truth).norm() / truth.norm().clamp(min=1e-20))


def routing(M: int, E: int = 6, topk: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(M, topk, generator=generator), torch.randint(0, E, (M, topk), generator=generator).int()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_agrees_with_the_reference(dtype: DType, activation: Activation) -> None:
    experts = layer(dtype, activation, bias=True)
    assert relative_error(experts, *routing(9)) <= TorchGroupedBackend.tolerance[dtype]


@dataclass(frozen=True)
class Routed:
    """Ids that something could trip over."""

    ids: list[list[int]]
    nan_where_not_ours: bool = False


ROUTED = {
    # Rows that torch leaves uninitialised: as many as there are slots without an expert.
    "sentinels with nan weights": Routed([[-1, 2, 6], [0, -1, 5], [7, 1, 1]], nan_where_not_ours=True),
    "no slot is ours": Routed([[-1, 6, 99], [-7, -1, 6]], nan_where_not_ours=True),
    # Empty groups: the same offset twice.
    "one expert": Routed([[4, 4, 4], [4, 4, 4]]),
    "only the last expert": Routed([[5, -1, -1]], nan_where_not_ours=True),
    "the same expert twice": Routed([[3, 3, 0], [1, 3, 3]]),
    "one token": Routed([[2, 0, 5]]),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("case", ROUTED.values(), ids=ROUTED)
def test_routing_edges(case: Routed, dtype: torch.dtype) -> None:
    ids = torch.tensor(case.ids, dtype=dtype)
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)) + 0.1
    if case.nan_where_not_ours:
        weights[(ids < 0) | (ids >= 6)] = torch.nan
    assert relative_error(layer("fp32", bias=True), weights, ids) <= 1e-6


def test_uninitialised_rows_are_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    grouped_mm = torch.nn.functional.grouped_mm

    def poisoning(a: torch.Tensor, b: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        out = grouped_mm(a, b, offs=offs)
        out[int(offs[-1]) :] = torch.nan
        return out

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", poisoning)
    weights, ids = routing(8)
    ids[::2, 1] = -1
    assert relative_error(layer("fp32", bias=True), weights, ids) <= 1e-6
