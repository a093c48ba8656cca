"""Launches one of the two grouped products."""

import math
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from moe_dispatch.backends.stages.route import Routing
from moe_dispatch.backends.triton_common.descriptors import boxes_mix_gate_and_up
from moe_dispatch.backends.triton_common.features import Features
from moe_dispatch.backends.triton_common.launch_options import next_power_of_2, pdl_option
from moe_dispatch.backends.triton_common.quantization import Quantization
from moe_dispatch.backends.triton_persistent.config import TritonPersistentConfig, tma_fits
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.problem import QUANT_BLOCK


def product(
    experts: ExpertWeights,
    name: Literal["gate_up", "down"],
    quantization: Quantization,
    x: Tensor,
    x_scale: Tensor | None,
    routing: Routing,
    topk: int,
    y: Tensor,
    y_scale: Tensor | None,
    config: TritonPersistentConfig,
    features: Features,
    descriptor: Callable[..., Any],
) -> None:
    """Compute ``y = activation(x @ weightᵀ + bias)`` for every row that holds a slot, or without the activation.

    Args:
        experts: The layer.
        name: Which of its weights. The activation belongs to ``"gate_up"``.
        quantization: How they are multiplied.
        x: ``[rows, K]`` in the order of experts, or with `topk` ``[M, K]`` in the order of tokens; with MXFP4 weights
            as `order_columns` writes it.
        x_scale: fp32 multipliers of `x` where it is FP8 codes, ``[…, ⌈K/128⌉]`` or ``[…, 1]``.
        routing: From `route`, without padding between experts.
        topk: Experts per token if `x` is in the order of tokens, else 0.
        y: Written, ``[rows, N]``; with MXFP4 weights and an activation as `order_columns` would.
        y_scale: Written with multipliers where `y` is FP8 codes of block FP8, ``[rows, ⌈N/128⌉]``.
        config: Tiles.
        features: Of the device.
        descriptor: `TritonBackend._descriptor`: makes the tensor descriptor of a weight, or finds the one made before.
    """
    from moe_dispatch.backends.triton_persistent.product_kernel import _moe_product_kernel

    first = name == "gate_up"
    N, K = (experts.N, experts.K) if first else (experts.K, experts.N)
    block_n = config.block_n if first else config.down_block_n
    block_k = QUANT_BLOCK if quantization.scales == "block" else config.block_k
    halves = 2 if first and experts.gated else 1
    interleaved = first and experts.interleaved
    # Rows of gate and of up take turns in a tile's operand, half a tile at a time: each of two warp groups then has
    # gate and up of the same columns.
    run = block_n // 2 if halves == 2 and not interleaved else 1
    if quantization.scales == "mx" and halves == 2:
        run = 8  # one thread of a transposed product has rows that are 8 apart
    weight: Tensor = getattr(experts, name)
    transposed = experts.transposed
    fits = tma_fits(halves * N if transposed else weight.shape[2], weight.element_size()) and N % run == 0
    tma = config.tma and features.tma and fits and (not first or boxes_mix_gate_and_up(experts))
    pdl = config.pdl and features.pdl
    # Where a group of quantised columns is two tiles, each has a loop over K, which Triton does not flatten into one.
    two_tiles = y_scale is not None and block_n < QUANT_BLOCK
    # A tile's operand, or each half of it, lies in one 128×128 block of weights, and so has one multiplier a step.
    in_one_block = interleaved or halves == 1 or N % QUANT_BLOCK == 0
    scalar = in_one_block and block_n * (2 if interleaved else 1) <= QUANT_BLOCK
    # The weight seen as [E, N / run, halves, run, K], or by columns as [E, K, halves·N]: a box is a tile's operand.
    shape: tuple[int, ...]
    swapped: tuple[int, int] | None = None
    box: tuple[int, ...] = (1, block_n // run, halves, run, block_k)
    if transposed:
        shape, box = (experts.E, K, halves * N), (1, block_k, halves * block_n)
    elif run == 1:
        shape = (experts.E, N, halves, 1, K)
    elif interleaved:
        shape, swapped = (experts.E, N // run, run, halves, K), (2, 3)
    else:
        shape, swapped = (experts.E, halves, N // run, run, K), (1, 2)
    _moe_product_kernel[(features.sms * config.ctas_per_sm,)](
        # inputs
        x, x_scale,
        descriptor(experts, name, shape, box, swapped) if tma else quantization.readable(weight),
        getattr(experts, f"{name}_scale"), getattr(experts, f"{name}_bias"),
        routing.slot_of_row if topk else None, routing.starts, routing.ends,
        # outputs
        y, y_scale,
        # shapes
        N, K, experts.E,
        # constants
        TOPK=topk, ACTIVATION=experts.activation if first else None, HALVES=halves, RUN=run,
        INTERLEAVED=interleaved, TRANSPOSED=transposed, SCALES=quantization.scales, SCALAR_SCALE=scalar,
        EVEN_K=K % block_k == 0, TMA=tma,
        BLOCK_M=config.block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        ORDER=config.order, GROUP_M=config.group_m, E_POW2=next_power_of_2(experts.E),
        FLATTEN=not two_tiles and math.ceil(K / block_k) <= config.flatten_steps, PDL=pdl,
        num_warps=config.num_warps, num_stages=config.num_stages, **pdl_option(pdl), **_registers(config, quantization),
    )  # fmt: skip


def _registers(config: TritonPersistentConfig, quantization: Quantization) -> dict[str, int]:
    """With MXFP4 weights, a limit that lets as many programs run on a multiprocessor as are launched."""
    share = 65536 // (32 * config.num_warps * config.ctas_per_sm)
    return {"maxnreg": share} if quantization.scales == "mx" and share < 255 else {}
