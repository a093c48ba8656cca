# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `splitk_slots`."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.pdl import moe_pdl_wait_and_release
from moe_dispatch.backends.triton_splitk.stream import moe_slots_to_serve


@fast_launch
@triton.jit(do_not_specialize=["S"])
def _moe_splitk_slots_kernel(
    # inputs
    ids_ptr,
    # outputs
    served_ptr,
    # shapes
    S, E,
    # constants
    BLOCK_M: tl.constexpr, SCAN: tl.constexpr, BY_SLOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    owner = tl.program_id(0)
    # The kernel that wrote the ids may still run; and what is written here, that one may still read.
    moe_pdl_wait_and_release(PDL)
    e, count = moe_slots_to_serve(ids_ptr, owner, S, E, BLOCK_M, SCAN, BY_SLOT)
    row = served_ptr + owner * (2 + (BLOCK_M if BY_SLOT else S))
    first = owner if BY_SLOT else 0
    most = BLOCK_M if BY_SLOT else S
    seen = 0
    for start in range(tl.where(count > 0, first, S), S, SCAN):
        offs_s = start + tl.arange(0, SCAN)
        mine = (tl.load(ids_ptr + offs_s, mask=offs_s < S, other=-1) == e).to(tl.int32)
        rank = seen + tl.cumsum(mine, axis=0) - mine
        tl.store(row + 2 + rank, offs_s, mask=(mine != 0) & (rank < most))
        seen += tl.sum(mine, axis=0)
    tl.store(row, 0)
    tl.store(row + 1, tl.minimum(seen, most))
