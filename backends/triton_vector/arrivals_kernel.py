# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""How the second product waits for the first within one launch: a counter per token, in place of a grid barrier.

A counter starts at zero. The tiles of gate_up of a token add to it, together 2^31, so that its sign bit is set when all
of them have arrived. The tiles of down wait for the sign bit; those that have seen it add to the counter too, together
2^31 again, so that it is zero when the last of them has left and the next launch finds it as this one did. The barrier
of CUDA's cooperative groups tells its phases by the same bit.

Nothing requires that all CTAs are resident. The tiles of gate_up have the lower program ids, GPUs start the CTAs of a
grid in that order (CUB's scan relies on it in the same way), and a tile of gate_up waits for no other.
"""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.pdl import moe_pdl_wait_and_release

# Counters are as many int32 apart, 128 bytes, so that each has a cache line of its own.
ARRIVAL_STRIDE = tl.constexpr(32)


@fast_launch
@triton.jit
def _moe_clear_arrivals_kernel(
    # outputs
    arrivals_ptr,
    # constants
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # In this order: kernels that this one releases may read at once what the kernels before it wrote.
    moe_pdl_wait_and_release(PDL)
    offs = tl.arange(0, BLOCK)
    tl.store(arrivals_ptr + offs * ARRIVAL_STRIDE, tl.zeros([BLOCK], tl.int32), mask=offs < TOKENS)


@triton.jit
def moe_arrive(arrivals_ptr, token, index, count):
    """Tell the token's tiles of down that a tile of gate_up is stored.

    Args:
        arrivals_ptr: A counter per token.
        token: Whose tile it is.
        index: Which of the token's tiles of gate_up it is, 0…count-1.
        count: How many the token has.
    """
    tl.debug_barrier()  # all threads of the CTA have stored
    tl.atomic_add(arrivals_ptr + token * ARRIVAL_STRIDE, _share(index, count), sem="release", scope="gpu")


@triton.jit
def moe_wait_for_arrivals(arrivals_ptr, token, index, count):
    """Wait until all of a token's tiles of gate_up are stored.

    Args:
        arrivals_ptr: As for `moe_arrive`.
        token: Whose tiles to wait for.
        index: Which of the token's tiles of down waits, 0…count-1.
        count: How many the token has.
    """
    counter = arrivals_ptr + token * ARRIVAL_STRIDE
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") >= 0:
        pass
    tl.atomic_add(counter, _share(index, count), sem="relaxed", scope="gpu")


@triton.jit
def _share(index, count):
    """What a tile adds, so that all `count` of them add 2^31: 1, and the first one the rest."""
    rest = (1 << 31) - (count - 1).to(tl.int64)
    return tl.where(index == 0, rest, 1).to(tl.int32)
