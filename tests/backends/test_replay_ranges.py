"""A replay launches at every token count of its range what an ordinary call of that token count launches.

Of the real launchers of each backend, with kernels that are noted instead of started: the same compiled kernels (by the
key of `fast_launch`), grids and numbers, and addresses in the same places of as many bytes.
"""

import importlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moe_dispatch.machine import Machine
from moe_dispatch.problem import DType
from moe_dispatch.testing import Case, Precision
from moe_dispatch.workloads import make_experts
from tests.support.decode import GPT_OSS, INTERPRETED
from tests.support.stub_kernels import cpu_is_the_device

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

from moe_dispatch.backends.gluon_hopper.backend import GluonHopperBackend
from moe_dispatch.backends.triton_common import features
from moe_dispatch.backends.triton_common import replay as replay_module
from moe_dispatch.backends.triton_common.backend import TritonBackend
from moe_dispatch.backends.triton_common.fast_launch import FastKernel
from moe_dispatch.backends.triton_common.internals import Encoding
from moe_dispatch.backends.triton_common.replay import Replay, record
from moe_dispatch.backends.triton_persistent.backend import TritonPersistentBackend
from moe_dispatch.backends.triton_splitk.backend import TritonSplitKBackend
from moe_dispatch.backends.triton_vector.backend import TritonVectorBackend

pytestmark = INTERPRETED
MOST = 2000  # tokens of an ordinary call here
Started = tuple[tuple[Any, ...], tuple[int, ...], list[Any]]  # kernel and key, grid, arguments
started: list[Started] = []
allocated: list[Tensor] = []


class Noted(NamedTuple):
    """What stands for a compiled kernel."""

    key: tuple[Any, ...]
    descriptors: tuple[tuple[int, Encoding], ...]
    padding: tuple[None, ...] = ()

    def start(self, grid: tuple[int, ...], _stream: int, values: list[Any]) -> None:
        started.append((self.key, (*grid, 1, 1)[:3], values))


class Compiled(dict[Any, Any]):
    """Has every variant of a kernel."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.kernel = kernel

    def get(self, key: Any, _default: Any = None) -> Any:
        arguments = key[2 + 2 * key[1] :]  # after the device and the constants
        kinds = [isinstance(each, tuple) and isinstance(each[0], type) for each in arguments]
        places = [place for place, descriptor in enumerate(kinds) if descriptor]
        return Noted((self.kernel, *key), tuple((place, Encoding({}, "")) for place in reversed(places)))


@pytest.fixture(autouse=True)
def noting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels and allocations are noted; a replay that starts nothing cannot be verified by its output."""
    backends, new_empty = Path(__file__).parents[2] / "backends", Tensor.new_empty
    for path in backends.glob("*/*_kernel.py"):
        if path.parent.name not in ("exchange", "vllm_fused_moe"):
            module = importlib.import_module(f"moe_dispatch.backends.{path.parent.name}.{path.stem}")
            for name, kernel in vars(module).items():
                if re.fullmatch(r"_moe_\w+_kernel", name):
                    noted = kernel
                    if not isinstance(kernel, FastKernel):  # of torch for CUDA Gluon's are that, in the interpreter too
                        compiled = isinstance(kernel, JITFunction)
                        noted = FastKernel(kernel if compiled else JITFunction(kernel.fn, **kernel.kwargs))
                    monkeypatch.setattr(noted, "_launches", Compiled(name))
                    monkeypatch.setattr(module, name, noted)

    def noted_empty(like: Tensor, *shape: Any, **options: Any) -> Tensor:
        allocated.append(new_empty(like, *shape, **options))
        return allocated[-1]

    monkeypatch.setattr(Tensor, "new_empty", noted_empty)
    monkeypatch.setattr(replay_module, "_agree", lambda *_: True)
    with cpu_is_the_device():
        yield


def call(M: int, K: int, topk: int, ids: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty(M, K, dtype=torch.bfloat16), torch.empty(M, topk), torch.empty(M, topk, dtype=ids)


def check(replay: Replay, experts: Any, config: Any, M: int, topk: int, ids: torch.dtype) -> None:
    x, weights, topk_ids = call(M, experts.K, topk, ids)
    out = torch.empty_like(x)
    started.clear()
    allocated.clear()
    replay.launch(x, experts, weights, topk_ids, config, out)
    ordinary, memories = started.copy(), allocated.copy()
    assert [memory.nbytes for memory in memories] == [size.at(M) for size in replay.intermediates]
    started.clear()
    allocated.clear()
    assert replay.play(x, experts, weights, topk_ids, out)
    (scratch,), distances = allocated, replay._sizes[M].distances
    assert [grid for _, grid, _ in started] == [grid for _, grid, _ in ordinary]
    for step, (key, _, values), (real_key, _, real) in zip(replay.steps, started, ordinary, strict=True):
        assert key == real_key
        assert len(values) == len(real)
        addresses = {place: base for place, base, _ in step.addresses} | {each.place: each.base for each in step.maps}
        first = len(replay.weights) + 4  # of the bases of intermediates
        for place, (value, wanted) in enumerate(zip(values, real, strict=True)):
            number = addresses.get(place, 0) - first
            if number < 0:
                assert value == wanted
            else:
                distance = value - scratch.data_ptr() - distances[number]
                assert distance == wanted - memories[number].data_ptr()


BACKENDS: tuple[type[TritonBackend], ...] = (
    TritonSplitKBackend, TritonVectorBackend, TritonPersistentBackend, GluonHopperBackend,
)  # fmt: skip
UNSUPPORTED = {("gluon_hopper", "fp8_channel"), ("triton_vector", "mxfp4")}
LAYERS: tuple[dict[str, Any], ...] = (
    {"E": 8, "topk": 2, "K": 256, "N": 256},
    {"E": 5, "topk": 3, "K": 512, "N": 128, **GPT_OSS},
    {"E": 8, "topk": 2, "K": 256, "N": 256, "transposed": True},
)


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "fp8_channel", "mxfp4"])
@pytest.mark.parametrize("cls", BACKENDS, ids=lambda cls: cls.name)
def test_launches_are_those_of_an_ordinary_call(
    cls: type[TritonBackend], dtype: DType, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine.load("h200")
    monkeypatch.setattr(features, "interpreting", lambda: False)  # backends take what they take on the machine
    backend = cls(machine)
    layers = itertools.cycle(itertools.product(LAYERS, (torch.int32, torch.int64)))
    checked = 0
    for M, (layer, ids) in zip((1, 3, 16, 33, 128, 300, 1000), layers, strict=False):
        case = Case(M=M, **layer)
        problem = case.problem(Precision(dtype, "bf16"), machine)
        if backend.unsupported_reasons(problem):
            continue
        experts = make_experts(case.layer, dtype, "cpu", act_dtype="bf16", transposed=case.transposed)
        x, weights, topk_ids = call(M, case.K, case.topk, ids)
        config = backend.configs(problem)[-1]
        with monkeypatch.context() as patches:
            patches.setattr(Tensor, "is_cuda", True)
            replay = record(backend, backend.launch, (x, experts, weights, topk_ids), config)
            first, last = replay.tokens.first, min(replay.tokens.last, MOST)
            for count in {first, (first + last) // 2, last, M}:
                check(replay, experts, config, count, case.topk, ids)
                checked += 1
    assert checked >= 4 or (cls.name, dtype) in UNSUPPORTED
