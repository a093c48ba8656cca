"""Tile sizes of the vector kernels, and which of them a problem should try."""

import functools
from typing import Final, Literal

from moe_dispatch.backend import BackendConfig
from moe_dispatch.backends.triton_common.features import Features
from moe_dispatch.backends.triton_common.launch_options import next_power_of_2
from moe_dispatch.problem import ELEMENT_BYTES, QUANT_BLOCK, MoEProblem

# Limits of the default tiles. Device of all evidence: one H200 (sm_90), Triton 3.6, whole layers under CUDA graphs, µs
# at M=1, 2 and 4. Tiles are rows × columns (× experts) / warps. olmoe has E=64, topk=8, K=2048, N=1024, and qwen3-next
# E=512, topk=10, K=2048, N=512.
#
# constant                           unit            evidence
_CHUNK: Final = 32 << 10  #            bytes           that a CTA of down has in flight (docs/lab-notebook.md)
_BYTES_PER_THREAD: Final = 256  #      bytes           of down in flight, where no block follows. qwen3-30b-a3b in FP8
#                                                      2×1024×8/2 14.7, 24.5, 42.0, /4 15.2, 25.9, 46.1
_WARPS: Final = 4  #                   warps           down in FP8: olmoe 4×1024×8/4 16.3, 28.5, 47.0, /8 17.9, 29.0,
#                                                      49.5. gate_up is as fast with 2 in FP8 and 8 in BF16
_ROWS: Final = 8  #                    weight rows     gate_up of olmoe in FP8, rows×2048/4: 8 16.3, 28.5, 47.0, 4 17.1,
#                                                      30.7, 53.5, 16 16.4, 28.4, 46.8; in BF16 within .5 %
_MOST_EXPERTS: Final = 8  #            experts         of a token at once; fewer where 8 does not divide topk:
#                                                      qwen3-next in FP8 8×512×2/4 15.3, 21.8, 39.6, 4×512×8/4 16.7,
#                                                      29.6, 54.8
_ROWS_OF_CHUNKS: Final = 2  #          weight rows     of down where columns past N are left out. qwen3-30b-a3b in FP8
#                                                      2×1024×8/4 12.7, 21.6, 36.6, 4×1024×8/4 13.2, 21.9, 37.6; in
#                                                      BF16 21.2, 36.1, 62.2 and 20.4, 36.4, 62.7: there twice as many
#                                                      for one token
_MOST_COLUMNS: Final = 8192  #         columns         of all experts at once; where they are more, of one expert
_WHOLE_ROW: Final = 2048  #            columns         longer rows are read in parts
_PART_OF_ROW: Final = 512  #           columns
_PART_OF_DOWN_ROW: Final = 1024  #     columns
_FP8_ROWS_OF_PARTS: Final = 4  #       weight rows     kimi-k2-tp8 in FP8 at M=1: 21.9; 25.1 with 8 rows
_WARPS_OF_PARTS: Final = 2  #          warps


class TritonVectorConfig(BackendConfig):
    """Options of the vector kernels.

    Attributes:
        rows: Weight rows of a CTA of gate_up, gate and up rows together.
        columns: Columns of K that it has in flight.
        warps: Warps of such a CTA.
        down_rows: Output columns of a CTA of down.
        down_columns: Columns of N that it has in flight for each expert.
        down_experts: Experts of a token whose weights it has in flight at once.
        down_warps: Warps of such a CTA.
        pdl: Programmatic dependent launch (sm_90 and newer).
    """

    rows: Literal[2, 4, 8, 16, 32] = 8
    columns: Literal[128, 256, 512, 1024, 2048] = 1024
    warps: Literal[1, 2, 4, 8] = 4
    down_rows: Literal[1, 2, 4, 8, 16, 32] = 8
    down_columns: Literal[128, 256, 512, 1024, 2048] = 1024
    down_experts: Literal[1, 2, 4, 8] = 1
    down_warps: Literal[1, 2, 4, 8] = 4
    pdl: bool = False


def default_config(problem: MoEProblem, device: Features) -> TritonVectorConfig:
    """Whole rows where they are short enough to be in flight at once, and several experts of a token with them."""
    return _of_layer(problem.layer, device, one_token=problem.M == 1)


@functools.lru_cache(maxsize=1024)
def _of_layer(problem: MoEProblem, device: Features, *, one_token: bool) -> TritonVectorConfig:
    columns, down_columns = (max(QUANT_BLOCK, next_power_of_2(length)) for length in (problem.K, problem.N))
    experts = min(_MOST_EXPERTS, problem.topk & -problem.topk)  # the greatest power of two that divides topk
    # Where a CTA takes turns, the next experts' weights are on their way while these are multiplied.
    turns = experts < problem.topk
    row = experts * down_columns * ELEMENT_BYTES[problem.dtype]
    down_rows = max(1, min(_ROWS, _CHUNK // (2 * row if turns else row)))
    down_warps = _WARPS if turns else max(1, min(_WARPS, down_rows * row // (32 * _BYTES_PER_THREAD)))
    whole = columns <= _WHOLE_ROW
    together = experts * down_columns <= _MOST_COLUMNS and down_columns <= _WHOLE_ROW
    if not turns and down_columns > problem.N:
        down_rows = min(_ROWS_OF_CHUNKS, down_rows) * (2 if one_token and not problem.fp8 else 1)
    return TritonVectorConfig.model_validate({
        "rows": _ROWS if whole or not problem.fp8 else _FP8_ROWS_OF_PARTS,
        "columns": columns if whole else _PART_OF_ROW,
        "warps": _WARPS if whole else _WARPS_OF_PARTS,
        "down_rows": down_rows if together else _ROWS,
        "down_columns": down_columns if together else _PART_OF_DOWN_ROW,
        "down_experts": experts if together else 1,
        "down_warps": down_warps if together else _WARPS_OF_PARTS,
        "pdl": device.pdl,
    })  # fmt: skip


def candidate_configs(problem: MoEProblem, device: Features) -> tuple[TritonVectorConfig, ...]:
    """The default, then one with other CTAs of gate_up: larger where it reads whole rows, smaller where parts of them.

    Where columns past N are left out, one with twice or half the rows of down, too.

    With 16 rows olmoe in FP8 takes 79.9 µs at M=8 and 82.6 with 8; qwen3-30b-a3b in BF16 takes 21.5 and 21.7 at M=1.
    """
    default = default_config(problem, device)
    parts = default.columns < problem.K
    warps = _WARPS if problem.fp8 else 2 * _WARPS
    other = {"rows": 4, "warps": _WARPS_OF_PARTS} if parts else {"rows": 2 * _ROWS, "warps": warps}
    down_rows = {"down_rows": default.down_rows // 2 if default.down_rows > _ROWS_OF_CHUNKS else 2 * default.down_rows}
    chunks = problem.topk <= default.down_experts and default.down_columns > problem.N
    others = (other, down_rows, other | down_rows) if chunks else (other,)
    return tuple(dict.fromkeys((default, *(default.model_copy(update=update) for update in others))))


def shared_memory_bytes(config: TritonVectorConfig) -> int:
    """An upper bound of what one CTA of either product takes; a compile test holds it to that."""
    # An operand is exchanged between threads, in fp32; gate and up may differ in their scales.
    return 4 * max(2 * config.columns, config.down_columns * config.down_experts)
