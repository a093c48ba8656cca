"""Tile sizes of the persistent kernel, and which are worth measuring for a problem."""

import functools
import math
from typing import Final, Literal

import pydantic

from moe_dispatch.backend import BackendConfig
from moe_dispatch.backends.stages.combine import rows_dtype
from moe_dispatch.backends.triton_common.features import Features
from moe_dispatch.backends.triton_common.quantization import quantization_of
from moe_dispatch.problem import QUANT_BLOCK, MoEProblem, stored_bytes
from moe_dispatch.workloads import torch_dtype

Order = Literal["grouped", "row_major"]


class TritonPersistentConfig(BackendConfig):
    """Tiles of both products and the order in which they are computed.

    Attributes:
        block_m: Rows of a tile.
        block_n: Columns of a tile of gate and of up, each; 64 or 128 for FP8.
        down_block_n: Columns of a tile of the second product.
        block_k: Depth of one step of the product's loop. Block FP8 always takes 128, the width of a block of scales.
        num_warps: Warps of a program.
        num_stages: Steps whose operands are in flight.
        ctas_per_sm: Programs of the wave on each streaming multiprocessor.
        flatten_steps: A product of at most so many steps of block_k fetches the next tile's operands while a tile's
            result is stored: its loops are one. Longer ones have little to gain, and lose a stage's memory.
        order: ``"row_major"`` computes all columns of a row block before the next row block, ``"grouped"`` a column
            block for `group_m` row blocks before the next column block.
        group_m: Row blocks of a group.
        tma: Load weights through tensor descriptors where the layout allows.
        pdl: Programmatic dependent launch: each kernel is launched while the one before it drains.
    """

    block_m: int = pydantic.Field(default=64, ge=16, le=256)
    block_n: int = pydantic.Field(default=64, ge=16, le=128)
    down_block_n: int = pydantic.Field(default=128, ge=16, le=256)
    block_k: int = pydantic.Field(default=64, ge=16, le=256)
    num_warps: Literal[4, 8] = 4
    num_stages: int = pydantic.Field(default=3, ge=1, le=8)
    ctas_per_sm: int = pydantic.Field(default=1, ge=1, le=4)
    flatten_steps: int = pydantic.Field(default=0, ge=0)
    order: Order = "grouped"
    group_m: int = pydantic.Field(default=8, ge=1)
    tma: bool = False
    pdl: bool = False

    @pydantic.field_validator("block_m", "block_n", "down_block_n", "block_k")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(f"must be a power of two, got {value}")
        return value

    @property
    def label(self) -> str:
        """``64x64-128x64,w4,s3,c1,grouped8``: rows × gate columns - down columns × depth."""
        parts = [
            f"{self.block_m}x{self.block_n}-{self.down_block_n}x{self.block_k}",
            f"w{self.num_warps}",
            f"s{self.num_stages}",
            f"c{self.ctas_per_sm}",
            f"{self.order}{self.group_m}" if self.order == "grouped" else self.order,
        ]
        parts += [f"flat{self.flatten_steps}"] if self.flatten_steps else []
        return ",".join(parts + [name for name in ("tma", "pdl") if getattr(self, name)])

    def shared_memory(self, problem: MoEProblem, *, wgmma: bool = True) -> int:
        """An upper estimate in bytes of what a program takes: operands in flight and the epilogue's tile.

        Args:
            problem: Dtypes, and whether a tile has gate and up columns.
            wgmma: See `Features.wgmma`.
        """
        wide = max((2 if problem.gated else 1) * self.block_n, self.down_block_n)
        activations = self.block_m * quantization_of(problem).activation_bytes(problem.act_dtype)
        stage = activations * self.block_k + stored_bytes(problem.dtype, wide * self.block_k)
        # Without wgmma, which reads shared memory while it runs, the stage being multiplied is in registers; with MXFP4
        # too, whose values pass through shared memory from Triton 3.7 on.
        in_registers = not wgmma or problem.dtype == "mxfp4"
        stages = stage * (self.num_stages - 1 if in_registers else self.num_stages)
        stages += 2 * wide * self.block_k if problem.dtype == "mxfp4" else 0
        row_bytes = rows_dtype(torch_dtype(problem.act_dtype)).itemsize
        epilogue = self.block_m * max(2 * self.block_n, row_bytes * self.down_block_n)
        if not self.flatten_steps:
            return max(stages, epilogue) + _RESERVE
        # Beside the operands in flight. Four warps turn rows of 16 bits round a few at a time, FP32 rows at once, and
        # those of MXFP4 layers, too, from Triton 3.7 on.
        few = self.num_warps == 4 and row_bytes == 2 and problem.dtype != "mxfp4"
        return stages + (min(epilogue, 8192) if few else epilogue) + _RESERVE


# Bytes for barriers, reductions over experts, and per-row vectors that are kept in flight.
_RESERVE: Final = 2048
# Stages to try, the most first.
_STAGES: Final = (4, 3, 2)


def persistent_configs(problem: MoEProblem, features: Features) -> tuple[TritonPersistentConfig, ...]:
    """The configurations worth measuring, the default first: all fit in the device's shared memory.

    Others were dropped because none of 3400 measurements on an H200 had them first: wider tiles and columns first lose
    up to a quarter, larger groups and unflattened loops are within 1 % of the default.

    Returns:
        Nothing where no tile fits, see `least_shared_memory`.
    """
    return _of_layer(problem.layer, features, _heights(problem, features))[0]


def least_shared_memory(problem: MoEProblem, features: Features) -> int:
    """Bytes that one block needs for the smallest tiles that `persistent_configs` considers."""
    return _of_layer(problem.layer, features, _heights(problem, features))[1]


# Token counts ask for few different heights, and a new token count is planned while a model serves.
@functools.lru_cache(maxsize=1024)
def _of_layer(
    layer: MoEProblem, features: Features, heights: tuple[int, ...]
) -> tuple[tuple[TritonPersistentConfig, ...], int]:
    """The configurations with tiles of these heights that fit, and the bytes that the smallest of all need."""
    shapes = [_shape(height, layer, features) for height in heights]
    smallest = (shape.model_copy(update={"num_stages": _STAGES[-1]}) for shape in shapes)
    least = min(_needed(config, layer, features) for config in smallest)
    fitting = [config for shape in shapes if (config := _fit(shape, layer, features))]
    in_rows = [config.model_copy(update={"order": "row_major"}) for config in fitting[:1]]
    return tuple(dict.fromkeys((*fitting, *in_rows))), least


def _fit(
    shape: TritonPersistentConfig, problem: MoEProblem, features: Features
) -> TritonPersistentConfig | None:  # fmt: skip
    """The shape with as many programs on a multiprocessor as it asks for, else one, and as many stages as then fit."""
    for ctas in dict.fromkeys((shape.ctas_per_sm, 1)):
        for stages in _STAGES:
            config = shape.model_copy(update={"ctas_per_sm": ctas, "num_stages": stages})
            if _needed(config, problem, features) * ctas <= features.shared_memory:
                return config
    return None


def _needed(config: TritonPersistentConfig, problem: MoEProblem, features: Features) -> int:
    return config.shared_memory(problem, wgmma=features.wgmma)


def _heights(problem: MoEProblem, features: Features) -> tuple[int, ...]:
    """Heights of tiles for a problem's rows per expert, the likeliest to be fast first."""
    if features.wgmma and quantization_of(problem).scales == "block":
        return (64,)  # promotion takes the registers that a higher tile would need
    load = problem.expected_slots / max(min(problem.E, problem.expected_experts), 1.0)
    if not features.wgmma:
        return (16, 32) if load <= 12 else (32, 16, 64) if load <= 24 else (64, 32, 128)
    # Per-channel FP8 starts with the tiles of block FP8, as nothing was measured for it. Otherwise low tiles come first
    # while few experts have more than 64 rows, two standard deviations of a Poisson load (gpt-oss-120b on an H200: 1562
    # and 1688 µs at 45 rows, 1920 and 1712 at 64). With tcgen05 and alternating gate and up rows the epilogue of a high
    # tile spills 320 bytes a thread (Triton 3.8).
    if problem.dtype == "mxfp4":
        # The product is transposed: low tiles waste nothing. gpt-oss-120b with 8 rows an expert takes 759 µs with 16 in
        # a tile, 945 with 32, 1248 with 64; with 32 rows 1824, 1511 and 1394.
        return (16, 32, 64) if load <= 16 else (64, 32, 128)
    spills = features.tensor_cores == "tcgen05" and problem.interleaved
    low_first = problem.fp8 or spills or load + 2 * math.sqrt(load) <= 64
    return (64, 128) if low_first else (128, 64)


def _shape(height: int, problem: MoEProblem, features: Features) -> TritonPersistentConfig:
    """A tile of this height with the other options that go with it; `num_stages` is left to what fits."""
    common = {
        "block_m": height, "block_n": 64, "down_block_n": 128, "block_k": QUANT_BLOCK if problem.quantized else 64,
        "tma": features.tma, "pdl": features.pdl,
    }  # fmt: skip
    if features.wgmma:
        # Two programs on a multiprocessor: one multiplies while the other waits, promotes or stores. Fewer rows than
        # 64 cost no time: weights arrive slower than they are multiplied.
        ctas = 3 if problem.dtype == "mxfp4" and height < 64 else 2
        warps = 8 if problem.dtype == "mxfp4" and height > 64 else 4
        options = {"num_warps": warps, "ctas_per_sm": ctas, "flatten_steps": 16}
        return TritonPersistentConfig.model_validate(common | options)
    # mma.sync holds operands in registers too.
    return TritonPersistentConfig.model_validate(common | {"num_warps": 4 if height < 64 else 8})


def tma_fits(columns: int, element_bytes: int) -> bool:
    """Whether a row-major matrix can have a tensor descriptor: its rows start on 16 bytes."""
    return columns * element_bytes % 16 == 0
