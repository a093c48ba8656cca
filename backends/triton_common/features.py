"""What a device offers to kernels, and what our Triton backends need of it.

Imports no Triton, so that a machine without it can still ask.
"""

import functools
import os
import re
from dataclasses import dataclass
from typing import Final, Literal

import torch

from moe_dispatch.backend import Requirements
from moe_dispatch.machine import Machine
from moe_dispatch.problem import MX_BLOCK, DType, MoEProblem

# The Triton releases whose insides `internals` was written for; kernels of others are launched by Triton's own path.
READ_TRITON_RELEASES: Final = ((3, 6), (3, 7), (3, 8), (3, 9))
# Experts of a token whose rows a kernel adds in an unrolled loop: `combine` compiles for 2 s with 64 of them, for 7 s
# with 128, and for minutes with 512.
MOST_UNROLLED: Final = 128
# Programs of a persistent kernel in the interpreter: more than one, so that their loops over tiles are exercised.
_INTERPRETED_SMS: Final = 3

TensorCores = Literal["mma", "wgmma", "tcgen05"]


@functools.cache
def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` before Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@dataclass(frozen=True)
class _DeviceClass:
    """What all devices of some compute capabilities have in common.

    Attributes:
        tensor_cores: The matrix instruction that Triton uses.
        tma: Tensor memory accelerator.
        pdl: Programmatic dependent launch.
        fp8: e4m3 products and conversions.
        shared_memory: Bytes that one block may opt in to (CUDA programming guide, table of technical specifications).
    """

    tensor_cores: TensorCores = "mma"
    tma: bool = False
    pdl: bool = False
    fp8: bool = False
    shared_memory: int = 101376


# A capability is no order of features: sm_120 is newer than sm_90 and has neither its wgmma nor its shared memory. A
# capability that is not listed gets what every device since sm_80 has.
_DEVICE_CLASSES: Final[dict[tuple[int, int], _DeviceClass]] = {
    (8, 0): _DeviceClass(shared_memory=166912),  # A100
    (8, 6): _DeviceClass(),  # A10, RTX 3090
    (8, 7): _DeviceClass(shared_memory=166912),  # Orin
    (8, 9): _DeviceClass(fp8=True),  # L4, L40S, RTX 4090
    (9, 0): _DeviceClass("wgmma", tma=True, pdl=True, fp8=True, shared_memory=232448),  # H100, H200, H20, GH200
    (10, 0): _DeviceClass("tcgen05", tma=True, pdl=True, fp8=True, shared_memory=232448),  # B200, GB200
    (10, 3): _DeviceClass("tcgen05", tma=True, pdl=True, fp8=True, shared_memory=232448),  # B300, GB300
    (12, 0): _DeviceClass(tma=True, pdl=True, fp8=True),  # RTX 5090, RTX PRO 6000
    (12, 1): _DeviceClass(tma=True, pdl=True, fp8=True),  # GB10
}


@dataclass(frozen=True)
class Features:
    """What a device offers to a kernel.

    Attributes:
        tensor_cores: The matrix instruction that Triton uses: ``"mma"``, which reads registers; ``"wgmma"`` (sm_90) or
            ``"tcgen05"`` (sm_100), which read shared memory while they run.
        tma: Tensor memory accelerator: block loads through tensor descriptors.
        fp8: e4m3 products and conversions.
        pdl: Programmatic dependent launch.
        shared_memory: Bytes that one block may use.
        sms: Streaming multiprocessors.
    """

    tensor_cores: TensorCores
    tma: bool
    fp8: bool
    pdl: bool
    shared_memory: int
    sms: int

    @property
    def wgmma(self) -> bool:
        """Whether products run asynchronously on operands in shared memory: wgmma, or tcgen05 in its place."""
        return self.tensor_cores != "mma"


def features(machine: Machine) -> Features:
    """The features of a machine; in the interpreter those of a small sm_80 that knows e4m3."""
    if machine.capability is None:
        return Features("mma", tma=False, fp8=True, pdl=False, shared_memory=166912, sms=_INTERPRETED_SMS)
    known = _device_class(machine.capability)
    return Features(
        known.tensor_cores,
        tma=known.tma,
        fp8=known.fp8,
        pdl=known.pdl,
        shared_memory=machine.shared_memory_per_block or known.shared_memory,
        sms=machine.sms,
    )


def fp8_products(capability: tuple[int, int] | None) -> bool:
    """Whether a device of this compute capability multiplies e4m3; None stands for the interpreter, which does."""
    return capability is None or _device_class(capability).fp8


@functools.cache
def _device_class(capability: tuple[int, int]) -> _DeviceClass:
    return _DEVICE_CLASSES.get(capability, _DeviceClass(fp8=capability >= (8, 9)))


def triton_requirements(*, fp8_forms: bool = False, mxfp4: bool = False, transposed: bool = False) -> Requirements:
    """What our Triton backends take: every activation, bias and row order, on sm_80 and newer.

    In the interpreter they take CPU tensors and fp32 weights too.

    Args:
        fp8_forms: Whether the kernels take FP8 weights in every form, and turn them into the activations' dtype where
            the device has no products of e4m3; without, they take block FP8 from sm_89 on.
        mxfp4: Whether the kernels take MXFP4 weights.
        transposed: Whether the kernels read weights stored by columns, too.
    """
    dtypes: dict[DType, tuple[int, int]] = {"bf16": (8, 0), "fp16": (8, 0), "fp8": (8, 9)}
    if fp8_forms:
        dtypes |= {"fp8": (8, 0), "fp8_channel": (8, 0)}
    if mxfp4:
        dtypes["mxfp4"] = (8, 0)
    act_dtypes: set[DType] = {"bf16", "fp16"}
    if interpreting():
        dtypes["fp32"] = (8, 0)
        act_dtypes.add("fp32")
    return Requirements(
        dtypes=dtypes, act_dtypes=frozenset(act_dtypes), cpu=interpreting(), bias=True, interleaved=True,
        transposed=transposed,
        multiples={"mxfp4": {"K": MX_BLOCK, "N": MX_BLOCK}},
    )  # fmt: skip


def triton_reasons(machine: Machine, problem: MoEProblem) -> tuple[str, ...]:
    """Reasons against our Triton kernels beyond `triton_requirements`."""
    reasons = list(stage_reasons(machine))
    if not machine.triton and not reasons:
        reasons.append(_NO_TRITON)
    if interpreting() and problem.dtype == "bf16":
        reasons.append("Triton's interpreter computes bf16 products wrongly; use fp16 or fp32 there")
    multiplied = "fp16" if interpreting() else "bf16"  # four values of which are one word
    if problem.dtype == "mxfp4" and problem.act_dtype != multiplied:
        reasons.append(f"multiplies MXFP4 weights by {multiplied} hidden_states, got {problem.act_dtype}")
    return tuple(reasons)


def stage_reasons(machine: Machine) -> tuple[str, ...]:
    """Reasons against the stages on a machine's device: they are Triton kernels on a GPU, and torch on a CPU."""
    if machine.device == "cpu":
        return ()
    if not machine.cuda:
        return ("needs an NVIDIA GPU and a torch built for CUDA: its Triton kernels were never run on ROCm",)
    return () if machine.triton else (_NO_TRITON,)


def unrolled_reasons(topk: int) -> tuple[str, ...]:
    """Why kernels that unroll a loop over a token's experts are not compiled for so many; empty if they are."""
    if topk <= MOST_UNROLLED:
        return ()
    return (f"unrolls sums over topk: needs topk ≤ {MOST_UNROLLED} for a compilation of seconds, got {topk}",)


_NO_TRITON: Final = "triton is not installed: `moe-dispatch doctor` has the command (Linux)"


def unread_triton_reason(version: str) -> str:
    """Why kernels of this Triton are launched by its own path, at two to three times the host time; empty if not."""
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if release in READ_TRITON_RELEASES:
        return ""
    read = ", ".join(".".join(map(str, known)) for known in READ_TRITON_RELEASES)
    return f"Triton {version} is none of the releases whose launcher is known ({read})"


def on_triton(tensor: torch.Tensor) -> bool:
    """Whether a stage runs its kernel on this tensor: it is on a GPU, or kernels are interpreted."""
    return tensor.is_cuda or interpreting()
