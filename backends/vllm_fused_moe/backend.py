"""The vLLM backend."""

from typing import ClassVar, Final

from torch import Tensor

from moe_dispatch.backend import Backend, BackendConfig, Requirements
from moe_dispatch.backends.stages.mask_slots import mask_slots
from moe_dispatch.backends.vllm_fused_moe.layers import ACTIVATIONS, expert_map, layer
from moe_dispatch.backends.vllm_fused_moe.library import INSTALL_HINT, assigns_by_slot, load
from moe_dispatch.backends.vllm_fused_moe.nan_tokens import mark_nan_tokens
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.problem import QUANT_BLOCK, MoEProblem

# vLLM's sorting kernel gives each expert a thread of one block of 1024, rounds them up to whole warps and needs one to
# spare; one expert more stands for all that this layer does not have.
_MAX_EXPERTS: Final = 991
# vLLM's quantisation of activations reads vectors of so many bytes, whatever address the rows start at.
_ALIGNMENT: Final = 16


class VllmFusedMoEBackend(Backend):
    """The Triton kernels of vLLM with vLLM's own tuned configurations.

    vLLM reads an id without checking that there is such an expert. So ids outside 0…E-1 are first replaced on the
    device: by -1 where each slot gets a block of its own (vLLM's kernel writes zeros for it), else by E, which
    `expert_map` maps to no expert; then vLLM clears its buffer before the sum.

    Block FP8 activations keep fp32 multipliers; see `library.require_fp32_scales`.

    `run_into` copies the result: `fused_experts` returns memory of its own.

    A token with a NaN (in FP8 also one with an infinite element) would come out finite where vLLM clamps: its FP8
    quantisation turns NaN into -448, its swiglu_oai into the limit. There `mark_nan_tokens` takes the place of
    `mask_slots`. A NaN that arises within an FP8 layer, from a NaN among gate_up's weights, is lost all the same.
    """

    name = "vllm_fused_moe"
    requirements = Requirements(
        dtypes={"bf16": (8, 0), "fp16": (8, 0), "fp8": (8, 9), "fp8_channel": (8, 9)},
        activations=frozenset(ACTIVATIONS),
        bias=True,
        interleaved=True,
        libraries=("vllm",),
        # vLLM's quantisation of activations (K, and N for the second product) takes whole groups only, and per token
        # reads whole vectors.
        multiples={"fp8": {"K": QUANT_BLOCK, "N": QUANT_BLOCK}, "fp8_channel": {"K": _ALIGNMENT, "N": _ALIGNMENT}},
    )
    # FP8: the first product is rounded to BF16 before it is quantised again, so some codes fall on the other side.
    tolerance: ClassVar = {"bf16": 1e-2, "fp16": 2e-3, "fp8": 3e-2, "fp8_channel": 3e-2}
    install_hint = INSTALL_HINT

    def further_reasons(self, problem: MoEProblem) -> tuple[str, ...]:
        """See `Backend.further_reasons`."""
        reasons = []
        if problem.interleaved != (problem.activation == "swiglu_oai"):
            order = "alternating" if problem.interleaved else "gate first"
            reasons.append(
                f"takes alternating gate and up rows with swiglu_oai and gate rows first with the others, "
                f"got {problem.activation} with rows {order}"
            )
        if problem.E > _MAX_EXPERTS:
            reasons.append(f"sorts at most {_MAX_EXPERTS} experts, got E={problem.E}")
        return tuple(reasons)

    def workspace_bytes(self, problem: MoEProblem, config: BackendConfig) -> int:
        """See `Backend.workspace_bytes`."""
        plain = problem.slots * (max(problem.gate_up_rows, problem.K) + problem.N) * 2
        return plain + (problem.M * problem.K + problem.slots * problem.N if problem.fp8 else 0)

    def measured_versions(self) -> dict[str, str]:
        """See `Backend.measured_versions`."""
        return {**super().measured_versions(), "triton": self.machine.triton}

    def run(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,  # vLLM looks its configuration up itself
    ) -> Tensor:
        """See `Backend.run`.

        Raises:
            BackendUnavailableError: vLLM does not load, or would round FP8 multipliers.
        """
        library = load()
        described = layer(library, experts)
        if hidden_states.data_ptr() % _ALIGNMENT:
            hidden_states = hidden_states.clone()  # a view into a flat buffer
        M, topk = topk_ids.shape
        by_slot = assigns_by_slot(library, M, topk, experts.E)
        masked, fp8 = -1 if by_slot else experts.E, experts.fp8
        if fp8 or experts.activation == "swiglu_oai":
            topk_weights, topk_ids = mark_nan_tokens(
                hidden_states, topk_weights, topk_ids, experts.E, masked, infinite=fp8
            )
        else:
            topk_ids = mask_slots(topk_ids, experts.E, masked)
        return library.fused_experts(
            hidden_states=hidden_states,
            w1=experts.gate_up,
            w2=experts.down,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=described.activation,
            global_num_experts=experts.E if by_slot else experts.E + 1,
            expert_map=None if by_slot else expert_map(experts.E, experts.device),
            quant_config=described.quant_config,
            **library.options,
        )
