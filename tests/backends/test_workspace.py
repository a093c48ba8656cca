"""What a backend says that it takes of memory is what its run allocates, within a stated factor.

DeepGEMM's and vLLM's are compared with stand-ins only (test_deep_gemm.py): their libraries are not here.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_dispatch.machine import Machine
from moe_dispatch.problem import DType
from moe_dispatch.registry import BACKENDS
from moe_dispatch.testing import Case, Precision, make_inputs
from moe_dispatch.workloads import make_experts
from tests.backends.test_replay_ranges import UNSUPPORTED, noting  # noqa: F401 - a fixture
from tests.support.decode import INTERPRETED

pytest.importorskip("triton")
from moe_dispatch.backends.triton_common import replay as replay_module

pytestmark = INTERPRETED


class Allocations(TorchDispatchMode):
    """Counts the bytes of the storages that torch's operations make.

    Attributes:
        most: Bytes that were alive at once.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self._now = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self._now += storage.nbytes()
                self.most = max(self.most, self._now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out

    def _freed(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self._now -= nbytes


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "fp8_channel", "mxfp4"])
@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("triton_splitk", "h200"),
        ("triton_splitk", "a100-80gb"),  # where both products are one launch
        ("triton_vector", "h200"),
        ("triton_persistent", "h200"),
        ("gluon_hopper", "h200"),
    ],
)
def test_what_ours_allocate(name: str, device: str, dtype: DType, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a replay, whose intermediates are all alive at once: the most that a run and its fast path take."""
    machine, compared = Machine.load(device), 0
    backend: Any = BACKENDS.load(name)(machine)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(replay_module.Replay, "play", lambda *_, **__: True)  # nothing is computed
    # So small a layer shows the lists of split-K's one launch.
    shapes = [(1, 1024, 256), (128, 256, 512), *([(2, 128, 128)] if name == "triton_splitk" else [])]
    for M, K, N in shapes:
        case = Case(M=M, E=8, topk=2, K=K, N=N)
        problem = case.problem(Precision(dtype, "bf16"), machine)
        if backend.unsupported_reasons(problem):
            continue
        experts = make_experts(case.layer, dtype, "cpu", act_dtype="bf16")
        x, weights = torch.empty(M, K, dtype=torch.bfloat16), torch.empty(M, case.topk)
        first, *others = backend.configs(problem)
        # Of split-K all, and a tile that holds whole groups of gate and of up, and quantises them.
        more = {*others, first.model_copy(update={"block_n": 256})} if name == "triton_splitk" else {*others[-1:]}
        for config in {first, *more}:
            replay = replay_module.record(backend, backend.launch, (x, experts, weights, weights.int()), config)
            allocated = sum(size.at(M) for size in replay.intermediates)
            # Multipliers, lists of slots and where each expert's rows begin come to 4 % here. For MXFP4 rows are padded
            # to whole blocks, of which there are fewer than said.
            least = 0.55 if dtype == "mxfp4" else 0.98
            assert least < allocated / backend.workspace_bytes(problem, config) < 1.05, (M, config)
            compared += 1
    assert compared >= 2 or (name, dtype) in UNSUPPORTED


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8", "mxfp4"])
@pytest.mark.parametrize("name", ["reference", "torch_grouped"])
def test_what_torch_allocates(name: str, dtype: DType) -> None:
    """On a CPU, where every token names one expert, which is the worst for the reference."""
    machine = Machine.inspect("cpu")
    backend: Any = BACKENDS.load(name)(machine)
    precision = Precision(dtype, "fp32" if dtype == "fp32" else "bf16")
    for M, K, N, E in ((2, 256, 256, 8), (200, 256, 256, 8), (100, 128, 512, 4)):
        case = Case(M=M, E=E, topk=2, K=K, N=N)
        problem = case.problem(precision, machine)
        if backend.unsupported_reasons(problem):
            assert (name, dtype) == ("torch_grouped", "fp8")
            continue
        inputs = make_inputs(case, precision, "cpu")
        inputs.topk_ids.fill_(1)
        config, out = backend.default_config(problem), torch.empty_like(inputs.hidden_states)
        given = (inputs.hidden_states, inputs.topk_weights, inputs.topk_ids, out)
        with torch.no_grad(), Allocations((*given, *(tensor for _, tensor in inputs.experts.tensors()))) as allocations:
            backend.run_into(*inputs.arguments, config, out)
        assert 0.4 < allocations.most / backend.workspace_bytes(problem, config) < 1.25, case
