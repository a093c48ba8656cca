# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `mask_slots`."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.fast_launch import fast_launch


@fast_launch
@triton.jit
def _moe_mask_slots_kernel(
    # inputs
    ids_ptr,
    # outputs
    out_ptr,
    # shapes
    slots,
    E,
    masked,
    # constants
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < slots
    # Compared before narrowing: an int64 id outside 0…E-1 may be inside modulo 2^32.
    ids = tl.load(ids_ptr + offs, mask=mask, other=0)
    valid = (ids >= 0) & (ids < E)
    tl.store(out_ptr + offs, tl.where(valid, ids, masked).to(tl.int32), mask=mask)
