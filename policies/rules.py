"""The ranking where nothing was measured on this machine: which backends are fast at which sizes.

The figures come from one H200, 2026-11-23 and 24: whole layers of the seven named models under CUDA graphs, vLLM
0.20.2, DeepGEMM 2.5.0, torch 2.11. On other devices, where no layer was measured, our own kernels come first and the
libraries after them. In FP8 the weights were block FP8; per-channel FP8, of which nothing was measured for these
rules, is ranked alike. `moe-dispatch calibrate` replaces all of this.
"""

from typing import Final

from moe_dispatch.policy import Choice, Policy
from moe_dispatch.problem import MoEProblem

# Up to this many tokens a layer is bound by reading weights, and split-K reads them fastest: at 1, 4, 16 and 64 tokens
# it reached 1.01 of the roofline in BF16 and .88 in FP8 (geometric means), the best baseline of each point .90 and .71.
DECODE_TOKENS: Final = 64
# Above so many tokens with so many rows per expert, uneven routing gives some experts more rows than a split-K tile
# has, and it reads their weights again: mixtral-8x7b in BF16 at 64 tokens takes 653 µs under uniform and 548 under
# Dirichlet-4 routing, by triton_persistent 680 and 320. Split-K is ahead with two rows (deepseek-v3), at 32 tokens in
# the mean of both routings, and where kernels have to convert weights (the H200 as an A100, FP8 at 64: 193 µs, 302). It
# is also where both products are one launch, as none starts before the one before has ended (before sm_90; the H200 as
# an A100): at 64 tokens under uniform and Dirichlet-4 routing mixtral-8x7b takes 656 and 576 µs, by triton_persistent
# 834 and 617; qwen3-30b-a3b 279 and 186, 352 and 231; a layer of 64 experts (K=2048, N=1024) 203 and 148, 245 and 194.
EVEN_DECODE_TOKENS: Final = 40
EVEN_DECODE_ROWS: Final = 4
# From this many rows per hit expert on, gluon_hopper's tiles of 128 rows are ahead of triton_persistent's of 64, two
# programs of which share a multiprocessor: in BF16 by 1 to 4 % at 4 to 16 rows of four layers (gpt-oss-120b is 2 %
# behind), in MXFP4 by 8 % at 8 rows.
GLUON_ROWS: Final = 4
# In BF16 it gains a share of the time and starts a few µs later, so that with fewer bytes to read it is ahead from more
# rows on only: half of qwen3-30b-a3b's experts (604 MB) at 32 rows take 170 µs, by triton_persistent 166.
GLUON_BYTES: Final = 1 << 30
GLUON_ROWS_OF_FEW_BYTES: Final = 48
# A tile of its second product has GLUON_COLUMNS columns. Where one block of rows of each expert makes fewer tiles than
# there are multiprocessors, many are idle when skewed routing hits few experts: mixtral-8x7b at 64 tokens takes as long
# as triton_persistent under uniform routing and three draws of Dirichlet-4, but 369 µs for 320 under a fourth.
H200_MULTIPROCESSORS: Final = 132
GLUON_COLUMNS: Final = 256
GLUON_ROWS_OF_FEW_TILES: Final = 24
# In FP8 two programs hide their epilogues better where loops are short: with N of 768 to 1536 triton_persistent is
# ahead by 1 to 3 % at 32 to 48 rows. At deepseek-v3 (N=2048) gluon_hopper is ahead by 3 % at 4 rows and by 12 % at 32.
GLUON_FP8_ROWS: Final = 56
GLUON_FP8_K: Final = 256  # columns that K consists of, or gluon_hopper does not run; gpt-oss has 2880
GLUON_FP8_ROWS_FROM_LONG_N: Final = 2
GLUON_LONG_N: Final = 2048
# From this many rows per expert on DeepGEMM's products are about as fast as ours.
PREFILL_ROWS: Final = 256
# From this many on they are faster in FP8: mixtral-8x7b at 16384 tokens 9067 µs for 9538, qwen3-235b 4612 for 4720. At
# 512 rows ours are ahead by 1 to 6 %, and in BF16 always.
FP8_PREFILL_ROWS: Final = 1024
# DeepGEMM's layer gathers and quantises K values per row before its products, and N between them, in separate passes,
# which only pay off with enough multiplications for each of those values. It is ahead at qwen3-235b (K·N/(K+N) = 1117),
# behind by 7 % at deepseek-v2-lite (834) and by 4 % at qwen3-30b-a3b (559).
FP8_WORK_PER_VALUE: Final = 1000

# The vector kernels read an expert's weights once for each of its slots, so nearly every slot must have an expert to
# itself (VECTOR_SHARING is slots per hit expert). They start sooner than tensor cores, which is felt only where reading
# takes little longer (bytes of the hit experts' weights). In FP8 converting the codes without tensor cores takes longer
# than reading them, unless N is too short for tensor cores, too: at M=4 qwen3-30b-a3b (131 MiB) takes 38.3 µs, and 43.9
# with tensor cores; kimi-k2-tp8 takes 57 for 59 with 163 MiB and 102 for 91 with 312; deepseek-v3 (336 MiB) 126 for 95.
VECTOR_SHARING: Final = 1.22
VECTOR_BYTES: Final = 1 << 30
VECTOR_FP8_BYTES: Final = 200 << 20
VECTOR_FP8_LONG_N_BYTES: Final = 64 << 20
VECTOR_LONG_N: Final = 1024
# Where e4m3 is converted by arithmetic (the H200 as an A100): one and two tokens of qwen3-30b-a3b (36 and 70 MiB) take
# 16.8 and 27.3 µs, 19.2 and 28.9 with tensor cores; of kimi-k2-tp8 (42 and 83 MiB) 26.6 and 43.0, 32.6 and 41.1. Longer
# N loses 26 to 72 %.
VECTOR_CONVERTED_BYTES: Final = 76 << 20
# Where their second product does not read all of a token's experts at once, one token still gains up to 5 % in BF16
# with so many bytes to read, or where it reads whole rows of several experts at once (deepseek-v2-lite: 29.2 µs, and
# 30.6 with tensor cores). By parts of rows it loses (gpt-oss-120b: 57.2, 55.2). More tokens lose 1 to 8 %.
VECTOR_APART_BYTES: Final = 256 << 20
# The second product reads all experts at once where a token has so few, with rows of N (rounded up to a power of two)
# so short, and both together so few; otherwise as many as the greatest power of two that divides topk, eight at most:
# `TritonVectorConfig.down_experts` of the default configuration.
VECTOR_EXPERTS: Final = 16
VECTOR_EXPERTS_AT_ONCE: Final = 8
VECTOR_N: Final = 2048
VECTOR_COLUMNS: Final = 8192

# Backends that are methods of one family, by the backend that names the family. These rules choose within a family, and
# the learned policy has one cost model for all of it: apart they would have to resolve less than their own errors
# (docs/lab-notebook.md, "Choosing").
FAMILIES: Final = {"triton_vector": "triton_splitk", "gluon_hopper": "triton_persistent"}

Ranked = tuple[tuple[str, str], ...]


class RulesPolicy(Policy):
    """Ranks by device class, dtype and rows per expert; a backend that cannot run the problem says so itself."""

    name = "rules"

    def rank(self, problem: MoEProblem) -> tuple[Choice, ...]:
        """See `Policy.rank`."""
        ranked = _ranked(problem)
        return tuple(Choice(backend, reason) for backend, reason in (*ranked, ("reference", "runs anywhere")))


def order(problem: MoEProblem) -> list[str]:
    """The names of the backends that the rules rank before the reference, best first."""
    return [backend for backend, _ in _ranked(problem)]


def _ranked(problem: MoEProblem) -> Ranked:
    if problem.needs_grad:
        return ()
    if problem.device == "cpu":
        return (("torch_grouped", "one product per expert over sorted tokens; the reference searches per expert"),)
    hopper = problem.capability is not None and problem.capability[0] == 9
    decode: Ranked = (("triton_splitk", "ours for decode: splits the weights until the memory system is full"),)
    without_sharing = vector_suits(problem)
    if without_sharing:
        decode = (("triton_vector", "ours for decode without sharing: weights straight into registers"), *decode)
    grouped, is_decode = _grouped(problem), _is_decode(problem)
    ours = (*decode, *grouped) if is_decode else (*grouped, *decode)
    ranked = _hopper(problem, decode, grouped, is_decode=is_decode) if hopper else (*ours, *_libraries(problem))
    if without_sharing:
        return ranked
    return (*ranked, ("triton_vector", "reads an expert's weights again for each of its slots"))


def _hopper(problem: MoEProblem, decode: Ranked, grouped: Ranked, *, is_decode: bool) -> Ranked:
    if is_decode:
        return (*decode, *grouped, _vllm("next at decode"), *_torch(problem), ("deep_gemm", "pads every expert"))
    rows = problem.expected_slots / problem.E
    work = problem.K * problem.N / (problem.K + problem.N)
    if problem.fp8 and rows >= FP8_PREFILL_ROWS and work >= FP8_WORK_PER_VALUE:
        why = f"fastest grouped products measured on an H200 at prefill, and this is {rows:.0f} rows per expert"
        return (("deep_gemm", why), *grouped, *decode, *_torch(problem), _vllm("behind all of them at prefill"))
    if rows >= PREFILL_ROWS:
        next_to_it = ("deep_gemm", "next at prefill on an H200: what surrounds its products is not fused")
        return (*grouped, next_to_it, *_torch(problem), _vllm("behind all of them at prefill"), *decode)
    few = ("deep_gemm", "pads every expert, which few rows do not repay")
    return (*grouped, _vllm(f"next on an H200 at {rows:.3g} rows per expert"), few, *_torch(problem), *decode)


def _is_decode(problem: MoEProblem) -> bool:
    few_rows = problem.expected_slots < EVEN_DECODE_ROWS * problem.E
    few_rows &= problem.capability != (9, 0) or not _many_rows(problem)
    one_launch = problem.dtype in ("bf16", "fp16") and problem.capability is not None and problem.capability < (9, 0)
    most = DECODE_TOKENS if few_rows or one_launch or _converts(problem) else EVEN_DECODE_TOKENS
    return most >= problem.M


def _converts(problem: MoEProblem) -> bool:
    """Whether kernels turn weights into the activations' dtype by arithmetic, without an instruction for it."""
    return problem.dtype == "mxfp4" or (problem.fp8 and not problem.has_fp8_products)


def _grouped(problem: MoEProblem) -> Ranked:
    persistent: Ranked = (("triton_persistent", "ours for more rows: one wave of programs and no padding"),)
    if problem.capability == (9, 0):
        gluon = ("gluon_hopper", "ours for many rows on Hopper: warp-specialised")
        persistent = (gluon, *persistent) if _many_rows(problem) else (*persistent, gluon)
    return persistent


def vector_suits(problem: MoEProblem) -> bool:
    """Whether the vector kernels are likelier to be fastest than split-K on tensor cores."""
    if problem.expected_slots > VECTOR_SHARING * problem.expected_experts:
        return False
    if problem.dtype == "mxfp4":
        return False  # they do not read it
    read = problem.expected_experts * problem.expert_bytes
    topk, columns = (1 << (length - 1).bit_length() for length in (problem.topk, problem.N))
    fits = topk <= VECTOR_EXPERTS and columns <= VECTOR_N and topk * columns <= VECTOR_COLUMNS
    at_once = problem.topk == 1 or fits
    if problem.fp8:
        short = problem.N <= VECTOR_LONG_N
        if _converts(problem):
            return at_once and short and read <= VECTOR_CONVERTED_BYTES
        return at_once and read <= (VECTOR_FP8_BYTES if short else VECTOR_FP8_LONG_N_BYTES)
    several = min(VECTOR_EXPERTS_AT_ONCE, problem.topk & -problem.topk)
    whole = several > 1 and columns <= VECTOR_N and several * columns <= VECTOR_COLUMNS
    apart = problem.M == 1 and (whole or read >= VECTOR_APART_BYTES)
    return (at_once or apart) and read <= VECTOR_BYTES


def _many_rows(problem: MoEProblem) -> bool:
    """Whether tiles of 128 rows are likelier to be faster than tiles of 64."""
    least = GLUON_ROWS
    if problem.fp8:
        if problem.K % GLUON_FP8_K:
            return False
        least = GLUON_FP8_ROWS_FROM_LONG_N if problem.N >= GLUON_LONG_N else GLUON_FP8_ROWS
    elif problem.dtype != "mxfp4" and problem.expected_experts * problem.expert_bytes < GLUON_BYTES:
        least = GLUON_ROWS_OF_FEW_BYTES
    elif problem.dtype != "mxfp4" and problem.E * problem.K < H200_MULTIPROCESSORS * GLUON_COLUMNS:
        least = GLUON_ROWS_OF_FEW_TILES
    return problem.expected_slots >= least * problem.expected_experts


def _libraries(problem: MoEProblem) -> Ranked:
    return (
        _vllm("a library kernel, not measured on this device"),
        ("deep_gemm", "not measured here"),
        *_torch(problem),
    )


def _torch(problem: MoEProblem) -> Ranked:
    fused = problem.dtype == "bf16" and problem.capability is not None and problem.capability[0] in (9, 10)
    return (("torch_grouped", "torch's grouped kernel" if fused else "torch's loop over experts, which waits for ids"),)


def _vllm(why: str) -> tuple[str, str]:
    return ("vllm_fused_moe", why)
