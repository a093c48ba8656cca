# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The two grouped products. Each launch is one wave of programs that walk over the tiles of all experts.

Rows lie in expert order without padding (see `stages.route`). Which tiles there are depends on the routing, so every
program finds its own on the device: it keeps the running count of row blocks of all experts in registers.
"""

import triton
import triton.language as tl

from ..stages.device import moe_activate, moe_fp8_amax, moe_fp8_codes, moe_fp8_scale


@triton.jit
def _moe_gate_up_kernel(
    # inputs
    x_ptr,
    x_scale_ptr,
    w,
    w_scale_ptr,
    bias_ptr,
    slot_of_row_ptr,
    starts_ptr,
    ends_ptr,
    # outputs
    h_ptr,
    h_scale_ptr,
    # shapes
    N,
    K,
    E,
    # constants
    TOPK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FP8: tl.constexpr,
    SCALAR_SCALE: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ORDER: tl.constexpr,
    GROUP_M: tl.constexpr,
    E_POW2: tl.constexpr,
    PDL: tl.constexpr,
):
    """For every row h = activation(x @ gateᵀ, x @ upᵀ); with FP8 requantised per row and 128 columns."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    blocks, ends_b = _count_blocks(starts_ptr, ends_ptr, E, E_POW2, BLOCK_M)
    m_blocks = tl.sum(blocks, 0)
    n_blocks = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), m_blocks * n_blocks, tl.num_programs(0)):
        block_m, block_n = _order(tile, m_blocks, n_blocks, ORDER, GROUP_M)
        e, row = _locate(block_m, blocks, ends_b, starts_ptr, BLOCK_M)
        end = tl.load(ends_ptr + e)
        if TAIL_M > 0:
            if end - row <= TAIL_M:
                _gate_up_tile(
                    x_ptr, x_scale_ptr, w, w_scale_ptr, bias_ptr, slot_of_row_ptr, h_ptr, h_scale_ptr,
                    e, row, end, block_n, N, K, TOPK, ACTIVATION, GATED, INTERLEAVED, FP8, SCALAR_SCALE, EVEN_K, TMA,
                    SWAP, TAIL_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
            else:
                _gate_up_tile(
                    x_ptr, x_scale_ptr, w, w_scale_ptr, bias_ptr, slot_of_row_ptr, h_ptr, h_scale_ptr,
                    e, row, end, block_n, N, K, TOPK, ACTIVATION, GATED, INTERLEAVED, FP8, SCALAR_SCALE, EVEN_K, TMA,
                    SWAP, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
        else:
            _gate_up_tile(
                x_ptr, x_scale_ptr, w, w_scale_ptr, bias_ptr, slot_of_row_ptr, h_ptr, h_scale_ptr,
                e, row, end, block_n, N, K, TOPK, ACTIVATION, GATED, INTERLEAVED, FP8, SCALAR_SCALE, EVEN_K, TMA,
                SWAP, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip


@triton.jit
def _gate_up_tile(
    x_ptr, x_scale_ptr, w, w_scale_ptr, bias_ptr, slot_of_row_ptr, h_ptr, h_scale_ptr,
    e, row, end, block_n, N, K,
    TOPK: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, FP8: tl.constexpr,
    SCALAR_SCALE: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < end
    # Rows past the expert's end read token 0, which is there, and are never stored.
    token = tl.load(slot_of_row_ptr + offs_m, mask=mask_m, other=0) // TOPK
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * K
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_per_expert = 2 * N if GATED else N
    gate_row = offs_n * 2 if INTERLEAVED else offs_n
    up_row = offs_n * 2 + 1 if INTERLEAVED else N + offs_n
    first = e * rows_per_expert + block_n * BLOCK_N  # TMA coordinate, E·2N < 2³¹
    base = e.to(tl.int64) * rows_per_expert
    k_groups = tl.cdiv(K, 128)
    if FP8:
        x_scale_ptrs = x_scale_ptr + token * k_groups
        scale_base = w_scale_ptr + e * tl.cdiv(rows_per_expert, 128) * k_groups
        # Rows past N are another matrix's, and past the last expert nothing.
        gate_scale_row = _scale_row(tl.where(offs_n < N, gate_row, 0), block_n * BLOCK_N, SCALAR_SCALE)
        up_scale_row = _scale_row(tl.where(offs_n < N, up_row, 0), N + block_n * BLOCK_N, SCALAR_SCALE)
        gate_scale_ptrs = scale_base + gate_scale_row * k_groups
        up_scale_ptrs = scale_base + up_scale_row * k_groups
    gate = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        x = _load_x(x_ptrs, k, K, EVEN_K, BLOCK_K)
        w_gate = _load_w(w, first, base + gate_row, offs_n < N, k, K, TMA, EVEN_K, BLOCK_K)
        if FP8:
            x_scale = tl.load(x_scale_ptrs + k // 128)
            gate = _scaled_product(x, w_gate, gate, x_scale, tl.load(gate_scale_ptrs + k // 128), SCALAR_SCALE, SWAP)
        else:
            gate = _product(x, w_gate, gate, SWAP)
        if GATED:
            w_up = _load_w(w, first + N, base + up_row, offs_n < N, k, K, TMA, EVEN_K, BLOCK_K)
            if FP8:
                up = _scaled_product(x, w_up, up, x_scale, tl.load(up_scale_ptrs + k // 128), SCALAR_SCALE, SWAP)
            else:
                up = _product(x, w_up, up, SWAP)
    if SWAP:
        gate, up = tl.trans(gate), tl.trans(up)

    mask_n = offs_n < N
    if bias_ptr is not None:
        gate += tl.load(bias_ptr + base + gate_row, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias_ptr + base + up_row, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    h = moe_activate(gate, up, ACTIVATION)  # [BLOCK_M, BLOCK_N]
    row64 = offs_m.to(tl.int64)
    mask = mask_m[:, None] & mask_n[None, :]
    h_ptrs = h_ptr + row64[:, None] * N + offs_n[None, :]
    if FP8:
        tl.static_assert(BLOCK_N == 128, "a group of 128 columns must be whole in a tile")
        # Columns past N hold another matrix's rows, and must not raise the group's scale.
        h = tl.where(mask_n[None, :], h, 0.0)
        scale = moe_fp8_scale(moe_fp8_amax(h, 1))
        tl.store(h_ptrs, moe_fp8_codes(h, tl.broadcast_to(scale[:, None], [BLOCK_M, BLOCK_N])), mask=mask)
        tl.store(h_scale_ptr + row64 * tl.cdiv(N, 128) + block_n, scale, mask=mask_m)
    else:
        tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _moe_down_kernel(
    # inputs
    h_ptr,
    h_scale_ptr,
    w,
    w_scale_ptr,
    bias_ptr,
    starts_ptr,
    ends_ptr,
    # outputs
    y_ptr,
    # shapes
    N,
    K,
    E,
    # constants
    FP8: tl.constexpr,
    SCALAR_SCALE: tl.constexpr,
    EVEN_N: tl.constexpr,
    TMA: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ORDER: tl.constexpr,
    GROUP_M: tl.constexpr,
    E_POW2: tl.constexpr,
    PDL: tl.constexpr,
):
    """For every row y = h @ downᵀ. BLOCK_N tiles the product's columns, K of them; BLOCK_K what is summed over, N."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    blocks, ends_b = _count_blocks(starts_ptr, ends_ptr, E, E_POW2, BLOCK_M)
    m_blocks = tl.sum(blocks, 0)
    n_blocks = tl.cdiv(K, BLOCK_N)
    for tile in range(tl.program_id(0), m_blocks * n_blocks, tl.num_programs(0)):
        block_m, block_n = _order(tile, m_blocks, n_blocks, ORDER, GROUP_M)
        e, row = _locate(block_m, blocks, ends_b, starts_ptr, BLOCK_M)
        end = tl.load(ends_ptr + e)
        if TAIL_M > 0:
            if end - row <= TAIL_M:
                _down_tile(
                    h_ptr, h_scale_ptr, w, w_scale_ptr, bias_ptr, y_ptr, e, row, end, block_n, N, K,
                    FP8, SCALAR_SCALE, EVEN_N, TMA, SWAP, TAIL_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
            else:
                _down_tile(
                    h_ptr, h_scale_ptr, w, w_scale_ptr, bias_ptr, y_ptr, e, row, end, block_n, N, K,
                    FP8, SCALAR_SCALE, EVEN_N, TMA, SWAP, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
        else:
            _down_tile(
                h_ptr, h_scale_ptr, w, w_scale_ptr, bias_ptr, y_ptr, e, row, end, block_n, N, K,
                FP8, SCALAR_SCALE, EVEN_N, TMA, SWAP, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip


@triton.jit
def _down_tile(
    h_ptr, h_scale_ptr, w, w_scale_ptr, bias_ptr, y_ptr, e, row, end, block_n, N, K,
    FP8: tl.constexpr, SCALAR_SCALE: tl.constexpr, EVEN_N: tl.constexpr, TMA: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < end
    source = tl.where(mask_m, offs_m, row).to(tl.int64)  # the buffer may end before the tile does
    h_ptrs = h_ptr + source[:, None] * N
    offs_k = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_k = offs_k < K
    base = e.to(tl.int64) * K
    n_groups = tl.cdiv(N, 128)
    if FP8:
        h_scale_ptrs = h_scale_ptr + source * n_groups
        w_scale_ptrs = w_scale_ptr + e * tl.cdiv(K, 128) * n_groups
        # Rows past K are other experts', and past the last expert nothing.
        w_scale_ptrs += _scale_row(tl.where(mask_k, offs_k, 0), block_n * BLOCK_N, SCALAR_SCALE) * n_groups
    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    for n in range(0, N, BLOCK_K):
        h = _load_x(h_ptrs, n, N, EVEN_N, BLOCK_K)
        w_down = _load_w(w, e * K + block_n * BLOCK_N, base + offs_k, mask_k, n, N, TMA, EVEN_N, BLOCK_K)
        if FP8:
            h_scale = tl.load(h_scale_ptrs + n // 128)
            acc = _scaled_product(h, w_down, acc, h_scale, tl.load(w_scale_ptrs + n // 128), SCALAR_SCALE, SWAP)
        else:
            acc = _product(h, w_down, acc, SWAP)
    if SWAP:
        acc = tl.trans(acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + base + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_k[None, :])


@triton.jit
def _count_blocks(starts_ptr, ends_ptr, E, E_POW2: tl.constexpr, BLOCK_M: tl.constexpr):
    """Row blocks of each expert, and their running count: ``[E_POW2]`` both."""
    offs_e = tl.arange(0, E_POW2)
    start = tl.load(starts_ptr + offs_e, mask=offs_e < E, other=0)
    end = tl.load(ends_ptr + offs_e, mask=offs_e < E, other=0)
    blocks = (end - start + BLOCK_M - 1) // BLOCK_M
    return blocks, tl.cumsum(blocks, 0)


@triton.jit
def _locate(block_m, blocks, ends_b, starts_ptr, BLOCK_M: tl.constexpr):
    """The expert that a row block belongs to, and the block's first row."""
    done = ends_b <= block_m
    e = tl.sum(done.to(tl.int32), 0)
    row = tl.load(starts_ptr + e) + (block_m - tl.sum(tl.where(done, blocks, 0), 0)) * BLOCK_M
    return e, row


@triton.jit
def _order(tile, m_blocks, n_blocks, ORDER: tl.constexpr, GROUP_M: tl.constexpr):
    """Which (row block, column block) a tile is; what runs at the same time shares inputs in the L2 cache."""
    if ORDER == "row_major":
        block_m = tile // n_blocks
        block_n = tile % n_blocks
    elif ORDER == "column_major":
        block_m = tile % m_blocks
        block_n = tile // m_blocks
    else:
        tl.static_assert(ORDER == "grouped", "unknown order")
        first = tile // (GROUP_M * n_blocks) * GROUP_M
        height = tl.minimum(m_blocks - first, GROUP_M)
        inside = tile % (GROUP_M * n_blocks)
        block_m = first + inside % height
        block_n = inside // height
    return block_m, block_n


@triton.jit
def _scale_row(rows, first, SCALAR_SCALE: tl.constexpr):
    """Row of the scale matrix: one for the whole tile where it lies in one block of 128, else one for each row."""
    return first // 128 if SCALAR_SCALE else rows // 128


@triton.jit
def _load_x(row_ptrs, k, K, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_k = k + tl.arange(0, BLOCK_K)
    if EVEN_K:
        x = tl.load(row_ptrs + offs_k[None, :])
    else:
        x = tl.load(row_ptrs + offs_k[None, :], mask=(offs_k < K)[None, :], other=0.0)
    return x  # [BLOCK_M, BLOCK_K]


@triton.jit
def _load_w(w, first, rows, mask, k, K, TMA: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    if TMA:
        tile = w.load([first, k])
    else:
        offs_k = k + tl.arange(0, BLOCK_K)
        w_ptrs = w + rows[:, None] * K + offs_k[None, :]
        if EVEN_K:
            tile = tl.load(w_ptrs, mask=mask[:, None], other=0.0)
        else:
            tile = tl.load(w_ptrs, mask=mask[:, None] & (offs_k < K)[None, :], other=0.0)
    return tile  # [BLOCK_N, BLOCK_K]


@triton.jit
def _product(x, w, acc, SWAP: tl.constexpr):
    """Add x @ wᵀ, or its transpose: weights then take the wide side of the tensor core and few rows the narrow."""
    if SWAP:
        out = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    else:
        out = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    return out


@triton.jit
def _scaled_product(x, w, acc, x_scale, w_scale, SCALAR_SCALE: tl.constexpr, SWAP: tl.constexpr):
    """The same with block scales; each 128 products are added up by the tensor core and then in fp32."""
    if SWAP:
        product = tl.dot(w, tl.trans(x))
        if SCALAR_SCALE:
            out = acc + product * (x_scale * w_scale)[None, :]
        else:
            out = acc + product * x_scale[None, :] * w_scale[:, None]
    else:
        product = tl.dot(x, tl.trans(w))
        if SCALAR_SCALE:
            out = acc + product * (x_scale * w_scale)[:, None]
        else:
            out = acc + product * x_scale[:, None] * w_scale[None, :]
    return out
