# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The first product of a decode layer: gate_up's rows times the tokens of each hit expert, activated."""

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from moe_dispatch.backends.triton_common.device import moe_activate, moe_fp8_amax, moe_fp8_codes, moe_fp8_scale
from moe_dispatch.backends.triton_common.fast_launch import fast_launch
from moe_dispatch.backends.triton_splitk.config import slots_per_scan
from moe_dispatch.backends.triton_splitk.stream import moe_prefetch, moe_slots_to_serve, moe_stream, moe_take_slots
from moe_dispatch.problem import QUANT_BLOCK

if TYPE_CHECKING:
    from torch import Tensor

    from moe_dispatch.backends.triton_splitk.config import SplitKConfig
    from moe_dispatch.experts import ExpertWeights

_ZEROS = tl.constexpr(1024)


@triton.jit
def _moe_clear(zero_ptr, zeros):
    """Clear this program's share of `zeros` floats."""
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    for first in range(program * _ZEROS, zeros, programs * _ZEROS):
        offs_z = first + tl.arange(0, _ZEROS)
        tl.store(zero_ptr + offs_z, tl.zeros([_ZEROS], dtype=tl.float32), mask=offs_z < zeros)


@triton.jit
def _moe_add_bias_activate(
    gate, up, bias_ptr, expert, offs_n, N,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The intermediate ``[columns, BLOCK_M]`` of one expert, in fp32."""
    if HAS_BIAS:
        parts: tl.constexpr = 2 if GATED else 1
        step: tl.constexpr = 2 if INTERLEAVED else 1
        biases = bias_ptr + expert * parts * N + offs_n * step
        mask_n = offs_n < N
        gate += tl.load(biases, mask=mask_n, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up += tl.load(biases + (1 if INTERLEAVED else N), mask=mask_n, other=0.0).to(tl.float32)[:, None]
    return moe_activate(gate, up, ACTIVATION)


@fast_launch
@triton.jit(do_not_specialize=["S", "zeros"])
def _moe_splitk_gate_up_kernel(
    # inputs
    x_ptr, x_scale_ptr, weight_ptr, weight_descriptor, scale_ptr, bias_ptr, ids_ptr,
    # outputs
    inner_ptr, inner_scale_ptr, zero_ptr,
    # shapes
    S, K, N, E, TOPK, zeros,
    # constants
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SCAN: tl.constexpr, EVEN_K: tl.constexpr,
    SPLITS: tl.constexpr, BY_SLOT: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr, FP8: tl.constexpr,
    TWO_SCALES: tl.constexpr, PARTIAL: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = 2 if GATED else 1
    columns: tl.constexpr = ROWS // parts
    owner, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL:
        if not FP8:
            # The router's kernel may still run, and only after it is over may the next kernel start, which reads ids
            # early. In block FP8 the kernel before is the one that quantises, and it has waited for the router.
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    e, count = moe_slots_to_serve(ids_ptr, owner, S, E, BLOCK_M, SCAN, BY_SLOT)
    expert = e.to(tl.int64)

    # Rows of the tile: gate's then up's, or alternating, as they lie in memory. Past N they repeat the last row.
    offs_r = tl.arange(0, ROWS)
    part = offs_r % parts if INTERLEAVED else offs_r // columns
    column = tile * columns + (offs_r // parts if INTERLEAVED else offs_r % columns)
    column = tl.minimum(column, N - 1)
    row = column * parts + part if INTERLEAVED else part * N + column  # [ROWS]
    w_rows = weight_ptr + (expert * parts * N + row) * K
    w_scales = scale_ptr
    up_scales = scale_ptr
    if FP8:
        expert_scales = scale_ptr + expert * tl.cdiv(parts * N, BLOCK_K) * tl.cdiv(K, BLOCK_K)
        first = tile * ROWS if INTERLEAVED else tile * columns
        gate_row = first if TWO_SCALES else row
        w_scales = expert_scales + gate_row // BLOCK_K * tl.cdiv(K, BLOCK_K)
        up_row = first if INTERLEAVED else (parts - 1) * N + first
        up_scales = expert_scales + up_row // BLOCK_K * tl.cdiv(K, BLOCK_K)
    # [E·N, 2, K] where rows alternate, [E·parts, N, K] where they do not.
    w_first = (expert * N + tile * columns if INTERLEAVED else expert * parts).to(tl.int32)
    w_second = 0 if INTERLEAVED else tile * columns
    blocks = tl.cdiv(K, BLOCK_K)
    share = tl.cdiv(blocks, SPLITS)
    first_block = split * share
    last_block = tl.minimum(first_block + share, blocks)
    if PDL:
        moe_prefetch(w_rows, first_block, tl.where(count > 0, blocks, 0), K, BLOCK_K)
        if FP8:
            tl.extra.cuda.gdc_wait()
    if zero_ptr is not None:
        # The buffer that the down kernel adds to is cleared here, inside any captured graph, instead of by a launch.
        _moe_clear(zero_ptr, zeros)
    if count == 0:
        return
    offs_n = tile * columns + tl.arange(0, columns)
    mask_n = offs_n < N
    plane = S.to(tl.int64) * N

    for skip in range(0, count, BLOCK_M):
        slots, mask_m = moe_take_slots(ids_ptr, owner if BY_SLOT else 0, S, e, skip, BLOCK_M, SCAN)
        tokens = (slots // TOPK).to(tl.int64)
        x_scales = x_scale_ptr
        if FP8:
            x_scales = x_scale_ptr + tokens * blocks
        acc = moe_stream(
            w_rows, weight_descriptor, w_first, w_second, w_scales, up_scales, part == 1,
            x_ptr + tokens * K, x_scales, mask_m, first_block, last_block, K,
            ROWS, BLOCK_M, BLOCK_K, EVEN_K, TMA, FP8, TWO_SCALES,
        )  # fmt: skip
        gate = acc  # [columns, BLOCK_M]
        up = acc
        if GATED:
            if INTERLEAVED:
                gate, up = acc.reshape(columns, 2, BLOCK_M).permute(0, 2, 1).split()
            else:
                gate, up = acc.reshape(2, columns, BLOCK_M).permute(1, 2, 0).split()
        inner = inner_ptr + slots.to(tl.int64)[None, :] * N + offs_n[:, None]
        mask = mask_n[:, None] & mask_m[None, :]
        if PARTIAL:
            # Planes [SPLITS, parts, S, N]: the next kernel adds and activates them.
            tl.store(inner + split * parts * plane, gate, mask=mask)
            if GATED:
                tl.store(inner + (split * parts + 1) * plane, up, mask=mask)
        else:
            out = _moe_add_bias_activate(
                gate, up, bias_ptr, expert, offs_n, N, GATED, INTERLEAVED, HAS_BIAS, ACTIVATION
            )
            if FP8:
                # The tile's columns are one group of the quantisation; those past N must not raise its maximum.
                out = tl.where(mask_n[:, None], out, 0.0)
                scale = moe_fp8_scale(moe_fp8_amax(out, 0))  # [BLOCK_M]
                out = moe_fp8_codes(out, tl.broadcast_to(scale[None, :], [columns, BLOCK_M]))
                tl.store(inner_scale_ptr + slots * tl.cdiv(N, columns) + tile, scale, mask=mask_m)
            tl.store(inner, out.to(inner_ptr.dtype.element_ty), mask=mask)


def splitk_gate_up(
    x: "Tensor",
    x_scale: "Tensor | None",
    experts: "ExpertWeights",
    topk_ids: "Tensor",
    inner: "Tensor",
    inner_scale: "Tensor | None",
    zero: "Tensor | None",
    config: "SplitKConfig",
    descriptor: Any,
) -> None:
    """Launch the first product.

    Args:
        x: ``[M, K]``, or its e4m3 codes.
        x_scale: fp32 multipliers of the codes ``[M, ⌈K/128⌉]``.
        experts: Checked weights.
        topk_ids: int32 or int64 ``[M, topk]``.
        inner: Written where a slot's id is valid: activated ``[M·topk, N]``, e4m3 in block FP8; or, where
            `config.partial_sums`, fp32 ``[splits, 2, M·topk, N]`` (``1`` for ``2`` without a gate) before bias and
            activation.
        inner_scale: fp32 multipliers of inner's codes ``[M·topk, ⌈N/128⌉]``.
        zero: fp32 buffer to clear, if any.
        config: Tile sizes.
        descriptor: The weights' tensor descriptor where `config.tma`, else None.
    """
    S, topk = topk_ids.numel(), topk_ids.shape[1]
    parts = 2 if experts.gated else 1
    columns = config.block_n // parts
    # A tile's rows then lie in one block of scales, or its gate rows in one and its up rows in another.
    within = columns <= QUANT_BLOCK and (experts.N % columns == 0 or not experts.gated)
    two_scales = config.block_n <= QUANT_BLOCK if experts.interleaved else within
    grid = (
        S if config.grid == "slots" else experts.E,
        triton.cdiv(experts.N * parts, config.block_n),
        config.splits_gate_up,
    )
    _moe_splitk_gate_up_kernel[grid](
        x, x_scale, experts.gate_up, descriptor, experts.gate_up_scale, experts.gate_up_bias, topk_ids,
        inner, inner_scale, zero,
        S, experts.K, experts.N, experts.E, topk, 0 if zero is None else zero.numel(),
        ROWS=config.block_n, BLOCK_M=config.block_m, BLOCK_K=config.block_k, SCAN=slots_per_scan(S),
        EVEN_K=experts.K % config.block_k == 0, SPLITS=config.splits_gate_up, BY_SLOT=config.grid == "slots",
        TMA=config.tma, PDL=config.pdl, FP8=experts.dtype == "fp8", TWO_SCALES=two_scales,
        PARTIAL=config.partial_sums(experts.dtype, gated=experts.gated), GATED=experts.gated,
        INTERLEAVED=experts.interleaved, HAS_BIAS=experts.gate_up_bias is not None, ACTIVATION=experts.activation,
        **config.launch,
    )  # fmt: skip
