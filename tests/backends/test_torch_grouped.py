"""The torch_grouped backend beyond the conformance suite: its reasons on machines that are not here."""

import dataclasses

import pytest
import torch

from moe_dispatch.backends.torch_grouped import TorchGroupedBackend
from moe_dispatch.machine import Machine
from moe_dispatch.problem import DType, MoEProblem
from moe_dispatch.testing import relative_error, truth
from tests.support.described import CPU, H200, gpu, small_layer
from tests.support.refusals import Refusal

B200, A100, RTX5090 = gpu((10, 0)), gpu((8, 0)), gpu((12, 0))


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
    "sm_75": Refusal(problem(gpu((7, 5))), ("8.0 or newer", "got 7.5")),
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
        problem(H200, E=1023),
        # Where torch multiplies expert by expert, it takes any number of them.
        problem(A100, E=2048),
        problem(H200, "fp16", E=2048),
        problem(CPU, E=2048),
    ],
    ids=str,
)
def test_takes(taken: MoEProblem) -> None:
    assert TorchGroupedBackend(H200).unsupported_reasons(taken) == ()


def test_measurements_depend_on_torch() -> None:
    assert TorchGroupedBackend(H200).measured_versions() == {"torch": "2.11.0+cu130"}


def test_uninitialised_rows_are_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The conformance suite poisons `torch.empty`, and not what torch's grouped product leaves uninitialised."""
    grouped_mm = torch.nn.functional.grouped_mm

    def poisoning(a: torch.Tensor, b: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        out = grouped_mm(a, b, offs=offs)
        out[int(offs[-1]) :] = torch.nan
        return out

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", poisoning)
    generator = torch.Generator().manual_seed(3)
    hidden, weights = torch.randn(8, 24, generator=generator), torch.rand(8, 3, generator=generator)
    ids = torch.randint(0, 6, (8, 3), generator=generator).int()
    ids[::2, 1], weights[::2, 1] = -1, torch.nan
    arguments = hidden, small_layer("fp32", bias=True, E=6, topk=3, K=24, N=40), weights, ids
    backend = TorchGroupedBackend(CPU)
    assert relative_error(backend.run(*arguments, backend.config_type()), truth(*arguments)) <= 1e-6
