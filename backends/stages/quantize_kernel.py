# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `quantize_rows`, `gather_quantize` and `gather`."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.device import moe_fp8_amax, moe_fp8_codes, moe_fp8_scale
from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.pdl import moe_pdl_wait_and_release


@fast_launch
@triton.jit(do_not_specialize=["rows"])
def _moe_quantize_rows_kernel(
    # inputs
    x_ptr,
    # outputs
    codes_ptr,
    scale_ptr,
    # shapes
    rows,
    columns,
    stride_scale_row,
    stride_scale_group,
    # constants
    BLOCK_R: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program quantises GROUPS groups of WIDTH columns of BLOCK_R rows."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.program_id(1) * GROUPS * WIDTH + tl.arange(0, GROUPS * WIDTH)
    offs_g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    moe_pdl_wait_and_release(PDL)
    mask_r = offs_r < rows
    mask = mask_r[:, None] & (offs_c < columns)[None, :]
    offs = offs_r.to(tl.int64)[:, None] * columns + offs_c[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    x = tl.reshape(x.to(tl.float32), [BLOCK_R, GROUPS, WIDTH])
    scale = moe_fp8_scale(moe_fp8_amax(x, 2))  # [BLOCK_R, GROUPS]
    codes = moe_fp8_codes(x, tl.broadcast_to(scale[:, :, None], [BLOCK_R, GROUPS, WIDTH]))
    tl.store(codes_ptr + offs, tl.reshape(codes, [BLOCK_R, GROUPS * WIDTH]), mask=mask)
    scale_ptrs = scale_ptr + offs_r.to(tl.int64)[:, None] * stride_scale_row + offs_g[None, :] * stride_scale_group
    tl.store(scale_ptrs, scale, mask=mask_r[:, None] & (offs_g * WIDTH < columns)[None, :])


@fast_launch
@triton.jit(do_not_specialize=["span"])
def _moe_gather_kernel(
    # inputs
    x_ptr,
    x_scale_ptr,
    row_of_slot_ptr,
    # outputs
    out_ptr,
    scale_ptr,
    # shapes
    columns,
    span,
    stride_scale_span,
    stride_scale_row,
    stride_scale_group,
    # constants
    SPREAD: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK_POW2: tl.constexpr,
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program reads GROUPS * 128 columns of a token once, quantises them once, and writes them to the token's rows.

    With `x_scale_ptr`, tokens are codes, and these their multipliers ``[M, groups]``; without `scale_ptr` nothing is
    quantised. With SPREAD, multipliers are written once, to the token's row of ``[M, groups]``.
    """
    blocks = tl.cdiv(columns, GROUPS * 128)
    token = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    offs_c = block * GROUPS * 128 + tl.arange(0, GROUPS * 128)
    mask_c = offs_c < columns
    moe_pdl_wait_and_release(PDL)
    out = tl.load(x_ptr + token.to(tl.int64) * columns + offs_c, mask=mask_c, other=0.0)
    if scale_ptr is not None:
        offs_g = block * GROUPS + tl.arange(0, GROUPS)
        mask_g = offs_g * 128 < columns
        if x_scale_ptr is None:
            x = tl.reshape(out.to(tl.float32), [GROUPS, 128])
            scale = moe_fp8_scale(moe_fp8_amax(x, 1))  # [GROUPS]
            codes = moe_fp8_codes(x, tl.broadcast_to(scale[:, None], [GROUPS, 128]))
            out = tl.reshape(codes, [GROUPS * 128])
        else:
            scale = tl.load(x_scale_ptr + token.to(tl.int64) * tl.cdiv(columns, 128) + offs_g, mask=mask_g)
        if SPREAD:
            ptrs = scale_ptr + token.to(tl.int64) * stride_scale_row + offs_g * stride_scale_group
            tl.store(ptrs, scale, mask=mask_g)
        else:
            offs_j = tl.arange(0, TOPK_POW2)
            rows = tl.load(row_of_slot_ptr + token * TOPK + offs_j, mask=offs_j < TOPK, other=-1)
            # With a capacity, every span of rows (an expert) has a matrix of multipliers of its own.
            row_offs = (rows // span).to(tl.int64) * stride_scale_span + (rows % span).to(tl.int64) * stride_scale_row
            tl.store(
                scale_ptr + row_offs[:, None] + offs_g[None, :] * stride_scale_group,
                tl.broadcast_to(scale[None, :], [TOPK_POW2, GROUPS]),
                mask=(rows >= 0)[:, None] & mask_g[None, :],
            )
    for j in tl.static_range(TOPK):
        row = tl.load(row_of_slot_ptr + token * TOPK + j).to(tl.int64)
        tl.store(out_ptr + row * columns + offs_c, out, mask=mask_c & (row >= 0))


@fast_launch
@triton.jit
def _moe_spread_scales_kernel(
    # inputs
    token_scale_ptr,
    slot_of_row_ptr,
    # outputs
    scale_ptr,
    # shapes
    rows,
    groups,
    stride_group,
    # constants
    TOPK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PDL: tl.constexpr,
):
    """Copies the multipliers of tokens ``[M, groups]`` to their rows, where groups are `stride_group` apart."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    moe_pdl_wait_and_release(PDL)
    slot = tl.load(slot_of_row_ptr + offs_r, mask=offs_r < rows, other=-1)
    token = (slot // TOPK).to(tl.int64)
    for first in range(0, groups, BLOCK_G):
        offs_g = first + tl.arange(0, BLOCK_G)
        mask = (slot >= 0)[:, None] & (offs_g < groups)[None, :]
        scale = tl.load(token_scale_ptr + token[:, None] * groups + offs_g[None, :], mask=mask)
        tl.store(scale_ptr + offs_r[:, None] + offs_g[None, :].to(tl.int64) * stride_group, scale, mask=mask)
