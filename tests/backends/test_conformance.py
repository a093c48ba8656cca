"""The conformance suite over every built-in backend: on the GPU, or without one in Triton's interpreter."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from moe_dispatch import moe_forward, stats, warm_up
from moe_dispatch.arrived_rows import PeerRows
from moe_dispatch.backend import Backend
from moe_dispatch.backends.reference import ReferenceBackend, ReferenceConfig
from moe_dispatch.backends.triton_common.features import on_triton
from moe_dispatch.machine import Machine
from moe_dispatch.numerics import QuantizedRows, quantize_rows_torch
from moe_dispatch.problem import Mode, MoEProblem
from moe_dispatch.registry import BACKENDS
from moe_dispatch.testing import (
    ACTIVATIONS,
    CASES,
    INPUTS,
    MODEL_CASES,
    MODEL_PRECISIONS,
    PRECISIONS,
    SHAPES,
    TOKENS,
    Case,
    Inputs,
    Precision,
    conform,
    make_inputs,
    relative_error,
)
from tests.support.interpreter import with_few_programs
from tests.support.refusals import available, require

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.filterwarnings("default")
BUILT_IN = (
    "reference", "torch_grouped", "triton_persistent", "gluon_hopper", "triton_splitk", "triton_vector",
    "vllm_fused_moe", "deep_gemm",
)  # fmt: skip
EVERY_BACKEND = pytest.mark.parametrize("name", BUILT_IN)
EVERY_PRECISION = pytest.mark.parametrize("precision", PRECISIONS, ids=str)
LIBRARIES = ("vllm_fused_moe", "deep_gemm")
# What Triton's interpreter runs with per-channel FP8.
PER_CHANNEL = (
    INPUTS["a NaN in one token, gpt-oss"], SHAPES["neither of 128, several blocks"], SHAPES["odd"],
    ACTIVATIONS["relu2 with biases, odd shape"],
)  # fmt: skip
# What runs with MXFP4 without a GPU.
MXFP4 = (
    TOKENS["M=17"], INPUTS["a NaN in one token, gpt-oss"], SHAPES["N not of 128"], SHAPES["odd"],
    ACTIVATIONS["relu2, no gate"], ACTIVATIONS["gpt-oss"],
)  # fmt: skip
# Their results are copied: a loop in torch, and a library whose function returns memory of its own.
COPYING = ("reference", "vllm_fused_moe")


def eligible(name: str, case: Case, precision: Precision, mode: Mode = "eager") -> tuple[Backend, MoEProblem, Inputs]:
    """The backend, the problem and its inputs, or a skip with the backend's own reasons."""
    backend = available(name)
    problem = case.problem(precision, backend.machine, mode)
    require(backend, problem)
    return backend, problem, make_inputs(case, precision, DEVICE)


def affordable(case: Case, name: str) -> Case:
    """The case as Triton's interpreter can afford it, where that runs it: many experts or tokens, but a small layer."""
    if DEVICE == "cuda":
        return case
    if name == "triton_vector" and case not in SHAPES.values():  # each of its programs has one slot and few rows
        case = dataclasses.replace(case, M=min(case.M, 9), K=64, N=32)
    if name.startswith("triton") and max(case.M * case.topk, case.E) > 16:
        return dataclasses.replace(case, M=min(case.M, 70), K=min(case.K, 64), N=min(case.N, 32), E=min(case.E, 64))
    return case


def worth_interpreting(case: Case, name: str, precision: Precision) -> bool:
    """Whether Triton's interpreter, which takes about a second for a layer, is to run a case in a precision.

    Routing does not depend on the weights' dtype, so those cases run in FP16; shapes and activations run in FP8, whose
    blocks and multipliers they concern; token counts and values that are not finite run in both. Per-channel FP8 runs a
    sample: it differs in the multipliers alone. The other precisions are a matter of the first load and the last store:
    one token count each.
    """
    if precision.dtype == "mxfp4":
        return precision.act_dtype == "fp16" and case in MXFP4
    if not name.startswith("triton") or case is TOKENS["M=3"]:
        return True
    if precision.dtype == "fp8_channel":
        return precision.act_dtype == "fp16" and case in PER_CHANNEL
    if case in (*TOKENS.values(), *INPUTS.values()):
        return precision.act_dtype == "fp16"
    return precision == Precision("fp8" if case in (*SHAPES.values(), *ACTIVATIONS.values()) else "fp16", "fp16")


def on_gpu(case: Case) -> Case:
    """The case as a GPU can afford it: more tokens where tokens are the point."""
    return dataclasses.replace(case, M=case.M * 16) if case.M >= 33 else case


def test_the_built_in_backends_are_registered() -> None:
    assert set(BUILT_IN) <= set(BACKENDS.names())


@ON_GPU
@pytest.mark.usefixtures("poisoned_memory")
@EVERY_PRECISION
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@EVERY_BACKEND
def test_default_configuration(name: str, case: Case, precision: Precision) -> None:
    if DEVICE == "cpu" and not worth_interpreting(case, name, precision):
        pytest.skip("on a GPU only")
    case = on_gpu(case) if DEVICE == "cuda" else affordable(case, name)
    backend, problem, inputs = eligible(name, case, precision)
    for config in backend.configs(problem) if case.nan and name in LIBRARIES else [backend.default_config(problem)]:
        conform(backend, with_few_programs(config), inputs)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda hidden: hidden.nan_to_num(0.0), "a NaN in a token was lost"),
        (lambda hidden: hidden + 0 * hidden.sum(), "relative error inf"),
    ],
    ids=["lost", "spread"],
)
def test_a_nan_that_does_not_stay_in_its_token_does_not_conform(spoil: Callable[[Tensor], Tensor], says: str) -> None:
    class Spoiling(ReferenceBackend):
        def run(self, hidden_states: Tensor, *rest: Any) -> Tensor:
            return super().run(spoil(hidden_states), *rest)

    inputs = make_inputs(INPUTS["a NaN in one token"], Precision("fp32", "fp32"), "cpu")
    with pytest.raises(AssertionError, match=says):
        conform(Spoiling(Machine.inspect("cpu")), ReferenceConfig(), inputs)


@ON_GPU
@EVERY_PRECISION
@pytest.mark.parametrize("routing", ["uniform", "sentinels"])
@EVERY_BACKEND
def test_by_name_and_into_memory_of_the_caller(name: str, routing: str, precision: Precision) -> None:
    if DEVICE == "cpu" and not worth_interpreting(TOKENS["M=1"], name, precision):
        pytest.skip("on a GPU only")
    case = Case(M=7, routing=routing) if DEVICE == "cuda" else Case(M=3, E=4, K=32, N=32, routing=routing)
    backend, problem, inputs = eligible(name, case, precision)
    conform(backend, with_few_programs(backend.default_config(problem)), inputs, into=True)
    buffer = torch.full((case.M + 2, case.K), torch.nan, dtype=inputs.hidden_states.dtype, device=DEVICE)
    truth = inputs.expected(backend)
    with torch.no_grad():
        calls = 4 if DEVICE == "cuda" else 2  # the fast path included
        for _ in range(calls):
            out = moe_forward(*inputs.arguments, backend=name, out=buffer[1:-1])
            assert out.data_ptr() == buffer[1:-1].data_ptr()
            assert relative_error(out, truth) <= backend.tolerance[precision.dtype]
        out = moe_forward(*inputs.arguments, backend=name)
    assert relative_error(out, truth) <= backend.tolerance[precision.dtype]
    assert {ran: counts["ran"] for ran, counts in stats().items()} == {name: calls + 1}, "it is that backend that runs"
    assert buffer[[0, -1]].isnan().all(), "nothing is written beside the output"


@ON_GPU
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("routing", ["uniform", "sentinels"])
@EVERY_BACKEND
def test_rows_that_are_quantised_already_give_the_same_bits(name: str, routing: str) -> None:
    on_gpu = DEVICE == "cuda"
    precision = Precision("fp8", "bf16" if on_gpu else "fp16")
    case = Case(M=300, E=32, K=512, N=256, routing=routing) if on_gpu else Case(M=3, E=4, K=256, N=32, routing=routing)
    backend, problem, inputs = eligible(name, case, precision)
    if not backend.takes_quantized_rows(problem):
        pytest.skip("takes no quantised rows")
    run: Any = backend.run_into
    hidden, *others = arguments = inputs.arguments
    rows = QuantizedRows(*quantize_rows_torch(hidden), hidden.dtype)
    for config in backend.configs(problem)[: None if on_gpu else 1]:
        expected = backend.run(*arguments, config)
        out = torch.full_like(hidden, torch.nan)
        run(rows, *others, config, out)
        assert torch.equal(out, expected), config.label


@ON_GPU
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("precision", [Precision("fp16", "fp16"), Precision("bf16", "bf16"), Precision("fp8", "bf16")])
@EVERY_BACKEND
def test_results_go_to_the_memory_of_several_ranks(name: str, precision: Precision) -> None:
    case = Case(M=40, E=32, K=512, N=256) if DEVICE == "cuda" else Case(M=4, E=4, K=128, N=32)
    if DEVICE == "cpu" and precision.act_dtype == "bf16":
        pytest.skip("on a GPU only")
    backend, problem, inputs = eligible(name, case, precision)
    if not backend.stores_to_peers:
        pytest.skip("stores in no peers' memory")
    run: Any = backend.run_into
    hidden, half = inputs.hidden_states, case.M // 2
    configs = backend.configs(problem)
    for config in configs if DEVICE == "cuda" else [with_few_programs(configs[0])]:
        expected = backend.run(*inputs.arguments, config)
        memories = [torch.full((half + 2, case.K), torch.nan, dtype=hidden.dtype, device=DEVICE) for _ in range(2)]
        addresses = torch.tensor([memory.data_ptr() for memory in memories], device=DEVICE)
        peers = PeerRows(addresses, case.K * hidden.element_size(), half, hidden.new_empty(1))
        run(*inputs.arguments, config, peers)
        assert torch.equal(torch.cat([memory[1:-1] for memory in memories]), expected), config.label
        assert all(memory[[0, -1]].isnan().all() for memory in memories), "nothing is written beside the output"


class Outputs(TorchDispatchMode):
    """Counts what torch allocates like the output, and what it copies into the output."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch does not annotate it
        self.out = out
        self.allocated = self.copied = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        like = isinstance(result, Tensor) and (result.shape, result.dtype) == (self.out.shape, self.out.dtype)
        self.allocated += like and not func.is_view and result.data_ptr() != self.out.data_ptr()
        self.copied += func is torch.ops.aten.copy_.default and args[0].data_ptr() == self.out.data_ptr()
        return result


@pytest.fixture
def interpreter_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter copies every argument of a launch back; modes do not see it."""
    if DEVICE == "cuda":
        return
    if not on_triton(torch.empty(0)):
        pytest.skip("the stages are torch's where Triton does not even interpret")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    launch = interpreter.GridExecutor.__call__

    def unseen(*args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            launch(*args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", unseen)


@ON_GPU
@pytest.mark.usefixtures("interpreter_unseen")
@EVERY_PRECISION
@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in COPYING])
def test_memory_of_the_caller_is_written_once(name: str, precision: Precision) -> None:
    # In MXFP4 rows may be ordered anew, and padded: to another width than the output's.
    K = 320 if precision.dtype == "mxfp4" else 256
    case = Case(M=3, E=2, K=K) if DEVICE == "cuda" else Case(M=3, E=2, K=64, N=32)
    if DEVICE == "cpu" and precision.act_dtype == "bf16" and name != "torch_grouped":
        pytest.skip("on a GPU only")
    backend, problem, inputs = eligible(name, case, precision)
    config = with_few_programs(backend.default_config(problem))
    expected = backend.run(*inputs.arguments, config)
    out = torch.full_like(inputs.hidden_states, torch.nan)
    with Outputs(out) as seen:
        assert backend.run_into(*inputs.arguments, config, out) is out
    assert (seen.allocated, seen.copied) == (0, 0)
    assert torch.equal(out, expected)


@ON_GPU
@EVERY_PRECISION
@EVERY_BACKEND
def test_deterministic_configurations_repeat_bit_for_bit(name: str, precision: Precision) -> None:
    case = Case(M=17, E=8, topk=4) if DEVICE == "cuda" else affordable(Case(M=5, E=4), name)
    backend, problem, inputs = eligible(name, case, precision)
    configs = [config for config in backend.configs(problem) if backend.deterministic(config)]
    for config in configs if DEVICE == "cuda" else map(with_few_programs, configs[:2]):
        first, again = (backend.run(*inputs.arguments, config) for _ in range(2))
        assert torch.equal(first, again), config.label


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("precision", MODEL_PRECISIONS, ids=str)
@pytest.mark.parametrize("case", MODEL_CASES.values(), ids=MODEL_CASES.keys())
@pytest.mark.parametrize("name", BUILT_IN[1:])
def test_every_configuration_on_model_shapes(name: str, case: Case, precision: Precision) -> None:
    backend, problem, inputs = eligible(name, case, precision)
    for config in backend.configs(problem):
        conform(backend, config, inputs)


@pytest.mark.gpu
@EVERY_PRECISION
@pytest.mark.parametrize("M", [1, 48, 512])
@EVERY_BACKEND
def test_captured_replay_equals_eager_on_new_inputs(name: str, M: int, precision: Precision) -> None:
    case = Case(M=M, E=32, topk=4, K=512, N=256)
    backend, problem, old = eligible(name, case, precision, mode="graph")
    new = make_inputs(case, precision, DEVICE, seed=2)
    for config in backend.configs(problem):
        hidden, weights, ids = old.hidden_states.clone(), old.topk_weights.clone(), old.topk_ids.clone()
        eager = backend.run(new.hidden_states, old.experts, new.topk_weights, new.topk_ids, config)
        backend.run(hidden, old.experts, weights, ids, config)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = backend.run(hidden, old.experts, weights, ids, config)
        hidden.copy_(new.hidden_states)
        weights.copy_(new.topk_weights)
        ids.copy_(new.topk_ids)
        for _ in range(2):  # the second replay finds what the first left behind
            graph.replay()
            torch.cuda.synchronize()
            if backend.deterministic(config):
                assert torch.equal(out, eager), config.label
            else:
                assert relative_error(out, eager.float()) <= backend.tolerance[precision.dtype]


@pytest.mark.gpu
@EVERY_PRECISION
@pytest.mark.parametrize("name", BUILT_IN[1:])
def test_nothing_synchronises_with_the_host(name: str, precision: Precision) -> None:
    case = Case(M=8, E=32, topk=4, K=512, N=256)
    backend, problem, inputs = eligible(name, case, precision, mode="graph")
    for config in backend.configs(problem):
        backend.run(*inputs.arguments, config)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for config in backend.configs(problem):
            backend.run(*inputs.arguments, config)
        with torch.no_grad():
            torch.cuda.set_sync_debug_mode("default")
            moe_forward(*inputs.arguments, backend=name)
            torch.cuda.set_sync_debug_mode("error")
            moe_forward(*inputs.arguments, backend=name)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@ON_GPU
def test_strided_tensors_of_any_kind_are_taken() -> None:
    """Through moe_forward, which makes them contiguous: a backend may rely on it."""
    inputs = make_inputs(Case(M=7, strided=True), Precision("fp32", "fp32"), DEVICE)
    weights = torch.stack([inputs.topk_weights, torch.full_like(inputs.topk_weights, torch.nan)], dim=2)[..., 0]
    ids = torch.stack([inputs.topk_ids, torch.full_like(inputs.topk_ids, -7)], dim=2)[..., 0]
    assert not any(tensor.is_contiguous() for tensor in (inputs.hidden_states, weights, ids))
    out = moe_forward(inputs.hidden_states, inputs.experts, weights, ids)
    assert relative_error(out, inputs.truth) <= 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("precision", MODEL_PRECISIONS, ids=str)
@pytest.mark.parametrize("M", [1, 48])
@EVERY_BACKEND
def test_captured_into_memory_of_the_caller(name: str, M: int, precision: Precision) -> None:
    case = Case(M=M, E=32, topk=4, K=512, N=256)
    backend, _, inputs = eligible(name, case, precision, mode="graph")
    out = torch.full_like(inputs.hidden_states, torch.nan)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        warm_up(inputs.experts, case.topk, [M], inputs.hidden_states.dtype, backend=name, into_out=True)
        with torch.cuda.graph(graph):
            assert moe_forward(*inputs.arguments, backend=name, out=out) is out
    graph.replay()
    torch.cuda.synchronize()
    assert relative_error(out, inputs.expected(backend)) <= backend.tolerance[precision.dtype]
