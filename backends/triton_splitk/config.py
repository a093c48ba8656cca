"""Tile sizes of the decode kernels, and which of them a problem should try."""

import math
from collections.abc import Iterator
from typing import Any, Final, Literal

from pydantic import Field

from moe_dispatch.backend import BackendConfig
from moe_dispatch.backends.triton_common.features import Features
from moe_dispatch.problem import ELEMENT_BYTES, QUANT_BLOCK, MoEProblem


class SplitKConfig(BackendConfig):
    """Options of the decode kernels.

    Attributes:
        block_m: Tokens of one expert that a CTA serves at once: the narrow side of its product.
        block_n: Weight rows of a CTA, gate and up rows together.
        block_k: Columns of a pipeline stage; 128 for block FP8, whose scales change there.
        splits_gate_up: CTAs that share one tile of gate_up along K. 1 activates at once; more leave partial sums, which
            a launch of its own adds in fixed order and activates.
        splits_down: CTAs that share one tile of down along N.
        num_warps: Of a CTA.
        num_stages: Of the weights' pipeline.
        mode: How experts and splits of down are summed: ``"deterministic"`` writes partial sums and adds them in
            fixed order; ``"atomic"`` adds to an fp32 output in the order of arrival and needs less memory. The vector
            kernels know no other than fixed order.
        grid: ``"slots"`` has CTAs per (token, k) pair, idle unless the pair leads its expert's group of block_m;
            ``"experts"`` has CTAs per expert, idle if nobody chose it, which serve all of its groups in turn.
        tma: Weights through tensor descriptors (sm_90 and newer; rows of a multiple of 16 bytes).
        pdl: Programmatic dependent launch (sm_90 and newer).
        gate_up: ``"tensor"`` cores serve all tokens of an expert at once; ``"vector"`` reads weights straight into
            registers, for each slot by itself, which starts faster. The fields above describe the tensor kernels.
        down: The same for the second product; ``"vector"`` also sums over experts, in fixed order.
        vector_rows: Weight rows of a CTA of the vector gate_up, gate and up rows together.
        vector_columns: Columns of K that it has in flight.
        vector_warps: Of such a CTA.
        vector_down_rows: Output columns of a CTA of the vector down.
        vector_down_columns: Columns of N that it has in flight.
        vector_down_experts: Experts whose rows it has in flight together.
        vector_down_warps: Of such a CTA.
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
    gate_up: Literal["tensor", "vector"] = "tensor"
    down: Literal["tensor", "vector"] = "tensor"
    vector_rows: Literal[2, 4, 8, 16, 32] = 8
    vector_columns: Literal[128, 256, 512, 1024, 2048] = 1024
    vector_warps: Literal[1, 2, 4, 8] = 4
    vector_down_rows: Literal[1, 2, 4, 8, 16, 32] = 8
    vector_down_columns: Literal[128, 256, 512, 1024, 2048] = 1024
    vector_down_experts: Literal[1, 2, 4, 8] = 1
    vector_down_warps: Literal[1, 2, 4, 8] = 4

    @property
    def atomic(self) -> bool:
        """Whether sums depend on the order of arrival. The vector kernels add in fixed order, and clear nothing."""
        return self.mode == "atomic" and self.gate_up == "tensor" and self.down == "tensor"

    def partial_sums(self, dtype: str, *, gated: bool) -> bool:
        """Whether the first product leaves partial sums: K is split, or a CTA does not own whole groups to quantise."""
        if self.gate_up == "vector":
            return dtype == "fp8"
        return self.splits_gate_up > 1 or (dtype == "fp8" and self.block_n != QUANT_BLOCK * (2 if gated else 1))

    @property
    def launch(self) -> dict[str, Any]:
        """Launch options of both products."""
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        # Absent rather than False: Triton for other vendors does not know the option.
        return options | {"launch_pdl": True} if self.pdl else options


def slots_per_scan(slots: int) -> int:
    """Ids that a CTA looks at together while it searches for its slots."""
    return min(512, max(32, 1 << (slots - 1).bit_length()))


_MOST_STAGES: Final = 6
# Over so few blocks of K a pipeline hardly gets going, and several CTAs take turns instead.
_SHORT_LOOP: Final = 16
_SHORT_LOOP_STAGES: Final = 3
# Where the second product's loop is very short three CTAs of a multiprocessor take turns: at kimi-k2-tp8 in FP8 (2
# blocks) and M=8 to 64 that is 7 to 15 % less time than two take. At 11 blocks and more three lose up to 3 %. In BF16
# narrow tiles have too little to do there: at M=16 to 64 they take 10 to 20 % longer.
_SHORT_DOWN_LOOP: Final = 4
# One CTA of a multiprocessor cannot hide its waits.
_LEAST_CTAS_PER_SM: Final = 1.25
# A split shorter than this spends its time filling the pipeline.
_LEAST_BLOCKS_PER_SPLIT: Final = 4
# Without tensor cores a slot reads its expert by itself, so that nearly each must have one to itself; and their faster
# start is only felt where reading takes little longer. Converting e4m3 without them takes longer than reading it.
_VECTOR_SHARING: Final = 1.15
_VECTOR_BYTES: Final = 1 << 30
_VECTOR_FP8_BYTES: Final = 64 << 20
# Where a token's experts are not read all at once, in BF16: with so much to read one token still gains 1 to 2 %. With
# less it loses (deepseek-v2-lite, M=1: 34.8 µs, 31.1 with tensor cores), and so do more tokens (1 to 8 %).
_VECTOR_APART_BYTES: Final = 256 << 20
# Weights that a CTA of the vector method has in flight.
_VECTOR_CHUNK: Final = 16 << 10
_VECTOR_COLUMNS: Final = 2048


def default_config(problem: MoEProblem, device: Features) -> SplitKConfig:
    """What measured best, or within 2 % of it, on an H200 (docs/performance.md)."""
    hit = max(problem.expected_experts, 1.0)
    fp8 = problem.dtype == "fp8"
    # Most CTAs of a grid of experts would find nothing to do.
    by_slot = problem.M == 1 or 8 * problem.slots < problem.E
    short_down = math.ceil(problem.N / _block_k(problem)) <= _SHORT_DOWN_LOOP
    wide = not by_slot if fp8 else problem.slots >= 2 * hit or (short_down and not by_slot)
    config = SplitKConfig(
        block_m=_block_m(problem),
        block_n=128 if wide else 64,
        block_k=_block_k(problem),
        grid="slots" if by_slot else "experts",
        tma=device.tma and rows_allow_tma(problem) and (fp8 or not by_slot),
        pdl=device.pdl,
        **_vector_tiles(problem),
        **_methods(problem),
    )
    lacking = _LEAST_CTAS_PER_SM * device.sms * config.block_n / (hit * problem.K)
    config = config.model_copy(update={"splits_down": _splits(lacking, math.ceil(problem.N / config.block_k))})
    if fp8 and wide and math.ceil(problem.K / config.block_k) <= _SHORT_LOOP:
        return config.model_copy(update={"num_stages": _SHORT_LOOP_STAGES})
    if fp8 and wide and short_down:
        return with_stages(problem, config, device.shared_memory // 3)
    # Two CTAs of a multiprocessor take turns at waiting; one with a deep pipeline is better than two shallow ones.
    shared = with_stages(problem, config, device.shared_memory // 2)
    return shared if shared.num_stages > 2 else with_stages(problem, config, device.shared_memory)


def candidate_configs(problem: MoEProblem, device: Features) -> tuple[SplitKConfig, ...]:
    """The default, then what may beat it on another device or routing."""
    default = default_config(problem, device)
    fitting = dict.fromkeys(
        config for config in (default, *_variants(problem, default, device)) if _fits(problem, config, device)
    )
    return tuple(fitting)


def shared_memory_bytes(problem: MoEProblem, config: SplitKConfig) -> int:
    """An upper bound of what one CTA of any of the products takes; a compile test holds it to that."""
    needed = 0
    if "tensor" in (config.gate_up, config.down):
        tokens = config.block_m * config.block_k
        stage = (config.block_n * config.block_k + tokens) * ELEMENT_BYTES[problem.dtype]
        epilogue = config.block_n * config.block_m * 4 + tokens * 4
        # The epilogue takes the pipeline's memory over.
        needed = max(config.num_stages * stage, epilogue) + 1024
    # The vector kernels exchange an operand between threads.
    operand = max(config.vector_columns * 2, config.vector_down_columns * config.vector_down_experts)
    return max(needed, operand * 4)


def with_stages(problem: MoEProblem, config: SplitKConfig, budget: int) -> SplitKConfig:
    """The deepest pipeline within `budget` bytes of shared memory; two stages if even those exceed it."""
    deepest = 2
    for stages in range(3, _MOST_STAGES + 1):
        if shared_memory_bytes(problem, config.model_copy(update={"num_stages": stages})) <= budget:
            deepest = stages
    return config.model_copy(update={"num_stages": deepest})


def rows_allow_tma(problem: MoEProblem) -> bool:
    """Whether the rows of both weights start at multiples of 16 bytes, as tensor descriptors ask."""
    size = ELEMENT_BYTES[problem.dtype]
    return problem.K * size % 16 == 0 and problem.N * size % 16 == 0


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


def _methods(problem: MoEProblem) -> dict[str, Any]:
    """Which products go without tensor cores."""
    alone = problem.slots <= _VECTOR_SHARING * problem.expected_experts
    together = _vector_tiles(problem)["vector_down_experts"] >= problem.topk
    read = problem.expected_experts * problem.expert_bytes
    if problem.dtype == "fp8":
        # The second product gains the launch that it saves, and that only if all experts of a token are read at once.
        alone = alone and together and read <= _VECTOR_FP8_BYTES
    else:
        apart = problem.M == 1 and read >= _VECTOR_APART_BYTES
        alone = alone and (together or apart) and read <= _VECTOR_BYTES
    return {"gate_up": "vector", "down": "vector"} if alone else {}


def _vector_tiles(problem: MoEProblem) -> dict[str, Any]:
    """Tiles of the vector kernels: whole rows where they are short enough to be in flight at once."""
    columns, down_columns = (max(128, 1 << (length - 1).bit_length()) for length in (problem.K, problem.N))
    experts = min(8, 1 << (problem.topk - 1).bit_length())
    rows = _VECTOR_CHUNK // (experts * down_columns)
    whole = columns <= _VECTOR_COLUMNS
    together = rows >= 2 and down_columns <= _VECTOR_COLUMNS
    warps = 2 * ELEMENT_BYTES[problem.dtype]  # 256 bytes in flight for each thread
    return {
        # kimi-k2-tp8 in FP8 at M=1: 25.1 µs with 8 rows, 21.9 with 4.
        "vector_rows": 8 if whole or problem.dtype != "fp8" else 4,
        "vector_columns": columns if whole else 512,
        "vector_warps": min(8, warps) if whole else 2,
        "vector_down_rows": min(8, rows) if together else 8,
        "vector_down_columns": down_columns if together else 1024,
        "vector_down_experts": experts if together else 1,
        "vector_down_warps": min(8, warps) if together else 2,
    }


def _variants(problem: MoEProblem, default: SplitKConfig, device: Features) -> Iterator[SplitKConfig]:
    half, third = (device.shared_memory // share for share in (2, 3))

    def changed(budget: int = half, **fields: Any) -> SplitKConfig:
        return with_stages(problem, default.model_copy(update=fields), budget)

    tensor: dict[str, Any] = {"gate_up": "tensor", "down": "tensor"}
    maps = (True, False) if device.tma and rows_allow_tma(problem) else (False,)
    for tma in maps:
        yield changed(**tensor, block_n=64, tma=tma)
        yield changed(**tensor, block_n=128, tma=tma)
        yield changed(third, **tensor, block_n=128, tma=tma)
    yield changed(**tensor, grid="experts" if default.grid == "slots" else "slots", block_n=64)
    if problem.slots <= 2 * problem.expected_experts:
        yield changed(gate_up="vector", down="vector")
        yield changed(gate_up="tensor", down="vector")
        yield changed(gate_up="vector", down="tensor")
        yield changed(gate_up="vector", down="vector", vector_rows=4, vector_warps=2)
    if problem.slots <= problem.E:
        yield changed(**tensor, block_m=8)
    for splits in (1, 2):
        yield changed(**tensor, splits_down=splits)
    yield changed(**tensor, splits_gate_up=2)
    yield changed(**tensor, mode="atomic")


def _fits(problem: MoEProblem, config: SplitKConfig, device: Features) -> bool:
    blocks = (math.ceil(problem.K / config.block_k), math.ceil(problem.N / config.block_k))
    return (
        shared_memory_bytes(problem, config) <= device.shared_memory
        and config.splits_gate_up <= blocks[0]
        and config.splits_down <= blocks[1]
    )
