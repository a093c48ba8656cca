# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `select_experts`."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.pdl import moe_pdl_wait_and_release
from moe_dispatch.routers import SUM_EPSILON

_SUM_EPSILON = tl.constexpr(SUM_EPSILON)
_LOWEST = tl.constexpr(-(2**31))  # below the key of every float, -inf included
_HIGHEST = tl.constexpr(2**31 - 1)
_KEY_OF_MINUS_INFINITY = tl.constexpr(-2139095041)


@triton.jit
def _moe_key(values):
    """int32 keys in the order of fp32 values: -0 and 0 are equal, and every NaN is above infinity.

    A maximum of int32 over a warp is one instruction (redux.sync), and it does not drop NaN.
    """
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    bits = tl.where(values == values, bits, 0x7FC00000)  # noqa: PLR0124 - a NaN is not itself
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _moe_value(keys):
    """The fp32 values of keys; the inverse of `_moe_key`."""
    return tl.where(keys < 0, keys ^ 0x7FFFFFFF, keys).to(tl.float32, bitcast=True)


@fast_launch
@triton.jit
def _moe_select_experts_kernel(
    # inputs
    logits_ptr,
    correction_ptr,
    # outputs
    weights_ptr,
    ids_ptr,
    # constants
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    E: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK_POW2: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_POW2: tl.constexpr,
    MEMBERS_POW2: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program of one warp chooses for one token."""
    MEMBERS: tl.constexpr = E // GROUPS
    token = tl.program_id(0).to(tl.int64)
    offs_g = tl.arange(0, GROUPS_POW2)
    offs_m = tl.arange(0, MEMBERS_POW2)
    expert = offs_g[:, None] * MEMBERS + offs_m[None, :]  # [GROUPS_POW2, MEMBERS_POW2]
    mask = (offs_g < GROUPS)[:, None] & (offs_m < MEMBERS)[None, :]
    if correction_ptr is not None:  # read before the wait: what may write it ended before the logits' product began
        correction = tl.load(correction_ptr + expert, mask=mask, other=0.0).to(tl.float32)
    moe_pdl_wait_and_release(PDL)
    logits = tl.load(logits_ptr + token * E + expert, mask=mask, other=0.0).to(tl.float32)
    choice = 1.0 / (1.0 + tl.exp(-logits)) if SIGMOID else logits
    if correction_ptr is not None:
        choice += correction
    keys = tl.where(mask, _moe_key(choice), _LOWEST)

    if TOPK_GROUPS < GROUPS:
        best = tl.max(keys, 1)  # [GROUPS_POW2]
        first = tl.min(tl.where(keys == best[:, None], expert, _HIGHEST), 1)
        second = tl.max(tl.where(expert == first[:, None], _LOWEST, keys), 1)
        group_keys = tl.where(offs_g < GROUPS, _moe_key(_moe_value(best) + _moe_value(second)), _LOWEST)
        open_groups = offs_g < 0
        for _ in tl.static_range(TOPK_GROUPS):
            top = tl.max(group_keys, 0)
            group = tl.min(tl.where(group_keys == top, offs_g, _HIGHEST), 0)
            open_groups = open_groups | (offs_g == group)
            group_keys = tl.where(offs_g == group, _LOWEST, group_keys)
        keys = tl.where(open_groups[:, None] | ~mask, keys, _KEY_OF_MINUS_INFINITY)

    slots = tl.arange(0, TOPK_POW2)
    ids = tl.zeros([TOPK_POW2], tl.int32)
    for slot in tl.static_range(TOPK):
        top = tl.max(keys)
        chosen = tl.min(tl.where(keys == top, expert, _HIGHEST))
        ids = tl.where(slots == slot, chosen, ids)
        keys = tl.where(expert == chosen, _LOWEST, keys)

    taken = slots < TOPK
    # Read again rather than picked out of registers: one load in place of a reduction per slot.
    weights = tl.load(logits_ptr + token * E + ids, mask=taken, other=0.0).to(tl.float32)
    if SIGMOID:
        weights = 1.0 / (1.0 + tl.exp(-weights))
        if RENORMALIZE:
            weights = weights / (tl.sum(tl.where(taken, weights, 0.0), 0) + _SUM_EPSILON)
    else:
        largest = tl.max(tl.where(taken, weights, float("-inf")), 0)  # the largest of all experts' logits
        weights = tl.exp(weights - largest)
        if RENORMALIZE:
            total = tl.sum(tl.where(taken, weights, 0.0), 0)
        else:
            total = tl.sum(tl.where(mask, tl.exp(logits - largest), 0.0))
        weights = weights / total
    tl.store(weights_ptr + token * TOPK + slots, weights * SCALE, mask=taken)
    tl.store(ids_ptr + token * TOPK + slots, ids, mask=taken)
