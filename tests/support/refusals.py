"""What a backend must not take, with what its reasons must say."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from moe_dispatch.backend import Backend
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.errors import BackendUnavailableError
from moe_dispatch.problem import DType, MoEProblem


@dataclass(frozen=True)
class Refusal:
    """A problem that a backend must not take, and what its reasons must name."""

    problem: MoEProblem
    words: tuple[str, ...]

    def check(self, backend: Backend) -> None:
        reasons = " | ".join(backend.unsupported_reasons(self.problem))
        assert all(word in reasons for word in self.words), reasons


def on_hopper(dtype: DType = "bf16", **changes: object) -> MoEProblem:
    """A small problem that the libraries take on an H200, changed."""
    plain = MoEProblem(M=4, K=256, N=128, E=8, topk=2, dtype=dtype, act_dtype="fp16" if dtype == "fp16" else "bf16")
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def available(name: str, device: torch.device | None = None) -> Backend:
    """A backend by name, or a skip with the reasons why it is not here."""
    try:
        return get_dispatcher(device).planner.backend(name)
    except BackendUnavailableError as error:
        pytest.skip(str(error))


def require(backend: Backend, problem: MoEProblem) -> None:
    """Skip with the backend's reasons where it does not take a problem."""
    if reasons := backend.unsupported_reasons(problem):
        pytest.skip("; ".join(reasons))
