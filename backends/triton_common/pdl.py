# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Programmatic dependent launch on the device (sm_90 and newer): each kernel starts while the last one drains.

A kernel must wait before it reads what the kernel before it wrote, and before it writes what that one may still read.
It releases its dependents as early as it can; they wait in turn. Works in Triton and in Gluon kernels. Needs Triton.
"""

import triton
import triton.language as tl


@triton.jit
def moe_pdl_wait(PDL: tl.constexpr):
    """Wait until the kernel before this one has finished and its writes are visible."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def moe_pdl_release(PDL: tl.constexpr):
    """Let the next kernel start."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def moe_pdl_wait_and_release(PDL: tl.constexpr):
    """Wait for the kernel before this one, then let the next one start."""
    moe_pdl_wait(PDL)
    moe_pdl_release(PDL)
