"""What is known before anything is measured here: the measured habits of each backend.

The figures come from one H200, 2026-11-23 and 24: whole layers of deepseek-v3, qwen3-30b-a3b and mixtral-8x7b under
CUDA graphs, vLLM 0.20.2, DeepGEMM 2.5.0, torch 2.11. Where no layer was measured, on other devices, our own kernels
come first and the libraries after them. `moe-dispatch calibrate` replaces all of this.
"""

from typing import Final

from moe_dispatch.policy import Choice, Policy
from moe_dispatch.problem import MoEProblem

# Up to here a layer reads weights and hardly computes. At 1, 4, 16 and 64 tokens split-K came to 1.01 of the floor in
# BF16 and .88 in FP8 (geometric means), the best peer of each point to .90 and .71.
DECODE_TOKENS: Final = 64
# From so many rows per expert DeepGEMM's products win: FP8 mixtral-8x7b at 64 (402 µs, and ours 405), deepseek-v3 from
# 64 on (3983, vLLM 4114); BF16 deepseek-v3 at 256 (12017, ours 12626). Below, our persistent kernels led vLLM by 4 to
# 16 %.
FP8_PREFILL_ROWS: Final = 64
BF16_PREFILL_ROWS: Final = 256
# In BF16 only for wide experts: what the layer around its products moves falls with N, and ours fuse it. At N=768 and
# 1536 ours took 2235 and 8604 µs for 16384 tokens of qwen3-30b-a3b and qwen3-235b, DeepGEMM's layer 2408 and 8936.
BF16_WIDE: Final = 2048

Ranked = tuple[tuple[str, str], ...]


class RulesPolicy(Policy):
    """Ranks by device class, dtype and rows per expert; a backend that cannot run the problem says so itself."""

    name = "rules"

    def rank(self, problem: MoEProblem) -> tuple[Choice, ...]:
        """See `Policy.rank`."""
        ranked = _ranked(problem)
        return tuple(Choice(backend, reason) for backend, reason in (*ranked, ("reference", "runs anywhere")))


def _ranked(problem: MoEProblem) -> Ranked:
    if problem.needs_grad:
        return ()
    if problem.device == "cpu":
        return (("torch_grouped", "one product per expert over sorted tokens; the reference searches per expert"),)
    if problem.capability and problem.capability[0] == 9:
        return _hopper(problem)
    return (*_ours(problem), *_libraries(problem))


def _hopper(problem: MoEProblem) -> Ranked:
    rows = problem.slots / problem.E
    if problem.M <= DECODE_TOKENS:
        return (*_ours(problem), _vllm("next at decode"), *_torch(problem), ("deep_gemm", "pads every expert"))
    fp8 = problem.dtype == "fp8"
    if rows >= (FP8_PREFILL_ROWS if fp8 else BF16_PREFILL_ROWS) and (fp8 or problem.N >= BF16_WIDE):
        why = f"fastest grouped products measured on an H200 at prefill, and this is {rows:.0f} rows per expert"
        return (("deep_gemm", why), *_ours(problem), *_torch(problem), _vllm("behind all of them at prefill"))
    few = ("deep_gemm", "pads every expert, which few rows do not repay")
    persistent, splitk = _ours(problem)
    return (persistent, _vllm(f"next on an H200 at {rows:.3g} rows per expert"), few, *_torch(problem), splitk)


def _ours(problem: MoEProblem) -> Ranked:
    splitk = ("triton_splitk", "ours for decode: splits the weights until the memory system is full")
    persistent = ("triton_persistent", "ours for more rows: one wave of programs and no padding")
    return (splitk, persistent) if problem.M <= DECODE_TOKENS else (persistent, splitk)


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
