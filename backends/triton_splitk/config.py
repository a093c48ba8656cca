"""Tile sizes of the decode kernels, and which of them a problem should try."""

import math
from collections.abc import Iterator
from typing import Any, Final, Literal

from pydantic import Field

from moe_dispatch.backend import BackendConfig
from moe_dispatch.problem import ELEMENT_BYTES, QUANT_BLOCK, MoEProblem

from ..triton_support import Features


class SplitKConfig(BackendConfig):
    """Options of the decode kernels.

    Attributes:
        block_m: Tokens of one expert that a CTA serves at once: the narrow side of its product.
        block_n: Weight rows of a CTA, gate and up rows together.
        block_k: Columns of a pipeline stage; 128 for block FP8, whose scales change there.
        splits_gate_up: CTAs that share one tile of gate_up along K. 1 activates at once; more leave partial sums, which
            the second product adds in fixed order and activates.
        splits_down: CTAs that share one tile of down along N.
        num_warps: Of a CTA.
        num_stages: Of the weights' pipeline.
        mode: How experts and splits of down are summed: ``"deterministic"`` writes partial sums and adds them in
            fixed order; ``"atomic"`` adds to an fp32 output in the order of arrival and needs less memory.
        grid: ``"slots"`` has CTAs per (token, k) pair, idle unless the pair leads its expert's group of block_m;
            ``"experts"`` has CTAs per expert, idle if nobody chose it, which serve all of its groups in turn.
        tma: Weights through tensor descriptors (sm_90 and newer; rows of a multiple of 16 bytes).
        pdl: Programmatic dependent launch (sm_90 and newer).
    """

    block_m: Literal[8, 16, 32, 64] = 16
    block_n: Literal[16, 32, 64, 128, 256] = 64
    block_k: Literal[32, 64, 128, 256] = 128
    splits_gate_up: int = Field(default=1, ge=1, le=16)
    splits_down: int = Field(default=1, ge=1, le=16)
    num_warps: Literal[2, 4, 8] = 4
    num_stages: int = Field(default=4, ge=1, le=8)
    mode: Literal["deterministic", "atomic"] = "deterministic"
    grid: Literal["slots", "experts"] = "slots"
    tma: bool = False
    pdl: bool = False

    @property
    def launch(self) -> dict[str, Any]:
        """Launch options of both products."""
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        # Absent rather than False: Triton for other vendors does not know the option.
        return options | {"launch_pdl": True} if self.pdl else options


# CTAs per multiprocessor that keep its share of the memory system busy: one's weights travel while the other computes.
_CTAS_PER_SM: Final = 2
_MOST_STAGES: Final = 6
# A wider tile must not make the pipeline shallower than this.
_DEEP_STAGES: Final = 3
# A split shorter than this spends its time filling the pipeline.
_LEAST_BLOCKS_PER_SPLIT: Final = 4
# Of block_m·block_n.
_FP8_TILE_PER_WARP: Final = 1024


def default_config(problem: MoEProblem, device: Features) -> SplitKConfig:
    """The configuration that fills the device with the expected number of hit experts; nothing in it was measured."""
    block_k = _block_k(problem)
    hit = max(problem.expected_experts, 1.0)
    wanted = _CTAS_PER_SM * device.sms

    def ctas(rows: int, block_n: int) -> float:
        return hit * math.ceil(rows / block_n)

    fewest_rows = min(problem.gate_up_rows, problem.K)
    budget = device.shared_memory // _CTAS_PER_SM
    block_n: Literal[32, 64, 128] = 32
    for wider in (64, 128):
        tile = SplitKConfig(block_m=_block_m(problem), block_n=wider, block_k=block_k)
        deep = with_stages(problem, tile, budget).num_stages >= _DEEP_STAGES
        if deep and wider <= fewest_rows and ctas(fewest_rows, wider) >= wanted:
            block_n = wider
    # Partial sums of gate_up cost the second product registers and stages, so only where half of the device would be
    # idle. Those of down cost the reduction a little.
    splits_gate_up = _splits(device.sms / 2 / ctas(problem.gate_up_rows, block_n), math.ceil(problem.K / block_k))
    splits_down = _splits(wanted / ctas(problem.K, block_n), math.ceil(problem.N / block_k))
    config = SplitKConfig(
        block_m=_block_m(problem),
        block_n=block_n,
        block_k=block_k,
        splits_gate_up=splits_gate_up,
        splits_down=splits_down,
        num_stages=2,
        grid="slots" if problem.slots <= problem.E else "experts",
        pdl=device.pdl,
    )
    return with_stages(problem, config, budget)


def candidate_configs(problem: MoEProblem, device: Features) -> tuple[SplitKConfig, ...]:
    """The default, then one change of it at a time, then the pairs that are likely to matter together."""
    default = default_config(problem, device)
    fitting = dict.fromkeys(
        config for config in (default, *_variants(problem, default, device)) if _fits(problem, config, device)
    )
    return tuple(fitting)


def shared_memory_bytes(problem: MoEProblem, config: SplitKConfig) -> int:
    """An upper bound of what one CTA of either product takes; a compile test holds it to that."""
    weights = config.block_n * config.block_k * ELEMENT_BYTES[problem.dtype]
    tokens = config.block_m * config.block_k
    stage = weights + tokens * ELEMENT_BYTES[problem.act_dtype]
    if problem.dtype == "fp8":
        stage = weights + tokens * 4
    if config.splits_gate_up > 1:
        parts = 2 if problem.gated else 1
        stage = max(stage, weights + tokens * 4 * parts * config.splits_gate_up)
    epilogue = config.block_n * config.block_m * 4 + tokens * 4
    # The epilogue takes the pipeline's memory over.
    return max(config.num_stages * stage, epilogue) + 1024


def with_stages(problem: MoEProblem, config: SplitKConfig, budget: int) -> SplitKConfig:
    """The deepest pipeline within `budget` bytes of shared memory; two stages if even those exceed it."""
    deepest = 2
    for stages in range(3, _MOST_STAGES + 1):
        if shared_memory_bytes(problem, config.model_copy(update={"num_stages": stages})) <= budget:
            deepest = stages
    return config.model_copy(update={"num_stages": deepest})


def _block_k(problem: MoEProblem) -> Literal[64, 128]:
    if problem.dtype == "fp8":
        return QUANT_BLOCK
    # Whole blocks need no mask; gpt-oss's 2880 is a multiple of 64 and not of 128.
    return 128 if problem.dtype != "fp32" and problem.K % 128 == 0 and problem.N % 128 == 0 else 64


def _block_m(problem: MoEProblem) -> Literal[16, 32, 64]:
    mean = problem.slots / problem.E
    # Three deviations above the mean of a Poisson load: few experts read their weights twice.
    usual = mean + 3 * math.sqrt(mean)
    return 16 if usual <= 16 else 32 if usual <= 32 else 64


def _splits(lacking: float, blocks: int) -> int:
    splits = 1
    while splits < lacking and splits < 8 and blocks // (2 * splits) >= _LEAST_BLOCKS_PER_SPLIT:
        splits *= 2
    return splits


def _variants(problem: MoEProblem, default: SplitKConfig, device: Features) -> Iterator[SplitKConfig]:
    whole, half, third = (device.shared_memory // share for share in (1, 2, 3))

    def changed(budget: int = half, **fields: Any) -> SplitKConfig:
        return with_stages(problem, default.model_copy(update=fields), budget)

    for block_n in (32, 64, 128):
        for budget in (half, third):
            yield changed(budget, block_n=block_n)
    yield changed(whole, block_n=128)
    yield changed(block_n=128, num_warps=8)
    if problem.dtype != "fp8":
        for block_k in (64, 256):
            yield changed(block_k=block_k)
            yield changed(block_k=block_k, block_n=32)
    for splits in (1, 2, 4):
        yield changed(splits_down=splits)
        yield changed(splits_down=splits, mode="atomic")
        yield changed(splits_gate_up=splits)
    if problem.slots <= problem.E:
        yield changed(block_m=8)
    yield changed(grid="experts" if default.grid == "slots" else "slots")
    if device.tma and rows_allow_tma(problem):
        for block_n in (64, 128):
            yield changed(tma=True, block_n=block_n)
    if device.pdl:
        yield changed(pdl=False)


def rows_allow_tma(problem: MoEProblem) -> bool:
    """Whether the rows of both weights start at multiples of 16 bytes, as tensor descriptors ask."""
    size = ELEMENT_BYTES[problem.dtype]
    return problem.K * size % 16 == 0 and problem.N * size % 16 == 0


def _fits(problem: MoEProblem, config: SplitKConfig, device: Features) -> bool:
    blocks = (math.ceil(problem.K / config.block_k), math.ceil(problem.N / config.block_k))
    # Two accumulators and the operand that is being quantised: beyond this the compiler spills registers.
    fits_registers = problem.dtype != "fp8" or config.block_m * config.block_n <= _FP8_TILE_PER_WARP * config.num_warps
    return (
        fits_registers
        and shared_memory_bytes(problem, config) <= device.shared_memory
        and config.splits_gate_up <= blocks[0]
        and config.splits_down <= blocks[1]
    )
