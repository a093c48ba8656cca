# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Between the products, where a CTA of the first did not hold all that activation or quantisation needs."""

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.device import moe_activate, moe_fp8_amax, moe_fp8_codes, moe_fp8_scale
from moe_dispatch.backends.triton_common.fast_launch import fast_launch

if TYPE_CHECKING:
    from torch import Tensor

    from moe_dispatch.backends.triton_splitk.config import SplitKConfig
    from moe_dispatch.experts import ExpertWeights

_BLOCK = 512


@fast_launch
@triton.jit(do_not_specialize=["S"])
def _moe_splitk_activate_kernel(
    # inputs
    partial_ptr, bias_ptr, ids_ptr,
    # outputs
    out_ptr, scale_ptr,
    # shapes
    S, N, E,
    # constants
    SPLITS: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, FP8: tl.constexpr, ACTIVATION: tl.constexpr,
    PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = 2 if GATED else 1
    slot = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    e = tl.load(ids_ptr + slot)
    mask = (offs_n < N) & (e >= 0) & (e < E)
    if PDL:
        tl.extra.cuda.gdc_wait()
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
    if FP8:
        groups: tl.constexpr = BLOCK // 128
        # Past N nothing may count: a bias without columns leaves an activation of zero, and zero is no amax.
        grouped = tl.reshape(tl.where(mask, out, 0.0), [groups, 128])
        scale = moe_fp8_scale(moe_fp8_amax(grouped, 1))  # [groups]
        codes = moe_fp8_codes(grouped, tl.broadcast_to(scale[:, None], [groups, 128]))
        tl.store(out_ptr + slot.to(tl.int64) * N + offs_n, tl.reshape(codes, [BLOCK]), mask=mask)
        offs_g = tl.program_id(1) * groups + tl.arange(0, groups)
        tl.store(scale_ptr + slot * tl.cdiv(N, 128) + offs_g, scale, mask=offs_g * 128 < N)
    else:
        tl.store(out_ptr + slot.to(tl.int64) * N + offs_n, out.to(out_ptr.dtype.element_ty), mask=mask)


def splitk_activate(
    partial: "Tensor",
    experts: "ExpertWeights",
    topk_ids: "Tensor",
    inner: "Tensor",
    inner_scale: "Tensor | None",
    config: "SplitKConfig",
) -> None:
    """Launch the sum over splits, bias, activation and quantisation.

    Args:
        partial: fp32 ``[splits, 2, M·topk, N]`` from `splitk_gate_up` (``1`` for ``2`` without a gate).
        experts: Checked weights; their gate_up_bias is added here.
        topk_ids: int32 or int64 ``[M, topk]``.
        inner: ``[M·topk, N]``, written where a slot's id is valid; e4m3 in block FP8.
        inner_scale: fp32 multipliers of the codes ``[M·topk, ⌈N/128⌉]``.
        config: What `splitk_gate_up` ran with.
    """
    S = topk_ids.numel()
    block = min(_BLOCK, max(128, triton.next_power_of_2(experts.N)))
    _moe_splitk_activate_kernel[(S, triton.cdiv(experts.N, block))](
        partial, experts.gate_up_bias, topk_ids,
        inner, inner_scale,
        S, experts.N, experts.E,
        SPLITS=partial.shape[0], GATED=experts.gated, INTERLEAVED=experts.interleaved,
        FP8=experts.dtype == "fp8", ACTIVATION=experts.activation, PDL=config.pdl, BLOCK=block,
        num_warps=block // 128, **({"launch_pdl": True} if config.pdl else {}),
    )  # fmt: skip
