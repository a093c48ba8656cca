"""The kernels of spread.py and mask_slots.py compile, without a GPU, for every device that runs them."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from moe_dispatch.problem import ACTIVATIONS, UNGATED

from .triton_compile import Launch, compile_launches

SMALL_MEMORY = 48 << 10  # what a block gets without asking


def launch_mask_slots(_capability: int) -> Iterator[Launch]:
    from moe_dispatch.backends.stages.mask_slots import mask_slots

    for M in (1, 64):
        yield Launch(partial(mask_slots, torch.empty(M, 8, dtype=torch.int64), 256, 256))


def launch_spread(_capability: int) -> Iterator[Launch]:
    from moe_dispatch.backends.stages.route import route
    from moe_dispatch.backends.stages.spread import activate_spread, activate_spread_quantize, spread, spread_quantize

    E, topk, capacity = 16, 8, 64
    empty = partial(torch.empty, dtype=torch.bfloat16)
    routing = route(torch.empty(capacity, topk, dtype=torch.int64), E, capacity=capacity)
    for K in (128, 2048):
        yield Launch(partial(spread, empty(capacity, K), routing, topk))
        yield Launch(partial(spread_quantize, empty(capacity, K), routing, topk, capacity))
    for activation in ACTIVATIONS:
        columns = 1024 if activation in UNGATED else 2048
        rows, bias = empty(E * capacity, columns), empty(E, columns)
        interleaved = activation == "swiglu_oai"
        yield Launch(partial(activate_spread, rows, routing, activation, capacity, interleaved=interleaved))
        yield Launch(
            partial(activate_spread_quantize, rows, routing, activation, capacity, interleaved=interleaved, bias=bias)
        )


def test_mask_slots_compiles() -> None:
    kernels = compile_launches(launch_mask_slots, 80, 90, 100)
    assert len({(built.capability, built.constants["BLOCK"]) for built in kernels}) == 6
    assert max(built.shared for built in kernels) <= SMALL_MEMORY


@pytest.mark.slow
def test_spreading_compiles_for_deep_gemm() -> None:
    """Only DeepGEMM's masked layout uses these, and that is for Hopper."""
    kernels = [built for built in compile_launches(launch_spread, 90) if "spread" in built.name]
    assert len(kernels) == 4 + 2 * len(ACTIVATIONS)
    for built in kernels:
        assert built.shared <= SMALL_MEMORY, built
        assert built.stack == 0, built
