"""The two grouped products on Hopper, by the warp-specialised kernels of `hopper_kernel`.

Imports no Triton until it launches, so that a machine without it can still ask.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from moe_dispatch.backends.stages.quantize import empty_scales, gather, gather_quantize
from moe_dispatch.backends.stages.route import Routing
from moe_dispatch.backends.triton_persistent.config import TritonPersistentConfig
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine
from moe_dispatch.numerics import FP8
from moe_dispatch.problem import ELEMENT_BYTES, MoEProblem

_LEAST_TRITON: Final = (3, 6)  # of the Gluon that the kernels are written in
_BLOCK_M: Final = 128
# Left-over rows that join a block, and how many blocks of an expert may be so much taller.
_TAIL_M: Final = 32
_TALLER: Final = 1
_FP8_TAIL_M: Final = 16
_FP8_TALLER: Final = 2
_STAGE_BYTES: Final = 128  # of a row
WINDOW: Final = 64  # rows that TMA reads at once, and memory before the first row, see `_windows`
_LAUNCH: Final = {"STAGES": 4, "num_warps": 4, "maxnreg": 168, "launch_pdl": True}
# Gathering in the loader costs the first product a twelfth of its time; a pass that permutes the rows before it costs
# a share that falls with N. In FP8 it costs half as much, and always pays: rows are quantised on the way.
_PERMUTED_FROM_N: Final = 4096
# Rows per expert from which these kernels are the default: below, tiles of 64 rows on two programs are ahead. In FP8
# those hide epilogues better, which counts where loops are short: with N of 768 to 1536 they are ahead by 1 to 3 %
# at 32 to 48 rows. At deepseek-v3 (2048) these kernels are, by 3 % at 4 rows and 12 % at 32.
_FEW_ROWS: Final = 16
_FEW_FP8_ROWS: Final = 56
_FEW_FP8_ROWS_LONG: Final = 2
_LONG_N: Final = 2048


def hopper_configs(problem: MoEProblem, machine: Machine) -> tuple[TritonPersistentConfig, ...]:
    """The configurations of these kernels that are worth measuring; none where they cannot run."""
    takes = (
        machine.capability == (9, 0)
        and _version(machine.triton) >= _LEAST_TRITON
        and problem.dtype in _FITS
        and _FITS[problem.dtype](problem)
        and problem.gated
        and not problem.interleaved
        and not problem.bias
    )
    if not takes:
        return ()
    depth = _STAGE_BYTES // ELEMENT_BYTES[problem.dtype]
    return (TritonPersistentConfig(engine="gluon", block_k=depth, tma=True, pdl=True),)


# The loader gathers whole blocks of hidden_states' columns, and TMA needs rows that start on 16 bytes. Tiles of FP8
# are whole blocks of scales.
_FITS: Final[dict[str, Callable[[MoEProblem], bool]]] = {
    "bf16": lambda problem: problem.K % 64 == 0 and problem.N % 8 == 0,
    "fp16": lambda problem: problem.K % 64 == 0 and problem.N % 8 == 0,
    "fp8": lambda problem: problem.K % 256 == 0 and problem.N % 128 == 0,
}


def hopper_suits(problem: MoEProblem) -> bool:
    """Whether these kernels are the likeliest to be fastest, where they can run."""
    fp8_rows = _FEW_FP8_ROWS_LONG if problem.N >= _LONG_N else _FEW_FP8_ROWS
    few = fp8_rows if problem.dtype == "fp8" else _FEW_ROWS
    return problem.slots >= few * problem.expected_experts


def hopper_permutes(N: int, *, fp8: bool) -> bool:
    """Whether rows are brought into the order of experts before the first product, instead of by its loader."""
    return fp8 or N >= _PERMUTED_FROM_N


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


@functools.cache
def hopper_kernels_load() -> bool:
    """Whether this Triton's Gluon has what the kernels import: it is experimental, and changes."""
    try:
        from moe_dispatch.backends.gluon_hopper import fp8_product_kernel, product_kernel  # noqa: F401
    except (ImportError, AttributeError):
        return False
    return True


def hopper_products(
    hidden_states: Tensor,
    experts: ExpertWeights,
    routing: Routing,
    topk: int,
    config: TritonPersistentConfig,
    sms: int,
) -> Tensor:
    """Compute activation(x @ gate_upᵀ) @ downᵀ for every row that holds a slot.

    Args:
        hidden_states: ``[M, K]``, BF16 or FP16.
        experts: Weights in the same dtype or block FP8, gate rows first, without biases.
        routing: From `route`, without padding between experts.
        topk: Experts per token.
        config: One of `hopper_configs`.
        sms: Streaming multiprocessors: one program runs on each.

    Returns:
        ``[rows, K]`` in hidden_states' dtype.
    """
    if experts.dtype == "fp8":
        return _fp8_products(hidden_states, experts, routing, topk, config, sms)
    from moe_dispatch.backends.gluon_hopper.product_kernel import _moe_hopper_kernel

    N, K, rows = experts.N, experts.K, routing.slot_of_row.shape[0]
    permuted = hopper_permutes(N, fp8=False)
    depth = _STAGE_BYTES // experts.gate_up.element_size()
    blocks, counts = _row_blocks(routing, config.group_m, fp8=False)
    upper, tail = hidden_states, None
    if permuted:
        x = gather(hidden_states, routing, topk, out=_rows_after_window(hidden_states, rows, K), pdl=True)
        upper, tail = _windows(x, 64), _windows(x, _TAIL_M)
    h = _rows_after_window(hidden_states, rows, N)
    y = hidden_states.new_empty(rows, K)
    gate_up = _weight_rows(experts.gate_up)
    down = _weight_rows(experts.down)
    # Column blocks; rows of an expert's weights, from the first half of a tile to the second, from a tile to the next;
    # blocks summed over; columns in and out.
    up_shapes = math.ceil(N / 128), 2 * N, N, 128, K // depth, K, N
    down_shapes = math.ceil(K / 256), K, 128, 256, math.ceil(N / depth), N, K
    slots, up_topk = (None, 0) if permuted else (routing.slot_of_row, topk)
    _moe_hopper_kernel[(sms,)](
        upper, tail, gate_up, slots, blocks, counts, h, *up_shapes,
        COUNTER=1, TOPK=up_topk, ACTIVATION=experts.activation, **_LAUNCH,
    )  # fmt: skip
    _moe_hopper_kernel[(sms,)](
        _windows(h, 64), _windows(h, _TAIL_M), down, None, blocks, counts, y, *down_shapes,
        COUNTER=2, TOPK=0, ACTIVATION=None, **_LAUNCH,
    )  # fmt: skip
    return y


def _fp8_products(
    hidden_states: Tensor,
    experts: ExpertWeights,
    routing: Routing,
    topk: int,
    config: TritonPersistentConfig,
    sms: int,
) -> Tensor:
    """`hopper_products` in block FP8."""
    from moe_dispatch.backends.gluon_hopper.fp8_product_kernel import _moe_hopper_fp8_kernel

    N, K, rows = experts.N, experts.K, routing.slot_of_row.shape[0]
    blocks, counts = _row_blocks(routing, config.group_m, fp8=True)
    codes = _rows_after_window(hidden_states, rows, K, FP8)
    x, x_scale = gather_quantize(hidden_states, routing, topk, out=codes, pdl=True)
    h = _rows_after_window(hidden_states, rows, N, FP8)
    # A tile's rows write and read the multipliers of one block of columns.
    h_scale = empty_scales(rows, N, x.device, column_major=True)
    y = hidden_states.new_empty(rows, K)
    # Shapes as above, without columns in.
    _moe_hopper_fp8_kernel[(sms,)](
        # inputs
        _windows(x, 64), _windows(x, _FP8_TAIL_M), x_scale, *x_scale.stride(),
        _weight_rows(experts.gate_up), experts.gate_up_scale, blocks, counts,
        # outputs
        h, h_scale, *h_scale.stride(),
        # shapes
        N // 128, 2 * N, N, 128, K // 128, N,
        # constants
        COUNTER=1, ACTIVATION=experts.activation, **_LAUNCH,
    )  # fmt: skip
    _moe_hopper_fp8_kernel[(sms,)](
        # inputs
        _windows(h, 64), _windows(h, _FP8_TAIL_M), h_scale, *h_scale.stride(),
        _weight_rows(experts.down), experts.down_scale, blocks, counts,
        # outputs
        y, None, 0, 0,
        # shapes
        K // 256, K, 128, 256, N // 128, K,
        # constants
        COUNTER=2, ACTIVATION=None, **_LAUNCH,
    )  # fmt: skip
    return y


def _row_blocks(routing: Routing, group_m: int, *, fp8: bool) -> tuple[Tensor, Tensor]:
    """Cut every expert's rows into blocks of 128, or some more where that spares a block.

    Up to `group_m` blocks are a group, all of one expert, whose tiles are multiplied at about the same time.

    Returns:
        int32 ``[blocks, 5]``: expert, first row and end of each block, first block of its group and how many that has;
        and int32 ``[3]``: how many there are, and two zeros from which the schedulers of the two products count.
    """
    from moe_dispatch.backends.gluon_hopper.common import _moe_row_blocks_kernel

    E, slots = routing.starts.shape[0], routing.slot_of_row.shape[0]
    blocks = routing.starts.new_empty(math.ceil(slots / _BLOCK_M) + min(E, slots), 5)
    counts = routing.starts.new_empty(3)
    _moe_row_blocks_kernel[(E,)](
        # inputs
        routing.starts, routing.ends,
        # outputs
        blocks, counts,
        # shapes
        E,
        # constants
        BLOCK_M=_BLOCK_M, TAIL_M=_FP8_TAIL_M if fp8 else _TAIL_M, TALLER=_FP8_TALLER if fp8 else _TALLER,
        GROUP_M=group_m, E_POW2=1 << (E - 1).bit_length(), num_warps=1, launch_pdl=True,
    )  # fmt: skip
    return blocks, counts


def _rows_after_window(like: Tensor, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
    """Fresh memory ``[rows, columns]`` for `_windows`, which begin one window before it."""
    return like.new_empty(WINDOW + rows, columns, dtype=dtype)[WINDOW:]


def _windows(matrix: Tensor, rows: int) -> Any:
    """The tensor descriptor of a matrix, seen as all its runs of 64 successive rows, read in blocks of `rows` rows.

    Element ``[b, r, c]`` of the tensor that it describes is column c of row ``b - 64 + r``, where r is less than 64. So
    the tensor can be made to end at any row, b, and TMA itself fills in zeros for what lies beyond.

    Args:
        matrix: From `_rows_after_window`.
        rows: At most 64.
    """
    count, columns = matrix.shape
    start = matrix.storage_offset() - WINDOW * columns
    windows = matrix.as_strided((count + 1, WINDOW, columns), (columns, columns, 1), start)
    return _tma_descriptor(windows, [1, rows])


def _weight_rows(weights: Tensor) -> Any:
    """The tensor descriptor of ``[E, rows, columns]``, the experts' rows one after the other, in blocks of 128."""
    return _tma_descriptor(weights.view(-1, weights.shape[2]), [128])


def _tma_descriptor(tensor: Tensor, rows: list[int]) -> Any:
    """Blocks of `rows` and 128 bytes of columns."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [*rows, _STAGE_BYTES // tensor.element_size()]
    return TensorDescriptor.from_tensor(tensor, block, _layout(tensor.dtype, tuple(block)))


@functools.cache
def _layout(dtype: torch.dtype, block: tuple[int, ...]) -> Any:
    from triton.experimental.gluon import language as gl

    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, FP8: gl.float8e4nv}[dtype]
    return gl.NVMMASharedLayout.get_default_for(list(block), element)
