"""Tile sizes of the vector kernels, and which of them a problem should try."""

from typing import Final, Literal

from moe_dispatch.backend import BackendConfig
from moe_dispatch.backends.triton_common.features import Features
from moe_dispatch.backends.triton_common.launch_options import next_power_of_2
from moe_dispatch.problem import ELEMENT_BYTES, QUANT_BLOCK, MoEProblem

# Limits of the default tiles. Device of all evidence: one H200 (sm_90), Triton 3.6, whole layers under CUDA graphs. The
# limits without a figure were tuned together: qwen3-30b-a3b in BF16 at M=1 takes 21.9 µs with them, and 31.9 by tensor
# cores.
#
# constant                           unit            evidence
_CHUNK: Final = 16 << 10  #            weights         that a CTA has in flight
_BYTES_PER_THREAD: Final = 256  #      bytes           of weights in flight for each thread where whole rows are
_WHOLE_ROW: Final = 2048  #            columns         longer rows are read in parts
_PART_OF_ROW: Final = 512  #           columns
_PART_OF_DOWN_ROW: Final = 1024  #     columns
_ROWS: Final = 8  #                    weight rows
_FP8_ROWS_OF_PARTS: Final = 4  #       weight rows     kimi-k2-tp8 in FP8 at M=1: 21.9 µs; 25.1 with 8 rows
_MOST_WARPS: Final = 8
_WARPS_OF_PARTS: Final = 2
_MOST_EXPERTS: Final = 8


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
    """Whole rows where they are short enough to be in flight at once, and all experts of a token with them."""
    columns, down_columns = (max(QUANT_BLOCK, next_power_of_2(length)) for length in (problem.K, problem.N))
    experts = min(_MOST_EXPERTS, next_power_of_2(problem.topk))
    down_rows = _CHUNK // (experts * down_columns)
    whole = columns <= _WHOLE_ROW
    together = down_rows >= 2 and down_columns <= _WHOLE_ROW
    warps = min(_MOST_WARPS, _CHUNK * ELEMENT_BYTES[problem.dtype] // (32 * _BYTES_PER_THREAD))
    return TritonVectorConfig.model_validate({
        "rows": _ROWS if whole or not problem.fp8 else _FP8_ROWS_OF_PARTS,
        "columns": columns if whole else _PART_OF_ROW,
        "warps": warps if whole else _WARPS_OF_PARTS,
        "down_rows": min(_ROWS, down_rows) if together else _ROWS,
        "down_columns": down_columns if together else _PART_OF_DOWN_ROW,
        "down_experts": experts if together else 1,
        "down_warps": warps if together else _WARPS_OF_PARTS,
        "pdl": device.pdl,
    })  # fmt: skip


def candidate_configs(problem: MoEProblem, device: Features) -> tuple[TritonVectorConfig, ...]:
    """The default, then one with smaller CTAs of gate_up."""
    default = default_config(problem, device)
    return tuple(dict.fromkeys((default, default.model_copy(update={"rows": 4, "warps": 2}))))


def shared_memory_bytes(config: TritonVectorConfig) -> int:
    """An upper bound of what one CTA of either product takes; a compile test holds it to that."""
    # An operand is exchanged between threads, in fp32; gate and up may differ in their scales.
    return 4 * max(2 * config.columns, config.down_columns * config.down_experts)
