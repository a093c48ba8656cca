"""A replay launches at every token count of its range what an ordinary call of that token count launches.

Of each backend's real launchers, with kernels that are noted in place of started: the same variants of kernels (by the
key of `fast_launch`), grids and numbers, and addresses at the same places of as many bytes.
"""

import functools
import importlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch.backend import Inputs
from moe_dispatch.machine import Machine
from moe_dispatch.problem import DType
from moe_dispatch.registry import BACKENDS
from moe_dispatch.testing import Case, Precision
from moe_dispatch.workloads import make_experts
from tests.support.decode import GPT_OSS, INTERPRETED
from tests.support.python_calls import python_calls
from tests.support.stub_kernels import cpu_is_the_device

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

from moe_dispatch.backends.gluon_hopper.backend import GluonHopperBackend
from moe_dispatch.backends.gluon_hopper.config import GluonHopperConfig
from moe_dispatch.backends.triton_common import features
from moe_dispatch.backends.triton_common import replay as replay_module
from moe_dispatch.backends.triton_common.fast_launch import FastKernel
from moe_dispatch.backends.triton_common.internals import Encoding, Launch

pytestmark = INTERPRETED
LAYERS: tuple[dict[str, Any], ...] = (
    {"E": 8, "topk": 2, "K": 256, "N": 256},
    {"E": 5, "topk": 3, "K": 512, "N": 128, **GPT_OSS},
    {"E": 8, "topk": 2, "K": 256, "N": 256, "transposed": True},
)
UNSUPPORTED = {("gluon_hopper", "fp8_channel"), ("triton_vector", "mxfp4")}
started: list[tuple[Any, tuple[int, ...], list[Any]]] = []  # variant of a kernel, grid, arguments
allocated: list[Tensor] = []


class Variants(dict[Any, Any]):
    """Has every variant of a kernel."""

    def get(self, key: Any, _default: Any = None) -> Launch:
        kinds = key[2 + 2 * key[1] :]  # of arguments, after the device and the constants
        described = [place for place, kind in enumerate(kinds) if isinstance(kind, tuple) and isinstance(kind[0], type)]

        def launcher(*passed: Any) -> None:
            started.append(((id(self), key), passed[:3], passed[-1]))

        return Launch(launcher, (), True, tuple((place, Encoding({}, "")) for place in described[::-1]), (), None)


@pytest.fixture(autouse=True)
def noting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for path in (Path(__file__).parents[2] / "backends").glob("[gst]*/*_kernel.py"):
        module = importlib.import_module(f"moe_dispatch.backends.{path.parent.name}.{path.stem}")
        for name, kernel in vars(module).items():
            if re.fullmatch(r"_moe_\w+_kernel", name):
                noted = kernel
                if not isinstance(kernel, FastKernel):
                    jit = kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn, **kernel.kwargs)
                    noted = FastKernel(jit)
                monkeypatch.setattr(noted, "_launches", Variants())
                monkeypatch.setattr(module, name, noted)
    new_empty = Tensor.new_empty

    def noted_empty(like: Tensor, *shape: Any, **options: Any) -> Tensor:
        allocated.append(new_empty(like, *shape, **options))
        return allocated[-1]

    monkeypatch.setattr(Tensor, "new_empty", noted_empty)
    monkeypatch.setattr(replay_module, "_agree", lambda *_: True)  # nothing is computed
    monkeypatch.setattr(features, "interpreting", lambda: False)  # backends take what they take on the machine
    with cpu_is_the_device():
        yield


def check(replay: replay_module.Replay, call: Inputs, config: Any) -> None:
    M, out = len(call[0]), torch.empty_like(call[0])
    started.clear()
    allocated.clear()
    replay.launch(*call, config, out)
    ordinary, memories = started.copy(), allocated.copy()
    assert [memory.nbytes for memory in memories] == [size.at(M) for size in replay.intermediates]
    started.clear()
    hidden, experts, weights, ids = call
    assert replay.play(hidden, experts, weights, ids, out)
    scratch, distances = allocated[-1].data_ptr(), replay._sizes[M].distances
    moved = [scratch + distances[number] - memory.data_ptr() for number, memory in enumerate(memories)]
    moved = [0] * (len(replay.weights) + 4) + moved  # by base
    for step, played, (variant, grid, values) in zip(replay.steps, started, ordinary, strict=True):
        maps = ((each.place, each.base, 0) for each in step.maps)
        for place, base, _ in (*step.addresses, *maps):
            values[place] += moved[base]
        assert played == (variant, grid, values)


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "fp8_channel", "mxfp4"])
@pytest.mark.parametrize(
    ("name", "device", "number"),
    [
        *((name, "h200", -1) for name in ("triton_splitk", "triton_vector", "triton_persistent", "gluon_hopper")),
        ("triton_splitk", "a100-80gb", 0),  # both products in one launch
    ],
)
def test_launches_are_those_of_an_ordinary_call(
    name: str, device: str, number: int, dtype: DType, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, checked = Machine.load(device), 0
    backend: Any = BACKENDS.load(name)(machine)
    kinds = itertools.cycle(itertools.product(LAYERS, (torch.int32, torch.int64)))
    for M, (layer, ids) in zip((1, 3, 16, 33, 128, 300, 1000), kinds, strict=False):
        case = Case(M=M, **layer)
        problem = case.problem(Precision(dtype, "bf16"), machine)
        if backend.unsupported_reasons(problem):
            continue
        experts = make_experts(case.layer, dtype, "cpu", act_dtype="bf16", transposed=case.transposed)
        config = backend.configs(problem)[number]
        x, weights = torch.empty(2000, case.K, dtype=torch.bfloat16), torch.empty(2000, case.topk)
        with monkeypatch.context() as patches:
            patches.setattr(Tensor, "is_cuda", True)
            call = x[:M], experts, weights[:M], weights[:M].to(ids)
            replay = replay_module.record(backend, backend.launch, call, config)
            first, last = replay.tokens.first, min(replay.tokens.last, len(x))
            numbers = python_calls(functools.partial(replay._sizes_of, M)).count("at")
            assert numbers < 12, "each is computed by itself"
            for count in {first, (first + last) // 2, last, M}:
                check(replay, (x[:count], experts, weights[:count], weights[:count].to(ids)), config)
                checked += 1
    assert checked >= 4 or (name, dtype) in UNSUPPORTED


def test_weights_that_are_copied_are_not_copied_for_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(M=1536, E=2, topk=2, K=64, N=64)
    experts = make_experts(case.layer, "mxfp4", "cpu", act_dtype="bf16")
    weights = torch.empty(case.M, case.topk)
    backend = GluonHopperBackend(Machine.load("h200"))
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.delattr(replay_module, "record")
    call = torch.empty(case.M, case.K, dtype=torch.bfloat16), experts, weights, weights.int()
    assert backend.fast_path(call, GluonHopperConfig()) is None
