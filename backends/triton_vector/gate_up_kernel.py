# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `vector_gate_up`."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.device import moe_activate, moe_e4m3_sums, moe_e4m3_to_fp32, moe_gate_up_row
from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.pdl import moe_pdl_release, moe_pdl_wait


@fast_launch
@triton.jit(do_not_specialize=["E"])
def _moe_vector_gate_up_kernel(
    # inputs
    x_ptr, weight_ptr, scale_ptr, bias_ptr, ids_ptr,
    # outputs
    inner_ptr,
    # shapes
    K, N, E,
    # constants
    TOPK: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr, EVEN_N: tl.constexpr, SCALES: tl.constexpr, PDL: tl.constexpr, GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = 2 if GATED else 1
    rows: tl.constexpr = parts * COLUMNS // GROUPS
    vector: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth
    piece: tl.constexpr = 8 if vector == 16 else vector  # elements of x that a thread loads at once
    lanes: tl.constexpr = BLOCK_K // (CHUNKS * vector)
    slot, tile = tl.program_id(0), tl.program_id(1)
    moe_pdl_wait(PDL)  # the kernel that wrote the ids may still run
    moe_pdl_release(PDL)
    e = tl.load(ids_ptr + slot)
    if (e >= 0) & (e < E):
        expert = e.to(tl.int64)
        # A group has the gate and up rows of its columns. Past N they repeat the last one.
        offs_r = tl.arange(0, rows)[None, :]
        column = tile * COLUMNS + tl.arange(0, GROUPS)[:, None] * (rows // parts) + offs_r // parts
        row = moe_gate_up_row(tl.minimum(column, N - 1), offs_r % parts, N, parts, INTERLEAVED)  # [GROUPS, rows]
        w_rows = (weight_ptr + (expert * parts * N + row) * K)[None, :, :, None, None]
        # What multiplies sums, or is added to them, is on its way together with the weights.
        scales = scale_ptr
        if SCALES == "block":
            # The rows of a part lie in one block of scales, unless N shifts those of up.
            block_row = tl.reshape(row, [GROUPS, rows // parts, parts])
            if EVEN_N and not INTERLEAVED:
                block_row = (tl.arange(0, parts) * N + tile * COLUMNS)[None, None, :]
            scales += ((expert * tl.cdiv(parts * N, 128) + block_row // 128) * tl.cdiv(K, 128))[None, :, :, :, None]
        if SCALES == "channel":
            channel_scale = tl.load(scale_ptr + expert * parts * N + row)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + expert * parts * N + row).to(tl.float32)

        # Dimensions, in the order in which Triton divides them among lanes, then warps, then registers: vectors of a
        # chunk, groups, rows of a group, chunks, elements of a vector.
        offs_v = (tl.arange(0, CHUNKS)[None, :] * lanes + tl.arange(0, lanes)[:, None]) * vector  # [lanes, CHUNKS]
        w, scale = _moe_vector_gate_up_block(w_rows, scales, offs_v, K, vector, SCALES)
        x_row = x_ptr + (slot // TOPK).to(tl.int64) * K
        acc = tl.zeros([lanes, GROUPS, rows, CHUNKS], dtype=tl.float32)
        for _ in range(BLOCKS):
            now, now_scale, offs_x = w, scale, offs_v[:, :, None] + tl.arange(0, piece)[None, None, :]
            if BLOCKS > 1:
                offs_v += BLOCK_K
                w, scale = _moe_vector_gate_up_block(w_rows, scales, offs_v, K, vector, SCALES)
            # Products wait for x, and x for the barrier: else the compiler delays loads of weights behind products.
            tl.debug_barrier()
            x = tl.load(x_row + offs_x, mask=offs_x < K, other=0.0).to(tl.float32)[:, None, None, :, :]
            values = now.to(tl.float32) if SCALES == "none" else moe_e4m3_to_fp32(now)
            if vector > piece:
                # One load brings half of what a vector of weights needs.
                x_high = tl.load(x_row + offs_x + piece, mask=offs_x + piece < K, other=0.0).to(tl.float32)
                halves = tl.permute(tl.reshape(values, [lanes, GROUPS, rows, CHUNKS, 2, piece]), (0, 1, 2, 3, 5, 4))
                low, high = halves.split()
                sums = tl.sum(low * x, axis=4) + tl.sum(high * x_high[:, None, None, :, :], axis=4)
            else:
                sums = tl.sum(values * x, axis=4)
            sums = tl.reshape(sums, [lanes, GROUPS, rows // parts, parts, CHUNKS]) * now_scale
            acc += tl.reshape(sums, [lanes, GROUPS, rows, CHUNKS])
        gate = tl.sum(tl.sum(acc, axis=3), axis=0)  # [GROUPS, rows]
        if SCALES != "none":
            gate = moe_e4m3_sums(gate)
        if SCALES == "channel":
            gate *= channel_scale
        if bias_ptr is not None:
            gate += bias
        up = None
        if GATED:
            gate, up = tl.reshape(gate, [COLUMNS, 2]).split()
        else:
            gate = tl.reshape(gate, [COLUMNS])
        out = moe_activate(gate, up, ACTIVATION)
        offs_n = tile * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(inner_ptr + slot.to(tl.int64) * N + offs_n, out.to(inner_ptr.dtype.element_ty), mask=offs_n < N)


@triton.jit
def _moe_vector_gate_up_block(w_rows, scales, offs_v, K, VECTOR: tl.constexpr, SCALES: tl.constexpr):
    """Weights ``[lanes, GROUPS, rows, CHUNKS, VECTOR]`` at a block of K, and the scales of their vectors.

    A vector lies in one block of scales. Where there are none, each is 1.
    """
    offs_k = offs_v[:, None, None, :, None] + tl.arange(0, VECTOR)[None, None, None, None, :]
    # Each weight is read once, and must not evict from the L1 what CTAs share.
    eviction: tl.constexpr = "evict_first" if SCALES == "none" else ""
    w = tl.load(w_rows + offs_k, mask=offs_k < K, other=0, eviction_policy=eviction)
    scale = tl.full([1, 1, 1, 1, 1], 1.0, dtype=tl.float32)
    if SCALES == "block":
        offs_s = offs_v[:, None, None, None, :]
        scale = tl.load(scales + offs_s // 128, mask=offs_s < K, other=0.0)
    return w, scale
