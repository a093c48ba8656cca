# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The first product of a decode layer: gate_up's rows times the tokens of each hit expert, activated."""

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from ..stages.device import moe_activate
from .stream import moe_slots_to_serve, moe_stream, moe_take_slots

if TYPE_CHECKING:
    from torch import Tensor

    from moe_dispatch.experts import ExpertWeights

    from .config import SplitKConfig

_ZEROS = tl.constexpr(1024)


@triton.jit(do_not_specialize=["S", "zeros"])
def _moe_splitk_gate_up_kernel(
    # inputs
    x_ptr, weight_ptr, weight_descriptor, scale_ptr, bias_ptr, ids_ptr,
    # outputs
    inner_ptr, zero_ptr,
    # shapes
    S, K, N, E, TOPK, zeros,
    # constants
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, SPLITS: tl.constexpr,
    BY_SLOT: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr, FP8: tl.constexpr, GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = 2 if GATED else 1
    columns: tl.constexpr = ROWS // parts
    owner, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL:
        # The router's kernel may still run. Only after it is over may the next kernel start, which reads ids early.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if zero_ptr is not None:
        # The buffer that the down kernel adds to is cleared here, inside any captured graph, instead of by a launch.
        program = (split * tl.num_programs(1) + tile) * tl.num_programs(0) + owner
        programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
        for first in range(program * _ZEROS, zeros, programs * _ZEROS):
            offs_z = first + tl.arange(0, _ZEROS)
            tl.store(zero_ptr + offs_z, tl.zeros([_ZEROS], dtype=tl.float32), mask=offs_z < zeros)

    start = 0
    e = owner
    if BY_SLOT:
        start = owner
        e = tl.load(ids_ptr + owner)
    count = moe_slots_to_serve(ids_ptr, owner, S, e, E, BLOCK_M, BY_SLOT)
    if count == 0:
        return
    expert = e.to(tl.int64)

    # Rows of the tile: gate's then up's, or alternating, as they lie in memory. Past N they repeat the last row.
    offs_r = tl.arange(0, ROWS)
    part = offs_r % parts if INTERLEAVED else offs_r // columns
    column = tile * columns + (offs_r // parts if INTERLEAVED else offs_r % columns)
    column = tl.minimum(column, N - 1)
    row = column * parts + part if INTERLEAVED else part * N + column  # [ROWS]
    w_rows = weight_ptr + (expert * parts * N + row) * K
    w_scales = scale_ptr
    if FP8:
        w_scales = scale_ptr + (expert * tl.cdiv(parts * N, BLOCK_K) + row // BLOCK_K) * tl.cdiv(K, BLOCK_K)
    # [E·N, 2, K] where rows alternate, [E·parts, N, K] where they do not.
    w_first = (expert * N + tile * columns if INTERLEAVED else expert * parts).to(tl.int32)
    w_second = 0 if INTERLEAVED else tile * columns
    blocks = tl.cdiv(K, BLOCK_K)
    share = tl.cdiv(blocks, SPLITS)
    offs_n = tile * columns + tl.arange(0, columns)
    mask_n = offs_n < N
    plane = S.to(tl.int64) * N

    for skip in range(0, count, BLOCK_M):
        slots, mask_m = moe_take_slots(ids_ptr, start, S, e, skip, BLOCK_M)
        acc = moe_stream(
            w_rows, weight_descriptor, w_first, w_second, w_scales,
            x_ptr + (slots // TOPK).to(tl.int64) * K, None, None, 0, mask_m,
            split * share, tl.minimum(split * share + share, blocks), K,
            ROWS, BLOCK_M, BLOCK_K, EVEN_K, TMA, FP8, 1, False, False, False, ACTIVATION,
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
        if SPLITS == 1:
            if HAS_BIAS:
                biases = bias_ptr + expert * parts * N
                step: tl.constexpr = 2 if INTERLEAVED else 1
                gate += tl.load(biases + offs_n * step, mask=mask_n, other=0.0).to(tl.float32)[:, None]
                if GATED:
                    up_biases = biases + (1 if INTERLEAVED else N)
                    up += tl.load(up_biases + offs_n * step, mask=mask_n, other=0.0).to(tl.float32)[:, None]
            tl.store(inner, moe_activate(gate, up, ACTIVATION).to(inner_ptr.dtype.element_ty), mask=mask)
        else:
            # Planes [SPLITS, parts, S, N]: complete only when every split is here, so the next kernel activates them.
            tl.store(inner + split * parts * plane, gate, mask=mask)
            if GATED:
                tl.store(inner + (split * parts + 1) * plane, up, mask=mask)


def splitk_gate_up(
    hidden_states: "Tensor",
    experts: "ExpertWeights",
    topk_ids: "Tensor",
    inner: "Tensor",
    zero: "Tensor | None",
    config: "SplitKConfig",
    descriptor: Any,
) -> None:
    """Launch the first product.

    Args:
        hidden_states: ``[M, K]``.
        experts: Checked weights.
        topk_ids: int32 or int64 ``[M, topk]``.
        inner: Written where a slot's id is valid: ``[M·topk, N]`` activated, or with K split fp32 partial sums
            ``[splits, 2, M·topk, N]`` (``1`` for ``2`` without a gate) before bias and activation.
        zero: fp32 buffer to clear, if any.
        config: Tile sizes.
        descriptor: The weights' tensor descriptor where `config.tma`, else None.
    """
    S, topk = topk_ids.numel(), topk_ids.shape[1]
    parts = 2 if experts.gated else 1
    grid = (
        S if config.grid == "slots" else experts.E,
        triton.cdiv(experts.N * parts, config.block_n),
        config.splits_gate_up,
    )
    _moe_splitk_gate_up_kernel[grid](
        hidden_states, experts.gate_up, descriptor, experts.gate_up_scale, experts.gate_up_bias, topk_ids,
        inner, zero,
        S, experts.K, experts.N, experts.E, topk, 0 if zero is None else zero.numel(),
        ROWS=config.block_n, BLOCK_M=config.block_m, BLOCK_K=config.block_k, EVEN_K=experts.K % config.block_k == 0,
        SPLITS=config.splits_gate_up, BY_SLOT=config.grid == "slots", TMA=config.tma, PDL=config.pdl,
        FP8=experts.dtype == "fp8", GATED=experts.gated, INTERLEAVED=experts.interleaved,
        HAS_BIAS=experts.gate_up_bias is not None, ACTIVATION=experts.activation, **config.launch,
    )  # fmt: skip
