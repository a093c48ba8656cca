"""The kinds of fault that only a GPU shows, each tried on every backend by name, in BF16 and FP8.

1. Weights that are replaced through ``.data`` are used by the next call.
2. What a first call makes on one stream is not read too early from another.
3. Tensors may start where only their element size divides the address.
4. Weights that no kernel can read are refused: distributed, freed, moved, or of another dtype than before.

What can cost the CUDA context (2 with a library, 3 and 4) runs in a process of its own for each backend:
``python -m tests.gpu.test_faults FUNCTION BACKEND``.
"""

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from moe_dispatch import ExpertWeights, InvalidInputError, moe_forward
from moe_dispatch.backend import Backend
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.errors import BackendUnavailableError
from moe_dispatch.registry import BACKENDS, make_backend
from moe_dispatch.settings import settings
from moe_dispatch.testing import Case, Inputs, Precision, conform, make_inputs, relative_error

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
LIBRARIES = ("vllm_fused_moe", "deep_gemm")
PRECISIONS = {"bf16": Precision("bf16", "bf16"), "fp8": Precision("fp8", "bf16")}
NAMES = pytest.mark.parametrize("name", BACKENDS.names())
DTYPES = pytest.mark.parametrize("dtype", PRECISIONS)
CALLS = 4  # a kind of call is prepared for (see `Dispatcher`) from its third on
TOKENS = (64, 2)  # the first number that a backend takes; with 64, vLLM sorts its slots and reads its map of experts
DELAY_CYCLES = 200_000_000  # about 0.1 s
SKIPPED = 77


def case_of(M: int, **changes: Any) -> Case:
    return Case(M=M, E=32, topk=4, K=512, N=256, **changes)


def backend(name: str) -> Backend:
    """The backend, or a skip with its library's own reasons."""
    try:
        if name in LIBRARIES:
            importlib.import_module(f"moe_dispatch.backends.{name}.library").load()
        return get_dispatcher().planner.backend(name)
    except BackendUnavailableError as error:
        pytest.skip(str(error))


def taken(name: str, dtype: str, *cases: Case) -> tuple[Backend, Case]:
    """The backend and the first of the cases that it takes, or a skip with its reasons."""
    made = backend(name)
    for case in cases:
        reasons = made.unsupported_reasons(case.problem(PRECISIONS[dtype], made.machine))
        if not reasons:
            return made, case
    pytest.skip("; ".join(reasons))


def dtypes_of(name: str) -> list[str]:
    """The dtypes that a backend takes; a skip if it takes none."""
    made = backend(name)
    reasons: tuple[str, ...] = ()
    dtypes: list[str] = []
    for dtype, precision in PRECISIONS.items():
        against = [made.unsupported_reasons(case_of(M).problem(precision, made.machine)) for M in TOKENS]
        if all(against):
            reasons = against[0]
        else:
            dtypes.append(dtype)
    return dtypes or pytest.skip("; ".join(reasons))


def alone(function: Callable[..., None], *arguments: str) -> None:
    """Run a function in a process of its own, which ends with `run_alone`."""
    if settings().machine:
        pytest.skip("takes long, and is shown on the device as it is")
    command = [sys.executable, "-m", function.__module__, function.__name__, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    if done.returncode == SKIPPED:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def run_alone(functions: dict[str, Any]) -> None:
    """What a process of `alone` does: its arguments name a function and what to call it with."""
    try:
        with torch.no_grad():
            functions[sys.argv[1]](*sys.argv[2:])
    except pytest.skip.Exception as skipped:
        print(skipped)
        sys.exit(SKIPPED)


def check(made: Backend, inputs: Inputs, experts: ExpertWeights | None = None) -> None:
    """Call the backend by name until it is prepared for the call, and compare with the weights of now."""
    hidden, _, weights, ids = inputs.arguments
    now = Inputs(hidden, experts or inputs.experts, weights, ids, inputs.truth)
    expected = now.expected(made)
    with torch.no_grad():
        for call in range(CALLS):
            error = relative_error(moe_forward(*now.arguments, backend=made.name), expected)
            assert error <= made.tolerance[now.experts.dtype], f"call {call}: error {error:.1e}"


# 1. Replaced weights.


def replaced_by_new_tensors(experts: ExpertWeights, others: dict[str, Tensor]) -> None:
    for name, tensor in experts.tensors():
        tensor.data = others[name].cuda()


def replaced_where_freed_ones_were(experts: ExpertWeights, others: dict[str, Tensor]) -> None:
    """The allocator hands out the old addresses again, for other weights."""
    for name, tensor in experts.tensors():
        tensor.data = torch.empty(0, dtype=tensor.dtype, device="cuda")
        tensor.data = others[name].cuda()


def replaced_after_a_stay_on_the_host(experts: ExpertWeights, others: dict[str, Tensor]) -> None:
    """As by ``module.cpu()``, a weight update there, and ``module.cuda()``; they come back elsewhere."""
    for name, tensor in experts.tensors():
        tensor.data = others[name]
    hole = torch.empty(16 << 20, dtype=torch.uint8, device="cuda")
    for _, tensor in experts.tensors():
        tensor.data = tensor.data.cuda()
    del hole


def replaced_in_place(experts: ExpertWeights, others: dict[str, Tensor]) -> None:
    for name, tensor in experts.tensors():
        tensor.copy_(others[name])


@pytest.mark.parametrize(
    "replace",
    [
        replaced_by_new_tensors,
        replaced_where_freed_ones_were,
        replaced_after_a_stay_on_the_host,
        replaced_in_place,
    ],
)
@pytest.mark.parametrize("M", [1, 64, 512])
@DTYPES
@NAMES
def test_replaced_weights(
    name: str, dtype: str, M: int, replace: Callable[[ExpertWeights, dict[str, Tensor]], None]
) -> None:
    if TOKENS[0] != M and not name.startswith(("triton", "gluon")):
        pytest.skip("keeps nothing that depends on the number of tokens")
    made, case = taken(name, dtype, case_of(M))
    inputs = make_inputs(case, PRECISIONS[dtype], "cuda")
    check(made, inputs)
    for seed in (1, 2):
        other = make_inputs(case, PRECISIONS[dtype], "cuda", seed)
        replace(inputs.experts, {name: tensor.cpu() for name, tensor in other.experts.tensors()})
        hidden, _, weights, ids = other.arguments
        check(made, Inputs(hidden, inputs.experts, weights, ids, other.truth))


@NAMES
def test_memory_of_replaced_weights_is_freed(name: str) -> None:
    made, case = taken(name, "bf16", *map(case_of, TOKENS))
    inputs = make_inputs(case, PRECISIONS["bf16"], "cuda")
    check(made, inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    held = sum(tensor.nbytes for _, tensor in inputs.experts.tensors())
    for _, tensor in inputs.experts.tensors():
        tensor.data = torch.empty(0, dtype=tensor.dtype, device="cuda")
    assert before - torch.cuda.memory_allocated() >= held


# 2. Two streams.


def first_use_on_two_streams(name: str) -> None:
    """What the first stream has not written yet, because it is busy, the second must not read."""
    for dtype in dtypes_of(name):
        use_on_two_streams(name, dtype)


def use_on_two_streams(name: str, dtype: str) -> None:
    from moe_dispatch.backends.vllm_fused_moe import layers

    made, case = taken(name, dtype, *map(case_of, TOKENS))
    config = made.default_config(case.problem(PRECISIONS[dtype], made.machine))
    first, second = (make_inputs(case, PRECISIONS[dtype], "cuda", seed) for seed in (1, 2))
    expected = [made.run(*inputs.arguments, config) for inputs in (first, second)]  # compiles
    made = make_backend(name, made.machine).require()  # which keeps nothing yet
    layers._expert_maps.clear()
    layers._layers.clear()
    torch.cuda.synchronize()
    busy, idle = (torch.cuda.Stream() for _ in range(2))
    with torch.cuda.stream(busy):
        # The allocator hands this memory to the next tensor of its size here, whose every expert would be the first.
        stale = torch.zeros(case.E + 1, dtype=torch.int32, device="cuda")
        torch.cuda.synchronize()
        del stale
        torch.cuda._sleep(DELAY_CYCLES)
        outs = [made.run(*first.arguments, config)]
    with torch.cuda.stream(idle):
        outs += [made.run(*inputs.arguments, config) for inputs in (first, second)]
    torch.cuda.synchronize()
    for out, truth in zip(outs, (expected[0], *expected), strict=True):
        assert relative_error(out, truth.float()) <= made.tolerance[first.experts.dtype]


@NAMES
def test_first_use_on_two_streams(name: str) -> None:
    if name in LIBRARIES:
        alone(first_use_on_two_streams, name)
    else:
        with torch.no_grad():
            first_use_on_two_streams(name)


# 3. Addresses.


def displaced(tensor: Tensor) -> Tensor:
    """A copy that starts one element into its memory, as a view into a flat buffer does."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return flat[1:].view(tensor.shape).copy_(tensor)


def displaced_calls(inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    """The call with one tensor after another displaced, except the weights, whose address 16 must divide."""
    hidden, experts, weights, ids = inputs.arguments
    yield "hidden_states", Inputs(displaced(hidden), experts, weights, ids, inputs.truth)
    yield "topk_weights", Inputs(hidden, experts, displaced(weights), ids, inputs.truth)
    yield "int32 topk_ids", Inputs(hidden, experts, weights, displaced(ids.int()), inputs.truth)
    yield "int64 topk_ids", Inputs(hidden, experts, weights, displaced(ids.long()), inputs.truth)
    tensors: dict[str, Any] = dict(experts.tensors())
    for name in tensors.keys() - {"gate_up", "down"}:
        moved = ExpertWeights(**(tensors | {name: displaced(tensors[name])}))
        yield name, Inputs(hidden, moved, weights, ids, inputs.truth)


def displaced_tensors(name: str) -> None:
    for dtype in dtypes_of(name):
        made, case = taken(name, dtype, *(case_of(M, bias=bias) for bias in (True, False) for M in TOKENS))
        problem = case.problem(PRECISIONS[dtype], made.machine)
        for tensor, inputs in displaced_calls(make_inputs(case, PRECISIONS[dtype], "cuda")):
            print(f"{name} {dtype}: {tensor} displaced", flush=True)
            for config in made.configs(problem) if name in LIBRARIES else [made.default_config(problem)]:
                conform(made, config, inputs)
            check(made, inputs)
            torch.cuda.synchronize()


@NAMES
def test_tensors_that_start_anywhere(name: str) -> None:
    alone(displaced_tensors, name)


# 4. Weights that no kernel can read.


def unreadable_weights(name: str) -> None:
    """Refused before a first call and after some. The context survives, and no backend is barred."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=cast("Any", dist).HashStore(), rank=0, world_size=1)
    for dtype in dtypes_of(name):
        make_unreadable(name, dtype)
    dist.destroy_process_group()


def make_unreadable(name: str, dtype: str) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate

    made, case = taken(name, dtype, *map(case_of, TOKENS))
    inputs = make_inputs(case, PRECISIONS[dtype], "cuda")
    hidden, experts, weights, ids = inputs.arguments
    quarantine = get_dispatcher(hidden.device).quarantine

    mesh = DeviceMesh("cuda", [0])
    for weight in ("gate_up", "down"):
        parts: dict[str, Any] = dict(experts.tensors())
        parts[weight] = DTensor.from_local(parts[weight], mesh, [Replicate()], run_check=False)
        with pytest.raises(InvalidInputError, match=r"DTensor.*to_local"):
            ExpertWeights(**parts)
    spread = DTensor.from_local(hidden, mesh, [Replicate()], run_check=False)
    with pytest.raises(InvalidInputError, match=r"hidden_states.*DTensor"):
        moe_forward(spread, experts, weights, ids, backend=name)

    ways: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda tensor: torch.empty(0, dtype=tensor.dtype, device="cuda"),
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor.half(),
        lambda tensor: tensor[:-1].clone(),
    )
    for calls in range(2):
        for change in ways:
            for tensor in (experts.gate_up, experts.down):
                kept = tensor.data
                tensor.data = change(kept)
                with pytest.raises(InvalidInputError, match="changed since"):
                    moe_forward(*inputs.arguments, backend=name)
                tensor.data = kept
        if not calls:
            check(made, inputs)
    memory = experts.down.untyped_storage()
    nbytes, content = memory.nbytes(), experts.down.clone()
    memory.resize_(0)  # as FSDP frees a parameter between its uses
    with pytest.raises(InvalidInputError, match="freed"):
        moe_forward(*inputs.arguments, backend=name)
    memory.resize_(nbytes)
    experts.down.copy_(content)
    check(made, inputs)
    torch.cuda.synchronize()
    assert not quarantine.entries()


@NAMES
def test_weights_that_no_kernel_can_read(name: str) -> None:
    alone(unreadable_weights, name)


if __name__ == "__main__":
    run_alone(globals())
