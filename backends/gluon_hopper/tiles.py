"""Tile sizes and thresholds of the Hopper kernels, and the measurements that they come from.

All figures are of one H200 (132 multiprocessors), whole layers in CUDA graphs, Triton 3.6. Where this backend gives way
to `triton_persistent` is a policy's matter: see `policies/rules.py`.

    constant         value  evidence
    BLOCK_M          128    64 rows, the height of a Hopper product, for each of two consumers. Blocks of 96 rows too:
                            qwen3-30b-a3b, M=1024: 353 → 354 µs, so not kept.
    TAIL_M           32     BF16: left-over rows join the block before them, where a block of their own would read
                            the expert's weights again: deepseek-v3, M=4096, 8314 → 6841 µs.
    TALL_BLOCKS      1      BF16: blocks of an expert that may be so much taller. At M=16384 qwen3-30b-a3b and
                            mixtral still lose 4 % to plain blocks.
    FP8_TAIL_M       16     FP8 likewise: deepseek-v3, M=4096, -9 %; mixtral, M=1024, -8 %.
    FP8_TALL_BLOCKS  2      FP8 likewise; without a limit mixtral at M=16384 is 11 % slower.
    STAGES           4      a stage takes 52 KiB in BF16, and five do not fit into the 227 KiB of a multiprocessor.
                            783 TFLOP/s at 8192³ in BF16 (torch 697).
    MAX_REGISTERS    168    of a thread at launch: 65536 for twelve warps. The warp groups then divide them anew.
    QUEUE_SLOTS      2      tiles that the scheduler publishes ahead, at most.
    LEAD_STAGES      4      stages before the end of a tile's loads at which the loader asks for the next tile. mixtral,
                            M=1024: 1544 → 1431 µs against tiles taken two ahead; asking one stage before the end is 1 %
                            slower.
    STAGGER_STAGES   2      stages that the second consumer starts after the first. qwen3-30b-a3b in FP8: 0 ± 3 %.
    PERMUTE_FROM_N   4096   BF16: from this N on a pass brings rows into the order of experts; below it the loader
                            of the first product gathers them. Gathering slows that product by a twelfth, the pass costs
                            a share of the layer that falls with N. qwen3-30b-a3b (N=768): gathering costs 115 µs and
                            saves 221; mixtral (N=14336): the pass wins, 4894 → 4641 µs. In FP8 rows are quantised in
                            that pass, and it always pays: deepseek-v3 4 and 8 %, qwen3-30b-a3b 1 %.
    MXFP4_LOW_ROWS   64     up to so many rows per expert MXFP4 has blocks of 64 rows and six stages instead of three:
                            gpt-oss-120b with 8, 32 and 64 rows 771 → 695, 852 → 806, 1188 → 1179 µs, with 128
                            1556 → 1982.
    MXFP4_COPY_ROWS  1536   from so many rows per expert on a BF16 copy is multiplied: gpt-oss-20b with 2048 rows
                            5185 → 4983, with 1024 2724 → 2808; gpt-oss-120b with 512 5471 → 6775.
"""

from typing import Final

from moe_dispatch.problem import DType

BLOCK_M: Final = 128
TAIL_M: Final = 32
TALL_BLOCKS: Final = 1
FP8_TAIL_M: Final = 16
FP8_TALL_BLOCKS: Final = 2
STAGES: Final = 4
MAX_REGISTERS: Final = 168
QUEUE_SLOTS: Final = 2
LEAD_STAGES: Final = 4
STAGGER_STAGES: Final = 2
PERMUTE_FROM_N: Final = 4096
# Bytes of each row that a stage holds: the width of the widest swizzle that TMA and the tensor cores share.
STAGE_BYTES: Final = 128
# Rows that one load of activations spans, and spare rows in memory before the first; see `windows`.
WINDOW_ROWS: Final = 64
# Columns of a stage of MXFP4 weights: the four threads of a row have a block of 32, which shares an exponent, each.
MXFP4_BLOCK_K: Final = 128
MXFP4_LOW_BLOCK_M: Final = 64
MXFP4_LOW_ROWS: Final = 64
MXFP4_COPY_ROWS: Final = 1536
MXFP4_STAGES: Final = {MXFP4_LOW_BLOCK_M: 6, BLOCK_M: 3}

# A bound, in bytes, of the shared memory that a block of either product takes; a compile test holds it to that.
SHARED_MEMORY: Final[dict[DType, int]] = {"bf16": 225 << 10, "fp8": 221 << 10, "mxfp4": 209 << 10}


def permutes_rows(dtype: DType, N: int) -> bool:
    """Whether a pass brings rows into the order of experts before the first product; else its loader gathers them."""
    return dtype != "bf16" or N >= PERMUTE_FROM_N
