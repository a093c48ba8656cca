# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The second product of a decode layer: down's rows times the intermediate of each hit expert's tokens."""

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from .stream import moe_prefetch, moe_slots_to_serve, moe_stream, moe_take_slots

if TYPE_CHECKING:
    from torch import Tensor

    from moe_dispatch.experts import ExpertWeights

    from .config import SplitKConfig


@triton.jit(do_not_specialize=["S"])
def _moe_splitk_down_kernel(
    # inputs
    inner_ptr, weight_ptr, weight_descriptor, scale_ptr, gate_up_bias_ptr, bias_ptr, topk_weights_ptr, ids_ptr,
    # outputs
    out_ptr,
    # shapes
    S, K, N, E, TOPK,
    # constants
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr,
    SPLITS_GATE_UP: tl.constexpr, SPLITS: tl.constexpr, BY_SLOT: tl.constexpr, ATOMIC: tl.constexpr,
    TMA: tl.constexpr, PDL: tl.constexpr, FP8: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = 2 if GATED else 1
    owner, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = 0
    e = owner
    if BY_SLOT:
        start = owner
        e = tl.load(ids_ptr + owner)
    count = moe_slots_to_serve(ids_ptr, owner, S, e, E, BLOCK_M, BY_SLOT)
    expert = e.to(tl.int64)
    offs_r = tile * ROWS + tl.arange(0, ROWS)
    mask_r = offs_r < K
    row = tl.minimum(offs_r, K - 1)
    w_rows = weight_ptr + (expert * K + row) * N
    blocks = tl.cdiv(N, BLOCK_K)
    share = tl.cdiv(blocks, SPLITS)
    first_block = split * share
    last_block = tl.minimum(first_block + share, blocks)
    if PDL:
        # Ids and weights were there before gate_up began: its last wave leaves time to fetch the first of ours.
        if count > 0:  # noqa: SIM102 - `and` evaluates both on the device
            if first_block < blocks:
                moe_prefetch(w_rows, first_block * BLOCK_K, N, 2 * BLOCK_K)
        # Idle CTAs wait too: a kernel that ends before its predecessor would release its successor too early.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if count == 0:
        return

    w_scales = scale_ptr
    if FP8:
        w_scales = scale_ptr + (expert * tl.cdiv(K, BLOCK_K) + row // BLOCK_K) * tl.cdiv(N, BLOCK_K)
    gate_bias = gate_up_bias_ptr
    up_bias = gate_up_bias_ptr
    if HAS_BIAS:
        gate_bias = gate_up_bias_ptr + expert * parts * N
        up_bias = gate_bias + (1 if INTERLEAVED else N)
    plane = S.to(tl.int64) * N

    for skip in range(0, count, BLOCK_M):
        slots, mask_m = moe_take_slots(ids_ptr, start, S, e, skip, BLOCK_M)
        acc = moe_stream(
            w_rows,
            weight_descriptor,
            e.to(tl.int32),
            tile * ROWS,
            w_scales,
            inner_ptr + slots.to(tl.int64) * N,
            gate_bias,
            up_bias,
            plane,
            mask_m,
            first_block,
            last_block,
            N,
            ROWS,
            BLOCK_M,
            BLOCK_K,
            EVEN_N,
            TMA,
            FP8,
            SPLITS_GATE_UP,
            GATED,
            INTERLEAVED,
            HAS_BIAS,
            ACTIVATION,
        )  # [ROWS, BLOCK_M]
        mask = mask_r[:, None] & mask_m[None, :]
        if ATOMIC:
            if HAS_BIAS:  # noqa: SIM102 - the nested form compiles away without a bias
                if split == 0:
                    acc += tl.load(bias_ptr + expert * K + offs_r, mask=mask_r, other=0.0).to(tl.float32)[:, None]
            acc *= tl.load(topk_weights_ptr + slots, mask=mask_m, other=0.0)[None, :]
            out = out_ptr + (slots // TOPK).to(tl.int64)[None, :] * K + offs_r[:, None]
            tl.atomic_add(out, acc, mask=mask, sem="relaxed")
        else:
            out = out_ptr + (split * S + slots).to(tl.int64)[None, :] * K + offs_r[:, None]
            tl.store(out, acc, mask=mask)


def splitk_down(
    inner: "Tensor",
    experts: "ExpertWeights",
    topk_weights: "Tensor",
    topk_ids: "Tensor",
    out: "Tensor",
    config: "SplitKConfig",
    descriptor: Any,
) -> None:
    """Launch the second product.

    Args:
        inner: What `splitk_gate_up` wrote under the same `config`.
        experts: Checked weights.
        topk_weights: fp32 ``[M, topk]``.
        topk_ids: int32 or int64 ``[M, topk]``.
        out: fp32. Deterministic mode: partial sums ``[splits, M·topk, K]`` without bias and weight, written where the
            slot's id is valid. Atomic mode: ``[M, K]``, cleared before; the weighted sum is added to it.
        config: Tile sizes.
        descriptor: The weights' tensor descriptor where `config.tma`, else None.
    """
    S, topk = topk_ids.numel(), topk_ids.shape[1]
    grid = (
        S if config.grid == "slots" else experts.E,
        triton.cdiv(experts.K, config.block_n),
        config.splits_down,
    )
    _moe_splitk_down_kernel[grid](
        inner, experts.down, descriptor, experts.down_scale, experts.gate_up_bias, experts.down_bias, topk_weights,
        topk_ids,
        out,
        S, experts.K, experts.N, experts.E, topk,
        ROWS=config.block_n, BLOCK_M=config.block_m, BLOCK_K=config.block_k, EVEN_N=experts.N % config.block_k == 0,
        SPLITS_GATE_UP=config.splits_gate_up, SPLITS=config.splits_down, BY_SLOT=config.grid == "slots",
        ATOMIC=config.mode == "atomic", TMA=config.tma, PDL=config.pdl, FP8=experts.dtype == "fp8",
        GATED=experts.gated, INTERLEAVED=experts.interleaved, HAS_BIAS=experts.down_bias is not None,
        ACTIVATION=experts.activation, **config.launch,
    )  # fmt: skip
