"""What is known before anything is measured here: the published and measured habits of each backend.

The figures come from one H200 on 2026-11-23: whole layers under CUDA graphs, vLLM 0.20.2, DeepGEMM 2.5.0, torch 2.11
(docs/performance.md has the table). Our own Triton kernels have no figures in it, so they stand behind a peer that was
measured well, and first where no peer was measured at all. `moe-dispatch calibrate` replaces all of this.
"""

from typing import Final

from moe_dispatch.policy import Choice, Policy
from moe_dispatch.problem import MoEProblem

# From about this many rows per expert DeepGEMM's FP8 layer overtakes vLLM's: Mixtral (E=8) at 64 rows, Qwen3 (E=128)
# and DeepSeek-V3 (E=256) between 32 and 128.
FP8_PREFILL_ROWS: Final = 64
# In BF16 DeepGEMM's products reach .84–.91 of the floor from here on, and vLLM's layer falls to .5–.76. Those are
# DeepGEMM's two products alone: that its layer wins, with the stages around them, is inferred and was not measured.
BF16_PREFILL_ROWS: Final = 256
# Up to here a layer reads weights and hardly computes: what split-K was made for.
DECODE_TOKENS: Final = 64

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
    if rows >= (FP8_PREFILL_ROWS if problem.dtype == "fp8" else BF16_PREFILL_ROWS):
        why = f"fastest grouped products measured on an H200 at prefill, and this is {rows:.0f} rows per expert"
        return (("deep_gemm", why), _vllm("next at prefill"), *_ours(problem), *_torch(problem))
    if problem.M <= DECODE_TOKENS:
        best = _vllm("fastest layer measured on an H200 at decode (M ≤ 64)")
    else:
        best = _vllm(f"fastest layer measured on an H200 at {rows:.3g} rows per expert")
    return (best, *_ours(problem), *_torch(problem), ("deep_gemm", "pads every expert, which few rows do not repay"))


def _ours(problem: MoEProblem) -> Ranked:
    splitk = ("triton_splitk", "ours for decode: splits K until the memory system is full")
    persistent = ("triton_persistent", "ours for many rows, and FP8: one wave of programs and no padding")
    # In FP8 split-K quantises activations in every program's loop: 4 times persistent's time at M=1 on an H200.
    decode = problem.M <= DECODE_TOKENS and problem.dtype != "fp8"
    return (splitk, persistent) if decode else (persistent, splitk)


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
