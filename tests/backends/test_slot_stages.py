"""The kernels of mask_slots.py, of activations and of derivatives compile, without a GPU, for devices that run them."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from moe_dispatch.activations import ACTIVATIONS, UNGATED
from tests.support.triton_compile import Launch, compile_launches

PARAMETRISED = ("swiglu(alpha=1.5,limit=6,shift=0.5,gate_cap=4,up_cap=25)",)
SMALL_MEMORY = 48 << 10  # what a block gets without asking


def launch_mask_slots(_capability: int) -> Iterator[Launch]:
    from moe_dispatch.backends.stages.mask_slots import mask_slots

    for M in (1, 64):
        yield Launch(partial(mask_slots, torch.empty(M, 8, dtype=torch.int64), 256, 256))


def launch_activate(_capability: int) -> Iterator[Launch]:
    from moe_dispatch.backends.stages.activate import activate, activate_quantize
    from moe_dispatch.backends.stages.route import route

    E, topk, capacity = 16, 8, 128
    ids = torch.empty(64, topk, dtype=torch.int64)
    routing = route(ids, E, capacity=capacity)
    for activation in (*ACTIVATIONS, *PARAMETRISED):
        for N in (768, 2048):
            columns = N if activation in UNGATED else 2 * N
            rows = torch.empty(E * capacity, columns, dtype=torch.bfloat16)
            options: dict[str, Any] = {"interleaved": activation == "swiglu_oai", "topk_ids": ids, "pdl": True}
            bias = torch.empty(E, columns, dtype=torch.bfloat16)
            yield Launch(partial(activate, rows, routing, activation, **options, bias=bias))
            yield Launch(partial(activate_quantize, rows, routing, activation, **options, capacity=capacity))
            yield Launch(
                partial(activate_quantize, rows, routing, activation, **options, bias=bias, column_major_scales=True)
            )


def launch_activate_backward(_capability: int) -> Iterator[Launch]:
    from moe_dispatch.backends.stages.activate_backward import activate_backward
    from moe_dispatch.backends.stages.route import route

    E, slots = 16, 64 * 8
    ids, weights = torch.empty(64, 8, dtype=torch.int64), torch.empty(64, 8)
    routing = route(ids, E)
    for activation in (*ACTIVATIONS, *PARAMETRISED):
        columns = 768 if activation in UNGATED else 2 * 768
        rows, inner = (torch.empty(slots, width, dtype=torch.bfloat16) for width in (columns, 768))
        options: dict[str, Any] = {"interleaved": activation == "swiglu_oai", "topk_ids": ids}
        bias = torch.empty(E, columns, dtype=torch.bfloat16)
        yield Launch(partial(activate_backward, rows, inner, routing, weights, activation, **options, bias=bias))


def launch_mark_nan_tokens(_capability: int) -> Iterator[Launch]:
    from moe_dispatch.backends.vllm_fused_moe.nan_tokens import mark_nan_tokens

    for K, infinite in ((128, True), (7168, False)):
        tensors = torch.empty(4, K, dtype=torch.bfloat16), torch.empty(4, 8), torch.empty(4, 8, dtype=torch.int64)
        yield Launch(partial(mark_nan_tokens, *tensors, 256, 256, infinite=infinite))


def test_small_stages_compile() -> None:
    kernels = compile_launches(launch_mask_slots, 80, 90, 100)
    assert len({(built.capability, built.constants["BLOCK"]) for built in kernels}) == 6
    assert max(built.shared for built in kernels) <= SMALL_MEMORY
    kernels = compile_launches(launch_mark_nan_tokens, 80, 90, 100)
    assert len(kernels) == 6
    assert all(built.stack == 0 and built.shared <= 1024 for built in kernels)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launches", "name"),
    [(launch_activate, "_moe_activate_kernel"), (launch_activate_backward, "_moe_activate_backward_kernel")],
)
def test_activations_and_derivatives_compile_without_spills(launches: Any, name: str) -> None:
    kernels = [built for built in compile_launches(launches, 90) if built.name == name]
    assert {built.constants["ACTIVATION"] for built in kernels} == {*ACTIVATIONS, *PARAMETRISED}
    for built in kernels:
        assert built.shared <= SMALL_MEMORY, built
        assert built.stack == 0, built
        assert not built.quotients, built
