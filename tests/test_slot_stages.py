"""The kernel of mask_slots.py compiles, without a GPU, for every device that runs it."""

from collections.abc import Iterator
from functools import partial

import torch

from .triton_compile import Launch, compile_launches

SMALL_MEMORY = 48 << 10  # what a block gets without asking


def launch_mask_slots(_capability: int) -> Iterator[Launch]:
    from moe_dispatch.backends.stages.mask_slots import mask_slots

    for M in (1, 64):
        yield Launch(partial(mask_slots, torch.empty(M, 8, dtype=torch.int64), 256, 256))


def test_mask_slots_compiles() -> None:
    kernels = compile_launches(launch_mask_slots, 80, 90, 100)
    assert len({(built.capability, built.constants["BLOCK"]) for built in kernels}) == 6
    assert max(built.shared for built in kernels) <= SMALL_MEMORY
