"""Tile sizes of the persistent kernels, and which are worth measuring for a problem."""

from typing import Literal

import pydantic

from moe_dispatch.backend import BackendConfig
from moe_dispatch.problem import ELEMENT_BYTES, QUANT_BLOCK, MoEProblem

from ..triton_support import Features

Order = Literal["grouped", "column_major", "row_major"]


class TritonPersistentConfig(BackendConfig):
    """One choice for both products.

    Attributes:
        block_m: Rows of a tile.
        tail_m: Height of a second code path for an expert's last tile when it has no more rows than this; 0 for none.
        block_n: Columns of a tile of gate and of up, each; 128 for FP8.
        block_k: What is summed over at a time.
        down_block_n: Columns of a tile of the second product.
        down_block_k: What it sums over at a time.
        num_warps: Of a program.
        num_stages: Tiles in flight.
        ctas_per_sm: Programs of the wave per streaming multiprocessor.
        order: How tiles are walked.
        group_m: Row blocks that a group shares, for the grouped order.
        tma: Load weights through tensor descriptors where the layout allows.
        swap: Compute the transpose: weight rows on the wide side of the tensor core, tokens on its narrow side.
        pdl: Programmatic dependent launch: each kernel is launched while the one before it drains.
    """

    block_m: int = pydantic.Field(default=64, ge=16, le=256)
    tail_m: int = pydantic.Field(default=0, ge=0, le=128)
    block_n: int = pydantic.Field(default=128, ge=16, le=256)
    block_k: int = pydantic.Field(default=64, ge=16, le=256)
    down_block_n: int = pydantic.Field(default=128, ge=16, le=256)
    down_block_k: int = pydantic.Field(default=64, ge=16, le=256)
    num_warps: Literal[4, 8] = 4
    num_stages: int = pydantic.Field(default=3, ge=1, le=8)
    ctas_per_sm: int = pydantic.Field(default=1, ge=1, le=4)
    order: Order = "grouped"
    group_m: int = pydantic.Field(default=8, ge=1)
    tma: bool = False
    swap: bool = False
    pdl: bool = False

    @pydantic.field_validator("block_m", "block_n", "block_k", "down_block_n", "down_block_k")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(f"must be a power of two, got {value}")
        return value

    @property
    def label(self) -> str:
        """``64x128x64-128x64,w4,s3,c1,grouped8``: rows × gate columns × depth - down columns × depth."""
        parts = [
            f"{self.block_m}x{self.block_n}x{self.block_k}-{self.down_block_n}x{self.down_block_k}",
            f"w{self.num_warps}",
            f"s{self.num_stages}",
            f"c{self.ctas_per_sm}",
            f"{self.order}{self.group_m}" if self.order == "grouped" else self.order,
        ]
        parts += [f"tail{self.tail_m}"] if self.tail_m else []
        return ",".join(parts + [name for name in ("tma", "swap", "pdl") if getattr(self, name)])

    def shared_memory(self, element_bytes: int, *, gated: bool = True, wgmma: bool = True) -> int:
        """An upper estimate in bytes of what a program takes: operands in flight and the epilogue's tile."""
        gate_up = self.block_m + (2 if gated else 1) * self.block_n
        down = self.block_m + self.down_block_n
        stage = max(gate_up * self.block_k, down * self.down_block_k) * element_bytes
        # Swapped accumulators are transposed through shared memory, fp32, one after the other.
        wide = max(self.block_n, self.down_block_n)
        epilogue = self.block_m * wide * (4 if self.swap or element_bytes == 1 else 2)
        # Without wgmma, which reads shared memory while it runs, the stage being multiplied is in registers.
        return max(stage * (self.num_stages if wgmma else self.num_stages - 1), epilogue) + _RESERVE


# Barriers, reductions over experts, and per-row vectors that are kept in flight.
_RESERVE = 6144


def persistent_configs(problem: MoEProblem, features: Features) -> tuple[TritonPersistentConfig, ...]:
    """The configurations worth measuring, the default first: all fit in the device's shared memory."""
    fp8 = problem.dtype == "fp8"
    bytes_each = ELEMENT_BYTES[problem.dtype]
    load = problem.slots / max(min(problem.E, problem.expected_experts), 1.0)
    heights = _heights(load, fp8=fp8, features=features)
    found: list[TritonPersistentConfig] = []
    for height in heights:
        for shape in _shapes(height, fp8=fp8, features=features):
            for stages in (4, 3, 2):
                config = shape.model_copy(update={"num_stages": stages})
                needed = config.shared_memory(bytes_each, gated=problem.gated, wgmma=features.wgmma)
                if needed * config.ctas_per_sm <= features.shared_memory:
                    found.append(config)
                    break
    default = found[0]
    orders = (
        default.model_copy(update={"order": "column_major"}),
        default.model_copy(update={"order": "row_major"}),
        default.model_copy(update={"group_m": 32}),
    )
    tails = [default.model_copy(update={"tail_m": default.block_m // 2})] if default.block_m > 64 else []
    return tuple(dict.fromkeys((*found, *orders, *tails)))


def _heights(load: float, *, fp8: bool, features: Features) -> tuple[int, ...]:
    """Tile heights for a load of rows per expert, the likeliest first."""
    if load <= 12:
        return (16, 32)
    if load <= 24:
        return (32, 16, 64)
    if fp8:
        return (64, 32)  # gate and up are 128 columns each, and with scales 128 rows of them spill registers
    if load <= 96 or not features.wgmma:
        return (64, 32, 128)
    return (128, 64)


def _shapes(height: int, *, fp8: bool, features: Features) -> list[TritonPersistentConfig]:
    """Tiles of one height, the likeliest first; `num_stages` is left to what fits."""
    depth = QUANT_BLOCK if fp8 else 64
    common = {
        "block_m": height, "block_k": depth, "down_block_k": depth, "tma": features.tma, "pdl": features.pdl,
    }  # fmt: skip
    if height == 128 and not features.wgmma:
        # mma.sync holds operands in registers too, which leaves room for half the columns.
        shapes = [{"block_n": 64, "down_block_n": 128, "num_warps": 8}]
    elif height >= 64:
        wide = {"block_n": 128, "down_block_n": 128, "num_warps": 8}
        shapes = [wide]
        if not fp8:
            # Four warps of half the width leave registers for two programs on one multiprocessor.
            shapes += [wide | {"block_n": 64, "num_warps": 4}, wide | {"block_n": 64, "num_warps": 4, "ctas_per_sm": 2}]
        if height == 128:
            shapes.append(wide | {"down_block_n": 256})
    else:
        narrow = {"block_n": 128 if fp8 else 64, "down_block_n": 128, "num_warps": 4}
        if fp8 and height == 32 and features.wgmma:
            # Where every column has a scale, four warps spill 192 bytes a thread on sm_90 and next to none on sm_89.
            narrow["num_warps"] = 8
        # wgmma needs 64 on its wide side, which few rows do not fill and weights do.
        swapped = [narrow | {"block_n": 128, "swap": True, "num_warps": 8 if fp8 else 4}] if features.wgmma else []
        shapes = [*swapped, narrow]
        if narrow["num_warps"] == 4:
            shapes.append(narrow | {"ctas_per_sm": 2})
    return [TritonPersistentConfig.model_validate(common | shape) for shape in shapes]


def tma_fits(columns: int, element_bytes: int) -> bool:
    """Whether a row-major matrix can have a tensor descriptor: its rows start on 16 bytes."""
    return columns * element_bytes % 16 == 0
