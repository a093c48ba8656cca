"""What our Triton backends share: whether kernels are interpreted, and what the device can do.

Imports no Triton, so that a machine without it can still ask.
"""

import functools
import os
from dataclasses import dataclass
from typing import Final

import torch

from moe_dispatch.backend import Requirements
from moe_dispatch.machine import Machine
from moe_dispatch.problem import DType, MoEProblem

# Least shared memory that a block may have by compute capability (CUDA programming guide, table of technical
# specifications); the answer for a machine that does not say.
_SHARED_MEMORY: Final = {
    (8, 0): 166912,
    (8, 6): 101376,
    (8, 7): 166912,
    (8, 9): 101376,
    (9, 0): 232448,
    (10, 0): 232448,
}
_LEAST_SHARED_MEMORY: Final = 101376
# Programs of a persistent kernel in the interpreter: more than one, so that their loops over tiles are exercised.
_INTERPRETED_SMS: Final = 3


@functools.cache
def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` before Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")


@dataclass(frozen=True)
class Features:
    """What a device offers to a kernel.

    Attributes:
        tma: Tensor memory accelerator: block loads through tensor descriptors.
        wgmma: Warp-group matrix products (Hopper), or the newer ones that Triton uses in their place.
        fp8: e4m3 products and conversions.
        pdl: Programmatic dependent launch.
        shared_memory: Bytes that one block may use.
        sms: Streaming multiprocessors.
    """

    tma: bool
    wgmma: bool
    fp8: bool
    pdl: bool
    shared_memory: int
    sms: int


def features(machine: Machine) -> Features:
    """The features of a machine; in the interpreter those of a small sm_80 that knows e4m3."""
    if machine.capability is None:
        return Features(tma=False, wgmma=False, fp8=True, pdl=False, shared_memory=166912, sms=_INTERPRETED_SMS)
    hopper = machine.capability >= (9, 0)
    return Features(
        tma=hopper,
        wgmma=hopper,
        fp8=machine.capability >= (8, 9),
        pdl=hopper,
        shared_memory=machine.shared_memory_per_block or _SHARED_MEMORY.get(machine.capability, _LEAST_SHARED_MEMORY),
        sms=machine.sms,
    )


def triton_requirements() -> Requirements:
    """What our Triton backends take: every activation, bias and row order, on sm_80 and newer (FP8 from sm_89).

    In the interpreter they take CPU tensors and fp32 weights too.
    """
    dtypes: dict[DType, tuple[int, int]] = {"bf16": (8, 0), "fp16": (8, 0), "fp8": (8, 9)}
    act_dtypes: set[DType] = {"bf16", "fp16"}
    if interpreting():
        dtypes["fp32"] = (8, 0)
        act_dtypes.add("fp32")
    return Requirements(
        dtypes=dtypes, act_dtypes=frozenset(act_dtypes), cpu=interpreting(), bias=True, interleaved=True
    )


def triton_reasons(machine: Machine, problem: MoEProblem) -> tuple[str, ...]:
    """Reasons against our Triton kernels beyond `triton_requirements`."""
    reasons = []
    if not machine.triton:
        reasons.append("triton is not installed: pip install triton (Linux)")
    if interpreting() and problem.dtype == "bf16":
        reasons.append("Triton's interpreter computes bf16 products wrongly; use fp16 or fp32 there")
    return tuple(reasons)


def on_triton(tensor: torch.Tensor) -> bool:
    """Whether a stage runs its kernel on this tensor: it is on a GPU, or kernels are interpreted."""
    return tensor.is_cuda or interpreting()
