# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device code of `activate_partial`."""

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.device import moe_activate, moe_fp8_amax, moe_fp8_codes, moe_fp8_scale
from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_common.pdl import moe_pdl_release, moe_pdl_wait


@fast_launch
@triton.jit(do_not_specialize=["S"])
def _moe_activate_partial_kernel(
    # inputs
    partial_ptr, bias_ptr, ids_ptr,
    # outputs
    out_ptr, scale_ptr,
    # shapes
    S, N, E,
    # constants
    SPLITS: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = 2 if GATED else 1
    slot = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    moe_pdl_release(PDL)
    e = tl.load(ids_ptr + slot)
    mask = (offs_n < N) & (e >= 0) & (e < E)
    moe_pdl_wait(PDL)
    plane = S.to(tl.int64) * N
    partials = partial_ptr + slot.to(tl.int64) * N + offs_n
    gate = tl.zeros([BLOCK], dtype=tl.float32)
    up = tl.zeros([BLOCK], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        gate += tl.load(partials + split * parts * plane, mask=mask, other=0.0)
        if GATED:
            up += tl.load(partials + (split * parts + 1) * plane, mask=mask, other=0.0)
    if bias_ptr is not None:
        biases = bias_ptr + e.to(tl.int64) * parts * N
        step: tl.constexpr = 2 if INTERLEAVED else 1
        gate += tl.load(biases + offs_n * step, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(biases + (1 if INTERLEAVED else N) + offs_n * step, mask=mask, other=0.0).to(tl.float32)
    out = moe_activate(gate, up, ACTIVATION)
    if scale_ptr is not None:
        groups: tl.constexpr = BLOCK // WIDTH
        # Past N nothing may count: a bias without columns leaves an activation of zero, and zero is no amax.
        grouped = tl.reshape(tl.where(mask, out, 0.0), [groups, WIDTH])
        scale = moe_fp8_scale(moe_fp8_amax(grouped, 1))  # [groups]
        codes = moe_fp8_codes(grouped, tl.broadcast_to(scale[:, None], [groups, WIDTH]))
        tl.store(out_ptr + slot.to(tl.int64) * N + offs_n, tl.reshape(codes, [BLOCK]), mask=mask)
        offs_g = tl.program_id(1) * groups + tl.arange(0, groups)
        tl.store(scale_ptr + slot * tl.cdiv(N, WIDTH) + offs_g, scale, mask=offs_g * WIDTH < N)
    else:
        tl.store(out_ptr + slot.to(tl.int64) * N + offs_n, out.to(out_ptr.dtype.element_ty), mask=mask)
