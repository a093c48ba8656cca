# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""What both products share on the device: how a CTA finds its tokens, and the loop that streams weights past them.

The product is transposed. A decode expert has a handful of tokens and thousands of weight rows, so the rows take the
wide side of the tensor core and the tokens its narrow one:
acc[ROWS, BLOCK_M] = W[ROWS, BLOCK_K] @ xᵀ[BLOCK_K, BLOCK_M].
"""

import triton
import triton.language as tl

from ..stages.device import moe_activate, moe_fp8_codes, moe_fp8_scale

# Ids that a CTA looks at together while it searches for its slots.
_SCAN = tl.constexpr(128)
_LINE_BYTES = tl.constexpr(128)


@triton.jit
def moe_count_slots(ids_ptr, stop, e):
    """How many of the slots 0…stop-1 name expert `e`."""
    count = 0
    for first in range(0, stop, _SCAN):
        offs_s = first + tl.arange(0, _SCAN)
        ids = tl.load(ids_ptr + offs_s, mask=offs_s < stop, other=-1)
        count += tl.sum((ids == e).to(tl.int32), axis=0)
    return count


@triton.jit
def moe_take_slots(ids_ptr, start, S, e, skip, BLOCK_M: tl.constexpr):
    """The slots from `start` on that name expert `e`, less the first `skip` of them: ``[BLOCK_M]`` and its mask."""
    offs_m = skip + tl.arange(0, BLOCK_M)
    slots = tl.zeros([BLOCK_M], dtype=tl.int32)
    taken = tl.zeros([BLOCK_M], dtype=tl.int32)
    seen = 0
    for first in range(start, S, _SCAN):
        offs_s = first + tl.arange(0, _SCAN)
        ids = tl.load(ids_ptr + offs_s, mask=offs_s < S, other=-1)
        mine = (ids == e).to(tl.int32)
        rank = seen + tl.cumsum(mine, axis=0) - mine
        # Each rank belongs to one slot, so the sums over slots pick rather than add.
        hit = (mine[None, :] != 0) & (rank[None, :] == offs_m[:, None])  # [BLOCK_M, SCAN]
        slots += tl.sum(tl.where(hit, offs_s[None, :], 0), axis=1)
        taken += tl.sum(hit.to(tl.int32), axis=1)
        seen += tl.sum(mine, axis=0)
    return slots, taken != 0


@triton.jit
def moe_slots_to_serve(ids_ptr, owner, S, e, E, BLOCK_M: tl.constexpr, BY_SLOT: tl.constexpr):
    """Slots that this CTA serves, 0 if none; by slot: 1 if its slot leads a group of BLOCK_M of one expert."""
    count = ((e >= 0) & (e < E)).to(tl.int32)
    if BY_SLOT:
        if count > 0:
            before = moe_count_slots(ids_ptr, owner, e)
            count = (before % BLOCK_M == 0).to(tl.int32)
    else:
        count = moe_count_slots(ids_ptr, S, e)
    return count


@triton.jit
def moe_prefetch(rows, first, K, BLOCK_K: tl.constexpr):
    """Bring the first BLOCK_K columns of each weight row to the L2 without waiting for them."""
    bits: tl.constexpr = rows.dtype.element_ty.primitive_bitwidth
    step: tl.constexpr = _LINE_BYTES * 8 // bits
    lines: tl.constexpr = BLOCK_K // step if step < BLOCK_K else 1
    columns = tl.minimum(first + tl.arange(0, lines) * step, K - 1)
    addresses = (rows[:, None] + columns[None, :]).to(tl.int64, bitcast=True)  # [ROWS, lines]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _moe_load_operand(
    x_rows, gate_bias, up_bias, plane, offs_k, K, mask_m,
    SPLITS: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """The token operand ``[BLOCK_M, BLOCK_K]``: rows as they are, or (SPLITS > 1) activated from partial sums."""
    mask = mask_m[:, None]
    if not EVEN_K:
        mask = mask & (offs_k < K)[None, :]
    ptrs = x_rows[:, None] + offs_k[None, :]
    if SPLITS == 1:
        x = tl.load(ptrs, mask=mask, other=0.0)
    else:
        parts: tl.constexpr = 2 if GATED else 1
        step: tl.constexpr = 2 if INTERLEAVED else 1
        gate = tl.load(ptrs, mask=mask, other=0.0)
        for split in tl.static_range(1, SPLITS):
            gate += tl.load(ptrs + split * parts * plane, mask=mask, other=0.0)
        if HAS_BIAS:
            gate += tl.load(gate_bias + offs_k * step, mask=offs_k < K, other=0.0).to(tl.float32)[None, :]
        up = gate
        if GATED:
            up = tl.load(ptrs + plane, mask=mask, other=0.0)
            for split in tl.static_range(1, SPLITS):
                up += tl.load(ptrs + (split * parts + 1) * plane, mask=mask, other=0.0)
            if HAS_BIAS:
                up += tl.load(up_bias + offs_k * step, mask=offs_k < K, other=0.0).to(tl.float32)[None, :]
        x = moe_activate(gate, up, ACTIVATION)
    return x


@triton.jit
def moe_stream(
    # weights: row pointers or a descriptor with the tile's place in it, and block scales
    w_rows, w_descriptor, w_first, w_second, w_scales,
    # token operand: row pointers, and for partial sums the biases and the distance between planes
    x_rows, gate_bias, up_bias, plane, mask_m,
    # shapes
    first_block, last_block, K,
    # constants
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    FP8: tl.constexpr, SPLITS: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The fp32 product ``[ROWS, BLOCK_M]`` of a tile's weights and the token operand over blocks of K."""
    acc = tl.zeros([ROWS, BLOCK_M], dtype=tl.float32)
    for block in range(first_block, last_block):
        offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        x = _moe_load_operand(
            x_rows,
            gate_bias,
            up_bias,
            plane,
            offs_k,
            K,
            mask_m,
            SPLITS,
            GATED,
            INTERLEAVED,
            HAS_BIAS,
            ACTIVATION,
            EVEN_K,
        )
        if TMA:
            w = w_descriptor.load([w_first, w_second, block * BLOCK_K]).reshape(ROWS, BLOCK_K)
        elif EVEN_K:
            w = tl.load(w_rows[:, None] + offs_k[None, :])
        else:
            # Columns past K belong to the next row, and a NaN there would survive the product with zero.
            w = tl.load(w_rows[:, None] + offs_k[None, :], mask=(offs_k < K)[None, :], other=0.0)
        if FP8:
            values = x.to(tl.float32)
            scale = moe_fp8_scale(tl.max(tl.abs(values), axis=1))  # [BLOCK_M]
            codes = moe_fp8_codes(values, tl.broadcast_to(scale[:, None], [BLOCK_M, BLOCK_K]))
            product = tl.dot(w, codes.trans())
            acc += product * (tl.load(w_scales + block)[:, None] * scale[None, :])
        else:
            acc = tl.dot(w, x.to(w.dtype).trans(), acc, input_precision="ieee")
    return acc
