"""Launches the two grouped products on Hopper.

Imports no Triton until it launches, so that a machine without it can still ask.
"""

import math
from typing import Final

import torch
from torch import Tensor

from moe_dispatch.arrived_rows import TravellingRows
from moe_dispatch.backends.gluon_hopper.row_blocks import row_blocks
from moe_dispatch.backends.gluon_hopper.tiles import (
    BLOCK_M,
    FP8_TAIL_M,
    MAX_REGISTERS,
    MXFP4_BLOCK_K,
    MXFP4_LOW_BLOCK_M,
    MXFP4_LOW_ROWS,
    MXFP4_STAGES,
    STAGE_BYTES,
    STAGES,
    TAIL_M,
    WINDOW_ROWS,
    permutes_rows,
)
from moe_dispatch.backends.gluon_hopper.windows import ExpertCodes, ExpertRows, Windows, with_window
from moe_dispatch.backends.stages.order_columns import order_columns, ordered_width
from moe_dispatch.backends.stages.quantize import empty_scales, gather, gather_quantize
from moe_dispatch.backends.stages.route import Routing
from moe_dispatch.backends.triton_common.descriptors import Descriptors
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.numerics import FP8, QuantizedRows

_LAUNCH: Final = {"STAGES": STAGES, "num_warps": 4, "maxnreg": MAX_REGISTERS, "launch_pdl": True}


def hopper_products(
    hidden_states: Tensor | QuantizedRows | TravellingRows, experts: ExpertWeights, routing: Routing, topk: int,
    group_m: int, sms: int, descriptors: Descriptors,
) -> Tensor:  # fmt: skip
    """Compute activation(x @ gate_upᵀ) @ downᵀ for every row that holds a slot.

    Args:
        hidden_states: ``[M, K]``, BF16, on 16 bytes unless `permutes_rows`; with block FP8 also quantised.
        experts: Weights in the same dtype or block FP8.
        routing: From `route`, without padding between experts.
        topk: Experts per token.
        group_m: See `GluonHopperConfig`.
        sms: Streaming multiprocessors: one program runs on each.
        descriptors: Keeps tensor descriptors from call to call.

    Returns:
        ``[rows, K]`` in hidden_states' dtype; BF16 with block FP8.
    """
    if experts.dtype == "fp8":
        return _fp8_products(hidden_states, experts, routing, topk, group_m, sms, descriptors)
    if experts.dtype == "mxfp4":
        return _mxfp4_products(hidden_states, experts, routing, topk, group_m, sms, descriptors)
    from moe_dispatch.backends.gluon_hopper.product_kernel import _moe_hopper_product_kernel

    N, K, rows = experts.N, experts.K, routing.slot_of_row.shape[0]
    block_k = STAGE_BYTES // experts.gate_up.element_size()
    blocks, counts = row_blocks(routing, group_m, fp8=False)
    hidden_states, pdl = _arrived(hidden_states)
    if permutes_rows(experts.dtype, N):
        window, x = with_window(hidden_states, rows, K)
        gather(hidden_states, routing, topk, out=x, pdl=pdl)
        rows_of_x, tails_of_x = descriptors.get(window, Windows(WINDOW_ROWS)), descriptors.get(window, Windows(TAIL_M))
        slot_of_row, topk = None, 0
    else:
        rows_of_x, tails_of_x, slot_of_row = hidden_states, None, routing.slot_of_row
    window, h = with_window(hidden_states, rows, N)
    _moe_hopper_product_kernel[(sms,)](
        # inputs
        rows_of_x, tails_of_x, descriptors.get(experts.gate_up, _expert_rows(experts)),
        experts.gate_up_bias, slot_of_row, blocks, counts,
        # outputs
        h,
        # shapes: column blocks; see `TileStrides`; blocks of K; columns in and out
        math.ceil(N / 128), *_gate_up_strides(experts), K // block_k, K, N,
        # constants
        COUNTER=1, TOPK=topk, ACTIVATION=experts.activation, INTERLEAVED=experts.interleaved,
        TRANSPOSED=experts.transposed, **{**_LAUNCH, "launch_pdl": pdl},
    )  # fmt: skip
    y = hidden_states.new_empty(rows, K)
    _moe_hopper_product_kernel[(sms,)](
        # inputs
        descriptors.get(window, Windows(WINDOW_ROWS)), descriptors.get(window, Windows(TAIL_M)),
        descriptors.get(experts.down, ExpertRows("columns" if experts.transposed else "rows")),
        experts.down_bias, None, blocks, counts,
        # outputs
        y,
        # shapes
        math.ceil(K / 256), 0 if experts.transposed else K, 128, 256, math.ceil(N / block_k), N, K,
        # constants
        COUNTER=2, TOPK=0, ACTIVATION=None, INTERLEAVED=False, TRANSPOSED=experts.transposed, **_LAUNCH,
    )  # fmt: skip
    return y


def _fp8_products(
    hidden_states: Tensor | QuantizedRows | TravellingRows, experts: ExpertWeights, routing: Routing, topk: int,
    group_m: int, sms: int, descriptors: Descriptors,
) -> Tensor:  # fmt: skip
    """`hopper_products` in block FP8."""
    from moe_dispatch.backends.gluon_hopper.fp8_product_kernel import _moe_hopper_fp8_product_kernel

    N, K, rows = experts.N, experts.K, routing.slot_of_row.shape[0]
    blocks, counts = row_blocks(routing, group_m, fp8=True)
    x_window, x = with_window(routing.starts, rows, K, FP8)
    _, x_scale = gather_quantize(hidden_states, routing, topk, out=x, pdl=True)
    h_window, h = with_window(x, rows, N)
    # A tile's rows write and read the multipliers of one block of columns.
    h_scale = empty_scales(rows, N, x, column_major=True)
    _moe_hopper_fp8_product_kernel[(sms,)](
        # inputs
        descriptors.get(x_window, Windows(WINDOW_ROWS)), descriptors.get(x_window, Windows(FP8_TAIL_M)), x_scale,
        *x_scale.stride(),
        descriptors.get(experts.gate_up, _expert_rows(experts)), experts.gate_up_scale,
        experts.gate_up_bias, blocks, counts,
        # outputs
        h, h_scale, *h_scale.stride(),
        # shapes: as above, without columns in
        N // 128, *_gate_up_strides(experts), K // 128, N,
        # constants
        COUNTER=1, ACTIVATION=experts.activation, INTERLEAVED=experts.interleaved, **_LAUNCH,
    )  # fmt: skip
    y = x.new_empty(rows, K, dtype=torch.bfloat16)
    _moe_hopper_fp8_product_kernel[(sms,)](
        # inputs
        descriptors.get(h_window, Windows(WINDOW_ROWS)), descriptors.get(h_window, Windows(FP8_TAIL_M)), h_scale,
        *h_scale.stride(),
        descriptors.get(experts.down, ExpertRows("rows")), experts.down_scale, experts.down_bias, blocks, counts,
        # outputs
        y, None, 0, 0,
        # shapes
        K // 256, K, 128, 256, N // 128, K,
        # constants
        COUNTER=2, ACTIVATION=None, INTERLEAVED=False, **_LAUNCH,
    )  # fmt: skip
    return y


def _mxfp4_products(
    hidden_states: Tensor | QuantizedRows | TravellingRows, experts: ExpertWeights, routing: Routing, topk: int,
    group_m: int, sms: int, descriptors: Descriptors,
) -> Tensor:  # fmt: skip
    """`hopper_products` of MXFP4 weights."""
    from moe_dispatch.backends.gluon_hopper.mxfp4_product_kernel import _moe_hopper_mxfp4_product_kernel

    N, K, rows = experts.N, experts.K, routing.slot_of_row.shape[0]
    low = routing.row_of_slot.shape[0] <= MXFP4_LOW_ROWS * (experts.routed_experts or experts.E)
    block_m = MXFP4_LOW_BLOCK_M if low else BLOCK_M
    blocks, counts = row_blocks(routing, group_m, fp8=False, block_m=block_m)
    hidden_states, pdl = _arrived(hidden_states)
    (x_window, x), (h_window, h) = (
        with_window(hidden_states, rows, ordered_width(columns, MXFP4_BLOCK_K)) for columns in (K, N)
    )
    order_columns(hidden_states, MXFP4_BLOCK_K, by_threads=True, routing=routing, topk=topk, out=x, pdl=pdl)
    codes = descriptors.get(experts.gate_up, ExpertCodes("pairs" if experts.interleaved else "rows"))
    down = descriptors.get(experts.down, ExpertCodes("plain"))
    y = hidden_states.new_empty(rows, K)
    products = (
        (x_window, codes, experts.gate_up_scale, experts.gate_up_bias, h, N, K, math.ceil(N / 128), experts.activation),
        (h_window, down, experts.down_scale, experts.down_bias, y, K, N, math.ceil(K / 256), None),
    )
    for counter, (window, codes, exponents, biases, out, columns, depth, n_blocks, activation) in enumerate(
        products, 1
    ):
        _moe_hopper_mxfp4_product_kernel[(sms,)](
            # inputs
            descriptors.get(window, Windows(WINDOW_ROWS)), descriptors.get(window, Windows(TAIL_M)), codes, exponents,
            biases, blocks, counts,
            # outputs
            out,
            # shapes
            n_blocks, columns, depth, out.shape[1],
            # constants
            COUNTER=counter, ACTIVATION=activation, INTERLEAVED=experts.interleaved, BLOCK_M=block_m,
            **{**_LAUNCH, "STAGES": MXFP4_STAGES[block_m]},
        )  # fmt: skip
    return y


def _arrived(rows: Tensor | QuantizedRows | TravellingRows) -> tuple[Tensor, bool]:
    """The rows, and whether what reads them may be a programmatic dependent: not if it waits for another stream."""
    here = rows.wait() if isinstance(rows, TravellingRows) else rows
    assert not isinstance(here, QuantizedRows)  # noqa: S101 - those are for block FP8
    return here, here is rows


def _expert_rows(experts: ExpertWeights) -> ExpertRows:
    return ExpertRows("columns" if experts.transposed else "pairs" if experts.interleaved else "rows")


def _gate_up_strides(experts: ExpertWeights) -> tuple[int, int, int]:
    """`TileStrides` of gate_up: its rows or pairs of an expert, from half to half of a tile, and from tile to tile."""
    if experts.transposed:
        return (0, 128, 256) if experts.interleaved else (0, experts.N, 128)
    return (experts.N, 64, 128) if experts.interleaved else (2 * experts.N, experts.N, 128)
