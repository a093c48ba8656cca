"""Tile sizes of the split-K kernels, and which of them a problem should try."""

import functools
import math
from collections.abc import Iterator
from typing import Any, Final, Literal

from pydantic import Field

from moe_dispatch.backend import BackendConfig
from moe_dispatch.backends.triton_common.descriptors import boxes_mix_gate_and_up
from moe_dispatch.backends.triton_common.features import Features
from moe_dispatch.backends.triton_common.launch_options import next_power_of_2, pdl_option
from moe_dispatch.backends.triton_common.quantization import Quantization, quantization_of
from moe_dispatch.problem import ELEMENT_BYTES, QUANT_BLOCK, MoEProblem, stored_bytes


class SplitKConfig(BackendConfig):
    """Options of the split-K kernels.

    Attributes:
        block_m: Tokens of one expert that a CTA serves at once: the narrow side of its product.
        block_n: Weight rows of a CTA, gate and up rows together.
        block_k: Columns of a pipeline stage; 128 for block FP8, whose scales change there.
        splits_gate_up: CTAs that share one tile of gate_up along K. 1 activates at once; more leave partial sums, which
            a launch of its own adds in fixed order and activates.
        splits_down: CTAs that share one tile of down along N.
        num_warps: Warps of a CTA.
        num_stages: Stages of the weights' pipeline.
        grid: ``"slots"`` has CTAs per (token, k) pair, idle unless the pair leads its expert's group of block_m;
            ``"experts"`` has CTAs per expert, idle if no token chose it, which serve all of its groups in turn.
        tma: Weights through tensor descriptors (sm_90 and newer; rows of a multiple of 16 bytes).
        pdl: Programmatic dependent launch (sm_90 and newer).
        one_launch: Both products in one launch, in which tiles of down wait for their expert's tiles of gate_up. It
            needs splits_gate_up of 1 and activations that are not quantised.
        crowded: Fewer registers for a thread of those tiles of 8 or 16 tokens that dequantise FP8, so that one more CTA
            shares a multiprocessor.
    """

    block_m: Literal[8, 16, 32, 64] = 16
    block_n: Literal[16, 32, 64, 128, 256] = 64
    block_k: Literal[32, 64, 128, 256] = 128
    splits_gate_up: int = Field(default=1, ge=1, le=16)
    splits_down: int = Field(default=1, ge=1, le=16)
    num_warps: Literal[2, 4, 8] = 4
    num_stages: int = Field(default=4, ge=1, le=8)
    grid: Literal["slots", "experts"] = "slots"
    tma: bool = False
    pdl: bool = False
    one_launch: bool = False
    crowded: bool = False

    @property
    def lists_slots(self) -> bool:
        """Whether the first product leaves a list of each expert's slots to the second, which then need not search.

        With programmatic dependent launch the second searches while the first still runs, and could not read a list.
        """
        return self.grid == "experts" and not self.pdl and not self.one_launch

    def partial_sums(self, quantization: Quantization, *, gated: bool) -> bool:
        """Whether the first product leaves partial sums: K is split, or a CTA does not own whole groups to quantise."""
        owns_groups = not quantization.per_token and self.block_n == QUANT_BLOCK * (2 if gated else 1)
        return self.splits_gate_up > 1 or (quantization.activations and not owns_groups)

    def launch(self, quantization: Quantization) -> dict[str, Any]:
        """Launch options of both products."""
        tile = (self.block_m, self.block_n, self.num_warps)
        registers = {}
        short = tile in _SHORT_OF_REGISTERS or (self.one_launch and tile == _SHORT_IN_ONE_LAUNCH)
        if quantization.dequantizes and short:
            registers = {"maxnreg": _CROWDED_REGISTERS if self.crowded else _MOST_REGISTERS}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **pdl_option(self.pdl), **registers}


def slots_per_scan(slots: int) -> int:
    """Ids that a CTA looks at together while it searches for its slots."""
    return min(512, max(32, next_power_of_2(slots)))


# Limits of the defaults. Device of all evidence: one H200 (sm_90), Triton 3.6, whole layers under CUDA graphs.
#
# constant                             unit         evidence
_MOST_STAGES: Final = 6
_LEAST_STAGES: Final = 2  #              stages       fewer do not overlap loads and products
_NARROWEST: Final = 32  #                weight rows  tiles for devices whose shared memory does not hold the others;
#                                                     not measured, for none of the devices known today is one
_SHORT_LOOP: Final = 16  #               blocks of K  a pipeline hardly gets going; several CTAs take turns instead
_SHORT_LOOP_STAGES: Final = 3
_SHORT_DOWN_LOOP: Final = 4  #           blocks of N  in FP8 likewise, with CTAs per slot: kimi-k2-tp8 (2 blocks) at M=8
#                                                     and 16 with 3 stages 101, 166 µs, per slot 91, 157, with 4 stages
#                                                     107, 190, with 6 127, 203. At 11 blocks and more three CTAs lose
#                                                     up to 3 %. In BF16 at M=16 to 64 narrow tiles take 10 to 20 %
#                                                     longer
_SHARING: Final = 3  #                   CTAs         of 128 rows with 3 or 4 stages on a multiprocessor. Where few are
#                                                     left for another turn, 64 rows: olmoe at M=4 53.9 and 51.2 µs.
#                                                     Where all take one turn, 4 stages: glm-4.5 at M=1 56.6 and 55.6
_LONG_LOOP: Final = 16  #                blocks       of K and of N: with asynchronous copies mixtral-8x7b takes .4 to
#                                                     1.8, ling-1t .8 to 1.1, deepseek-v3 up to .8 % less than with TMA
_IDLE: Final = 8  #                      CTAs         of experts for each CTA of a slot, which looks for its group
_LEAST_CTAS_PER_SM: Final = 1.25  #      CTAs         one CTA of a multiprocessor cannot hide its waits
_LEAST_BLOCKS_PER_SPLIT: Final = 4  #    blocks of N  a shorter split spends its time filling the pipeline
_MOST_SPLITS: Final = 8
_WIDE: Final = 128  #                    weight rows  in FP8 where K has whole tiles (gpt-oss-120b at M=8: 178 µs, 176
#                                                     with 64) and both grids fill the device (minimax-m2 at M=1: 37.2,
#                                                     38.8; qwen3-30b-a3b: 19.1, 18.7)
_FEW_TOKENS: Final = 16  #               tokens       of a tile in BF16, with which 64 rows take up to 3 % less time
#                                                     than 128: deepseek-v2-lite at M=32 198 µs and 204
# Where weights are dequantised, instructions and not memory are the limit, and more CTAs per multiprocessor fill the
# waits between them. The H200 described as an A100, qwen3-30b-a3b in FP8 at M=8, block_m/stages/registers: 16/6/242
# 99 µs, 16/6/168 85, 8/6/168 77, 8/4/128 72 (BF16 107); at M=64, block_m/block_n/registers: 16/128/none 213, 16/64/168
# 203, 8/64/128 203, 16/64/128 196 (BF16 254). Wider tiles would spill. mixtral-8x7b in one launch, 32/64/none and
# 32/64/128, where experts of at most 16 tokens take half of the tile: at M=32 393 and 360, at M=64 463 and 415.
# MXFP4 of gpt-oss-120b with TMA, block_n×block_k/warps: at M=64 128×128/4 518 µs, 64×128/4 583, 64×128/2 571; at M=8
# 153, 170, 176; at M=1 with two splits 35.7, 36.0, 31.9. Without TMA 128×128/4 took 755 where it took 583 with it.
_DEQUANTIZING_STAGES: Final = 4
_SHORT_OF_REGISTERS: Final = ((8, 64, 4), (16, 64, 4))  # block_m, block_n and num_warps
_SHORT_IN_ONE_LAUNCH: Final = (32, 64, 4)  # alone: in two, gate_up would spill 352 bytes under Triton 3.8
_MOST_REGISTERS: Final = 128  # of a thread of theirs: four CTAs share a multiprocessor
_CROWDED_REGISTERS: Final = 96  # five
# Both products in one launch where kernels do not overlap, the H200 described as an A100: qwen3-30b-a3b in FP8 at M=8
# 80 → 70 µs, at 64 174 → 159, in BF16 125 → 121 and 293 → 278, gpt-oss-120b in MXFP4 at M=8 241 → 193; but at M=1 in
# FP8 19.1 → 23.5, in BF16 26.1 → 28.7, in MXFP4 36.4 → 38.9, at M=2 56.2 → 66.6, and kimi-k2-tp8, whose second loop is
# very short, at M=2 in FP8 41.1 → 45.9. In MXFP4 tiles of more than _FEW_TOKENS spill on sm_80. One token of a large
# layer gains: deepseek-v3 in FP8 98 → 96, in BF16 183 → 171, mixtral-8x7b in FP8 106 → 95.
# More CTAs of down hide that they wait. mixtral-8x7b (112 blocks) with 1, 2, 4 and 8 for a tile: FP8 at M=1 154, 112,
# 97, 95; at M=2 197, 157, 150; at M=4 248, 233, 225; at M=8 315, 312, 312; BF16 at M=2 301, 278, 274, at M=8 607, 590,
# 584. deepseek-v3 in FP8 at M=1, 16 blocks and 8 CTAs for each multiprocessor, loses with two: 96 → 98.
_MUCH_TO_READ: Final = 320 << 20  #     bytes         of the hit experts; 36 MiB (qwen3-30b-a3b) lose, 336 MiB gain
_LEAST_CTAS_TOGETHER: Final = 8  #      CTAs          of down for each multiprocessor
_LEAST_BLOCKS_TOGETHER: Final = 14  #   blocks of 128 columns of a split; fewer lose at deepseek-v3
_MOST_TOKENS_TOGETHER: Final = 8  #     tokens        with more, more CTAs were not measured
# Five CTAs instead of four, by CTAs of down for each multiprocessor that the A100 is said to have: 60 (deepseek-v3) 597
# → 593, 15 (qwen3-30b-a3b at M=8) 72.5 → 69.8, 9 (at M=4) 44.9 → 45.3, 4 (mixtral-8x7b, M=8) 312 → 323.
_CROWDED_CTAS_PER_SM: Final = 10


def default_config(problem: MoEProblem, device: Features) -> SplitKConfig:
    """What measured best, or within 2 % of it, on an H200 (docs/performance.md); where it does not fit, narrower tiles.

    On a device with less than `least_shared_memory` bytes the narrowest tiles do not fit either.
    """
    return _default_and_least(problem, device)[0]


def least_shared_memory(problem: MoEProblem, device: Features) -> int:
    """Bytes that one block needs for the narrowest tiles that `default_config` considers."""
    return _default_and_least(problem, device)[1]


@functools.lru_cache(maxsize=16)  # a problem's memory is asked for first, then its default
def _default_and_least(problem: MoEProblem, device: Features) -> tuple[SplitKConfig, int]:
    hit, slots = max(problem.expected_experts, 1.0), problem.expected_slots
    quantization, block_k = quantization_of(problem), _block_k(problem)
    block_m = _block_m(problem, quantization)
    mxfp4 = problem.dtype == "mxfp4"
    blocks = math.ceil(problem.N / block_k)
    short_down = blocks <= _SHORT_DOWN_LOOP
    # Most CTAs of a grid of experts would find nothing to do, which takes as long as a very short loop.
    by_slot = problem.M == 1 or (1 if quantization.activations and short_down else _IDLE) * slots < problem.E
    if quantization.activations:
        block_n, stages = _fp8_tile(problem, device, hit, block_m, by_slot=by_slot, short_down=short_down)
    else:
        wide = not by_slot if mxfp4 else block_m > _FEW_TOKENS or (short_down and not by_slot)
        block_n, stages = _WIDE if wide and (mxfp4 or not quantization.dequantizes) else 64, None
    few_warps = mxfp4 and by_slot
    lacking = _LEAST_CTAS_PER_SM * (2 if few_warps else 1) * device.sms * block_n / (hit * problem.K)
    splits = _splits(lacking, blocks, _LEAST_BLOCKS_PER_SPLIT)
    one_launch = not (device.pdl or quantization.activations or problem.dtype == "fp32" or short_down)
    if mxfp4:
        one_launch &= problem.M > 2 and block_m <= _FEW_TOKENS
    elif problem.M == 1:
        one_launch = one_launch and hit * problem.expert_bytes >= _MUCH_TO_READ
    if one_launch:
        by_slot = slots < problem.E  # whose CTAs search for nothing there
    if one_launch and not mxfp4 and problem.M <= _MOST_TOKENS_TOGETHER:
        lacking = _LEAST_CTAS_TOGETHER * device.sms * block_n / (hit * problem.K)
        splits = max(splits, _splits(lacking, problem.N // QUANT_BLOCK, _LEAST_BLOCKS_TOGETHER))
    # Fewer CTAs of down would not be spread evenly.
    spread = hit * problem.K >= _CROWDED_CTAS_PER_SM * device.sms * block_n
    crowded = one_launch and not mxfp4 and block_m == 8 and spread
    return _of_layer(
        problem.layer, device, block_m, block_n, stages, splits,
        by_slot=by_slot, few_warps=few_warps, one_launch=one_launch, crowded=crowded,
    )  # fmt: skip


def _fp8_tile(
    problem: MoEProblem, device: Features, hit: float, block_m: int, *, by_slot: bool, short_down: bool
) -> tuple[Literal[64, 128], int | None]:
    """Weight rows and stages of products of e4m3 codes; None for as many stages as let two CTAs share a multiprocessor.

    Tiles of 128 rows read tokens half as often as those of 64. Three stages of them let three CTAs share a
    multiprocessor, whose registers hold no more.

    Args:
        problem: The problem.
        device: The device.
        hit: Experts that have a slot.
        block_m: Tokens of a tile.
        by_slot: Whether CTAs are per slot.
        short_down: Whether the second product has a very short loop.
    """
    short = math.ceil(problem.K / QUANT_BLOCK) <= _SHORT_LOOP
    stages = _SHORT_LOOP_STAGES if short or short_down else None
    if _SHARING * _SHORT_LOOP_STAGES * (_WIDE + block_m) * QUANT_BLOCK > device.shared_memory:
        return (64 if by_slot else _WIDE), stages  # three do not fit on a multiprocessor
    if block_m > _FEW_TOKENS:
        return _WIDE, stages
    if problem.K % _WIDE:
        return 64, None  # of down the last tile would be half empty
    # CTAs of a multiprocessor in the two products.
    first, second = (hit / device.sms * math.ceil(rows / _WIDE) for rows in (problem.gate_up_rows, problem.K))
    if by_slot and min(first, second) < 1:
        return 64, None
    if short and _SHARING < first <= _SHARING + 1:
        return 64, None  # the second wave would have few CTAs
    if by_slot and stages is None and max(first, second) <= _SHARING:
        return _WIDE, _SHORT_LOOP_STAGES + 1  # all run at once, three on a multiprocessor
    return _WIDE, stages


# Token counts ask for few different ones, and a new token count is planned while a model serves.
@functools.lru_cache(maxsize=1024)
def _of_layer(
    layer: MoEProblem,
    device: Features,
    block_m: Literal[8, 16, 32, 64],
    block_n: Literal[64, 128],
    stages: int | None,
    splits_down: int,
    *,
    by_slot: bool,
    few_warps: bool,
    one_launch: bool,
    crowded: bool,
) -> tuple[SplitKConfig, int]:
    """The default configuration with these tiles, and the bytes that one block needs for its narrowest tiles."""
    fp8 = quantization_of(layer).activations
    config = SplitKConfig(
        block_m=block_m,
        block_n=block_n,
        block_k=_block_k(layer),
        splits_down=splits_down,
        # Four warps do not have the registers for so many tokens beside dequantised weights.
        num_warps=2 if few_warps else 8 if quantization_of(layer).dequantizes and block_m == 64 else 4,
        grid="slots" if by_slot else "experts",
        tma=device.tma
        and rows_allow_tma(layer)
        and not (fp8 and block_n == _WIDE and block_m <= _FEW_TOKENS and _copies_instead(layer, device))
        and (fp8 or layer.dtype == "mxfp4" or not by_slot)
        and boxes_mix_gate_and_up(layer),
        pdl=device.pdl,
        one_launch=one_launch,
        crowded=crowded,
    )
    narrowed = config.model_copy(update={"block_n": _NARROWEST, "num_stages": _LEAST_STAGES})
    preferred = config.model_copy(update={"num_stages": stages}) if stages else _deepened(layer, config, device)
    if shared_memory_bytes(layer, preferred) > device.shared_memory:
        preferred = with_stages(layer, narrowed, device.shared_memory)
    return preferred, shared_memory_bytes(layer, narrowed)


def _deepened(problem: MoEProblem, config: SplitKConfig, device: Features) -> SplitKConfig:
    """The configuration with the stages that measured best."""
    if quantization_of(problem).dequantizes:
        config = config.model_copy(update={"num_stages": _DEQUANTIZING_STAGES})
        if shared_memory_bytes(problem, config) <= device.shared_memory // 2:
            return config
    # Two CTAs of a multiprocessor take turns at waiting; one with a deep pipeline is better than two shallow ones.
    shared = with_stages(problem, config, device.shared_memory // 2)
    return shared if shared.num_stages > _LEAST_STAGES else with_stages(problem, config, device.shared_memory)


def _copies_instead(layer: MoEProblem, device: Features) -> bool:
    """Whether asynchronous copies of 16 bytes are faster than TMA: where both loops are long and end with a block."""
    long = min(layer.K, layer.N) >= _LONG_LOOP * QUANT_BLOCK
    return device.tensor_cores == "wgmma" and long and layer.K % QUANT_BLOCK == layer.N % QUANT_BLOCK == 0


def candidate_configs(problem: MoEProblem, device: Features) -> tuple[SplitKConfig, ...]:
    """The default, then what may beat it on another device or routing."""
    default = default_config(problem, device)
    fitting = dict.fromkeys(
        config for config in (default, *_variants(problem, default, device)) if _fits(problem, config, device)
    )
    return tuple(fitting)


def shared_memory_bytes(problem: MoEProblem, config: SplitKConfig) -> int:
    """An upper bound of what one CTA of any of the products takes; a compile test holds it to that."""
    tokens = config.block_m * config.block_k
    weights = stored_bytes(problem.dtype, config.block_n * config.block_k)
    stage = weights + tokens * quantization_of(problem).activation_bytes(problem.act_dtype)
    # MXFP4 has a block of activations once more, taken apart by column, and from Triton 3.7 on one of values.
    apart = 2 * (tokens + config.block_n * config.block_k) if problem.dtype == "mxfp4" else 0
    epilogue = config.block_n * config.block_m * 4 + tokens * 4
    # The epilogue takes the pipeline's memory over.
    return max(config.num_stages * stage + apart, epilogue) + 1024


def with_stages(problem: MoEProblem, config: SplitKConfig, budget: int) -> SplitKConfig:
    """The deepest pipeline within `budget` bytes of shared memory; two stages if even those exceed it."""
    deepest = _LEAST_STAGES
    for stages in range(_LEAST_STAGES + 1, _MOST_STAGES + 1):
        if shared_memory_bytes(problem, config.model_copy(update={"num_stages": stages})) <= budget:
            deepest = stages
    return config.model_copy(update={"num_stages": deepest})


def rows_allow_tma(problem: MoEProblem) -> bool:
    """Whether the rows of both weights start at multiples of 16 bytes, as tensor descriptors ask."""
    if problem.dtype == "mxfp4":
        return True  # whole blocks of 32 codes take 16 bytes each
    size = ELEMENT_BYTES[problem.dtype]
    return problem.K * size % 16 == 0 and problem.N * size % 16 == 0


def _block_k(problem: MoEProblem) -> Literal[64, 128]:
    if problem.quantized:
        return QUANT_BLOCK
    # Whole blocks need no mask; gpt-oss's 2880 is a multiple of 64 and not of 128.
    return 128 if problem.dtype != "fp32" and problem.K % 128 == 0 and problem.N % 128 == 0 else 64


def _block_m(problem: MoEProblem, quantization: Quantization) -> Literal[8, 16, 32, 64]:
    mean = problem.expected_slots / problem.E
    # Three deviations above the mean of a Poisson load: few experts read their weights twice. With MXFP4 a wider block
    # costs more than a second pass: gpt-oss-20b at M=64 takes 205 µs with 16 tokens, 242 with 32 and 290 with 8.
    usual = mean + (2 if problem.dtype == "mxfp4" else 3) * math.sqrt(mean)
    if usual <= 8 and quantization.dequantizes:
        return 8
    return 16 if usual <= 16 else 32 if usual <= 32 else 64


def _splits(lacking: float, blocks: int, least: int) -> int:
    splits = 1
    while splits < lacking and splits < _MOST_SPLITS and blocks // (2 * splits) >= least:
        splits *= 2
    return splits


def _variants(problem: MoEProblem, default: SplitKConfig, device: Features) -> Iterator[SplitKConfig]:
    half, third = (device.shared_memory // share for share in (2, 3))

    # In MXFP4 on the H200 as it is, gpt-oss-120b at M=8 152 → 146 µs, with CTAs per slot.
    if default.one_launch or (problem.dtype == "mxfp4" and default.block_m <= _FEW_TOKENS):
        few = problem.M == 1 or (_IDLE if default.one_launch else 1) * problem.expected_slots < problem.E
        grid = "slots" if few else "experts"
        yield default.model_copy(update={"one_launch": not default.one_launch, "grid": grid, "crowded": False})
    if default.one_launch and default.block_m == 8 and problem.dtype != "mxfp4":
        yield default.model_copy(update={"crowded": not default.crowded})

    def changed(budget: int = half, **fields: Any) -> SplitKConfig:
        return with_stages(problem, default.model_copy(update=fields), budget)

    maps = (True, False) if device.tma and rows_allow_tma(problem) else (False,)
    for tma in maps:
        yield changed(block_n=64, tma=tma)
        yield changed(block_n=128, tma=tma)
        yield changed(third, block_n=128, tma=tma)
    yield changed(grid="experts" if default.grid == "slots" else "slots", block_n=64)
    if problem.expected_slots <= problem.E:
        yield changed(block_m=8)
    for splits in (1, 2):
        yield changed(splits_down=splits)
    yield changed(splits_gate_up=2, one_launch=False, crowded=False)
    if quantization_of(problem).dequantizes:  # which takes more registers and instructions than it takes memory
        yield changed(block_n=128, num_warps=8)
        yield changed(block_n=64, num_warps=2)


def _fits(problem: MoEProblem, config: SplitKConfig, device: Features) -> bool:
    blocks = (math.ceil(problem.K / config.block_k), math.ceil(problem.N / config.block_k))
    return (
        shared_memory_bytes(problem, config) <= device.shared_memory
        and config.splits_gate_up <= blocks[0]
        and config.splits_down <= blocks[1]
    )
