"""`fast_launch` never starts a kernel on arguments for which Triton would have compiled another one."""

import itertools
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.stub_kernels import StubKernel, cpu_is_the_device

pytest.importorskip("triton")
import triton
import triton.language as tl

from moe_dispatch.backends.triton_common import internals
from moe_dispatch.backends.triton_common.fast_launch import MAX_REMEMBERED, FastKernel, fast_launch, written_down
from moe_dispatch.backends.triton_common.features import interpreting
from moe_dispatch.backends.triton_common.stand_ins import NotReplayableError


def signature(x_ptr, out_ptr, n, m, BLOCK: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The signature of the kernel under test; never compiled."""


@pytest.fixture(autouse=True)
def on_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    with nullcontext() if "gpu" in request.keywords else cpu_is_the_device():
        yield


def pair(**options: Any) -> tuple[StubKernel, FastKernel]:
    stub = StubKernel(signature, **options)
    return stub, FastKernel(stub)


def memory(dtype: torch.dtype, skipped: int = 0) -> torch.Tensor:
    """Memory that starts `skipped` bytes after a 16-byte boundary."""
    raw = torch.zeros(256, dtype=torch.uint8)
    start = -raw.data_ptr() % 16 + skipped
    return raw[start : start + 128].view(dtype)


def launch(kernel: FastKernel, x: torch.Tensor) -> None:
    kernel[1,](x, x, 24, 7, BLOCK=16, EVEN=True)


ALIGNED = {
    "bf16": memory(torch.bfloat16),
    "fp16": memory(torch.float16),
    "fp32": memory(torch.float32),
    "fp8": memory(torch.float8_e4m3fn),
    "int32": memory(torch.int32),
    "parameter": torch.nn.Parameter(memory(torch.bfloat16)),
    "absent": None,
}
MISALIGNED = {f"{skipped} bytes off": memory(torch.bfloat16, skipped) for skipped in (2, 4, 8)}
INTS = (0, 1, 2, 8, 15, 16, 17, 32, -16, -1, 2**31 - 1, 2**31, 2**40, 2**63, True, 1.0, 16.0)


@pytest.mark.parametrize("options", [{}, {"do_not_specialize": ["n"]}, {"do_not_specialize_on_alignment": ["x_ptr"]}])
def test_what_is_started_was_compiled_for_just_these_arguments(options: dict[str, Any]) -> None:
    """Every variant after every other, twice, so that each finds what all others left in the cache."""
    stub, kernel = pair(**options)
    out = memory(torch.float32)
    tensors = [*ALIGNED.values(), *MISALIGNED.values()]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x, out, n, 64), {"BLOCK": 16, "EVEN": True}) for x, n in itertools.product(tensors, INTS)
    ]
    constants: list[dict[str, Any]] = [
        {"BLOCK": 16, "EVEN": False}, {"EVEN": True, "BLOCK": 32}, {"BLOCK": 32, "EVEN": True, "num_warps": 8},
        {"BLOCK": 8, "EVEN": True, "num_warps": 32}, {"BLOCK": 32, "EVEN": True, "num_stages": 8},
    ]  # fmt: skip
    calls += [((tensors[0], out, 8, 64), named) for named in constants]
    for _ in range(2):
        for args, named in calls:
            before = len(stub.started)
            kernel[1,](*args, **named)
            for _, _, compiled_for, _ in stub.started[before:]:
                assert compiled_for == stub.specialization(*args, **named)
    ordinary = 2 * len(tensors) * sum(isinstance(n, bool | float) for n in INTS)  # Triton's path, both times
    # A parameter is a tensor. The integers are of eight kinds: 1; 0, 16 and 32; 2, 8, 15, 17 and 2**31 - 1; -16; -1;
    # and three that need more than 32 bits. Where the kernel is not specialised on them, only their upper bits count.
    kinds = 5 if "do_not_specialize" in options else 8
    assert stub.compiled == kinds * (len(tensors) - 1) + len(constants) + ordinary


def test_the_order_of_constants_does_not_confuse() -> None:
    stub, kernel = pair()
    x = memory(torch.bfloat16)
    for named in ({"BLOCK": 16, "EVEN": 1}, {"EVEN": 16, "BLOCK": 1}):
        for _ in range(2):
            kernel[1,](x, x, 8, 8, **named)
    assert [compiled_for for _, _, compiled_for, _ in stub.started] == [
        stub.specialization(x, x, 8, 8, BLOCK=16, EVEN=1),
        stub.specialization(x, x, 8, 8, BLOCK=1, EVEN=16),
    ]


def test_the_launcher_gets_grid_stream_addresses_and_values() -> None:
    stub, kernel = pair()
    x, out = memory(torch.bfloat16), memory(torch.float32)
    for _ in range(2):
        kernel[3, 5](x, out, 24, 7, BLOCK=16, EVEN=True)
    ((grid, stream, _, values),) = stub.started
    assert (grid, stream) == ((3, 5, 1), 7)
    assert values == (x.data_ptr(), out.data_ptr(), 24, 7, None, None)


def test_other_memory_and_another_token_count_need_no_compiler() -> None:
    stub, kernel = pair()
    for n in (24, 40, 7, 1000, 24):
        kernel[n,](memory(torch.bfloat16), memory(torch.bfloat16), n, 7, BLOCK=16, EVEN=True)
    assert stub.compiled == 1
    assert [(grid[0], values[2]) for grid, _, _, values in stub.started] == [(n, n) for n in (40, 7, 1000, 24)]


class Odd(torch.Tensor):
    """A subclass, which may do anything when it is asked for its address."""


def test_a_tensor_that_is_elsewhere_or_another_class_is_triton_s_to_refuse() -> None:
    stub, kernel = pair()
    meta = torch.zeros(64, device="meta", dtype=torch.bfloat16)
    odd = torch.zeros(64, dtype=torch.bfloat16).as_subclass(Odd)
    for x in (meta, odd):
        for _ in range(2):
            kernel[1,](x, memory(torch.bfloat16), 24, 7, BLOCK=16, EVEN=True)
    assert not [values for _, _, _, values in stub.started if values[0] == odd.data_ptr()]


def test_a_profiler_sees_every_launch() -> None:
    from triton import knobs

    stub, kernel = pair()
    x = memory(torch.bfloat16)
    launch(kernel, x)
    knobs.runtime.launch_enter_hook.add(print)
    try:
        launch(kernel, x)
    finally:
        knobs.runtime.launch_enter_hook.remove(print)
    launch(kernel, x)
    assert (stub.compiled, len(stub.started)) == (2, 1)


def test_a_positional_constant_or_a_need_for_scratch_memory_is_left_to_triton() -> None:
    stub, kernel = pair()
    x = memory(torch.bfloat16)
    for _ in range(2):
        kernel[1,](x, x, 24, m=7, BLOCK=16, EVEN=True)
    assert (stub.compiled, len(stub.started)) == (2, 0)


def test_memory_of_launches_is_bounded() -> None:
    stub, kernel = pair()
    x = memory(torch.bfloat16)
    for n in range(MAX_REMEMBERED + 10):
        kernel[1,](x, x, 24, 7, BLOCK=n, EVEN=True)
    assert len(kernel._launches) <= MAX_REMEMBERED
    assert stub.compiled == MAX_REMEMBERED + 10


def test_launches_are_written_down_in_place_of_being_started() -> None:
    stub, kernel = pair()
    x = memory(torch.bfloat16)
    grids: list[tuple[Any, ...]] = []
    with (
        pytest.raises(NotReplayableError, match="launched by Triton itself"),
        written_down(lambda _launch, grid, _args: grids.append(grid)),
    ):
        launch(kernel, x)
    launch(kernel, x)
    with written_down(lambda _launch, grid, _args: grids.append(grid)):
        launch(kernel, x)
    assert (grids, stub.compiled, len(stub.started)) == ([(1,)], 1, 0)


def test_every_kernel_of_ours_is_launched_fast() -> None:
    kernel = re.compile(r"^((?:@.*\n)*@(?:triton|gluon)\.jit.*\n)def (_moe_\w*_kernel)\(", re.MULTILINE)
    decorators_by_name = {
        name: decorators
        for path in (Path(__file__).parents[2] / "backends").rglob("*.py")
        for decorators, name in kernel.findall(path.read_text(encoding="utf-8"))
    }
    assert len(decorators_by_name) > 10
    assert not [name for name, decorators in decorators_by_name.items() if not decorators.startswith("@fast_launch\n")]


def test_what_triton_interprets_stays_as_it_is() -> None:
    assert fast_launch(print) is print


@fast_launch
@triton.jit  # type: ignore[untyped-decorator]
def _moe_scaled_copy_kernel(x_ptr, out_ptr, n, scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < n) * scale, mask=offs < n)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_real_kernel_on_whatever_comes_next(device: str) -> None:
    """Aligned and not, sizes of 1 and multiples of 16 and neither, dtypes: in an order that invites confusion."""
    if device == "cpu" and not interpreting():
        pytest.skip("kernels are compiled here")
    values = torch.arange(4096, device=device)
    for dtype, skipped, n, scale in itertools.product(
        (torch.float32, torch.float16, torch.float32), (0, 1, 8, 0), (1, 16, 17, 1000, 16), (1, 2, 16)
    ):
        x = values.to(dtype)[skipped:]
        out = torch.zeros(2048, dtype=dtype, device=device)[skipped:]
        _moe_scaled_copy_kernel[triton.cdiv(n, 64),](x, out, n, scale, BLOCK=64)
        assert torch.equal(out[:n], x[:n] * scale)
        assert not out[n:].any()


def test_a_kernel_has_its_key_before_triton_launches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(internals, "make_cache_key", lambda _: order.append("key"))
    kernel = FastKernel(StubKernel(signature, lambda *_: order.append("launch")))
    for x in (memory(torch.bfloat16), memory(torch.float32)):
        kernel[1,](x, x, 24, 7, BLOCK=16, EVEN=True)
    assert order == ["key", "launch", "launch"]
