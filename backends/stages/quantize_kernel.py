# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Device code of `quantize_rows`, `gather_quantize` and `gather`."""

import triton
import triton.language as tl

from .device import moe_fp8_amax, moe_fp8_codes, moe_fp8_scale


@triton.jit
def _moe_quantize_rows_kernel(
    # inputs
    x_ptr,
    slot_of_row_ptr,
    # outputs
    codes_ptr,
    scale_ptr,
    # shapes
    rows,
    columns,
    topk,
    stride_scale_row,
    stride_scale_group,
    # constants
    GATHER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.program_id(1) * GROUPS * 128 + tl.arange(0, GROUPS * 128)
    offs_g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    mask_r = offs_r < rows
    source = offs_r
    if GATHER:
        slot = tl.load(slot_of_row_ptr + offs_r, mask=mask_r, other=-1)
        mask_r = slot >= 0
        source = tl.maximum(slot, 0) // topk
    mask = mask_r[:, None] & (offs_c < columns)[None, :]
    x = tl.load(x_ptr + source.to(tl.int64)[:, None] * columns + offs_c[None, :], mask=mask, other=0.0)
    x = tl.reshape(x.to(tl.float32), [BLOCK_R, GROUPS, 128])
    scale = moe_fp8_scale(moe_fp8_amax(x, 2))  # [BLOCK_R, GROUPS]
    codes = moe_fp8_codes(x, tl.broadcast_to(scale[:, :, None], [BLOCK_R, GROUPS, 128]))
    codes = tl.reshape(codes, [BLOCK_R, GROUPS * 128])
    tl.store(codes_ptr + offs_r.to(tl.int64)[:, None] * columns + offs_c[None, :], codes, mask=mask)
    scale_ptrs = scale_ptr + offs_r.to(tl.int64)[:, None] * stride_scale_row + offs_g[None, :] * stride_scale_group
    tl.store(scale_ptrs, scale, mask=mask_r[:, None] & (offs_g * 128 < columns)[None, :])


@triton.jit
def _moe_gather_kernel(
    # inputs
    x_ptr,
    slot_of_row_ptr,
    # outputs
    out_ptr,
    # shapes
    rows,
    columns,
    topk,
    # constants
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slot_of_row_ptr + offs_r, mask=offs_r < rows, other=-1)
    mask = (slot >= 0)[:, None] & (offs_c < columns)[None, :]
    source = (tl.maximum(slot, 0) // topk).to(tl.int64)
    x = tl.load(x_ptr + source[:, None] * columns + offs_c[None, :], mask=mask)
    tl.store(out_ptr + offs_r.to(tl.int64)[:, None] * columns + offs_c[None, :], x, mask=mask)
