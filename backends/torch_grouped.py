"""PyTorch's own grouped GEMM over tokens sorted by expert."""

import itertools
from typing import ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dispatch.backend import BackendConfig, Requirements, WritingBackend
from moe_dispatch.backends.stages.activate import activate
from moe_dispatch.backends.stages.combine import combine
from moe_dispatch.backends.stages.dequantize import dequantized
from moe_dispatch.backends.stages.quantize import gather
from moe_dispatch.backends.stages.route import route
from moe_dispatch.backends.triton_common.features import stage_reasons, unrolled_reasons
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.problem import ELEMENT_BYTES, MX_BLOCK, MoEProblem

# Where torch has a grouped kernel (compute capability 9.x and 10.x), for BF16 only. Elsewhere it copies the offsets to
# the host and multiplies expert by expert.
_FUSED_MAJORS: Final = (9, 10)
# Its arguments are prepared by one block with a thread for each expert; torch 2.11 to 2.15 check "group_count < 1024"
# (aten/src/ATen/native/cuda/GroupMM.cu).
MOST_FUSED_EXPERTS: Final = 1023


class TorchGroupedBackend(WritingBackend):
    """Two `torch.nn.functional.grouped_mm` over the rows of the experts, side by side without padding.

    BF16 on compute capability 9.x and 10.x runs one kernel per product, without a host synchronisation. Anything else
    torch computes expert by expert, after it has waited for the offsets: correct, but not to be captured in a CUDA
    graph. That includes the CPU, where this is still the fastest that torch offers.

    MXFP4 weights are dequantised in every call, all of them.

    Slots with an id outside 0…E-1 leave rows past the last expert's end, which torch neither computes nor initialises
    and no stage reads.
    """

    name = "torch_grouped"
    requirements = Requirements(
        dtypes={"bf16": (8, 0), "fp16": (8, 0), "fp32": (8, 0), "mxfp4": (8, 0)},
        act_dtypes=frozenset({"bf16", "fp16", "fp32"}),
        cpu=True,
        bias=True,
        interleaved=True,
        transposed=True,
        # torch refuses operands whose rows do not start on 16 bytes.
        multiples={
            "bf16": {"K": 8, "N": 8},
            "fp16": {"K": 8, "N": 8},
            "fp32": {"K": 4, "N": 4},
            "mxfp4": {"K": MX_BLOCK, "N": MX_BLOCK},
        },
    )
    tolerance: ClassVar = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-3, "mxfp4": 1e-2}

    def further_reasons(self, problem: MoEProblem) -> tuple[str, ...]:
        """See `Backend.further_reasons`."""
        reasons: list[str] = []
        if problem.device == "cuda":
            reasons += stage_reasons(self.machine) + unrolled_reasons(problem.topk)
        fused = _fused(problem)
        if problem.mode == "graph" and not fused:
            where = "on a CPU" if problem.capability is None else "on sm_{}{}".format(*problem.capability)
            reasons.append(
                "can be captured in a CUDA graph for bf16 on compute capability 9.x and 10.x only, got "
                f"{problem.act_dtype} {where}, where torch copies the offsets to the host"
            )
        if fused and problem.E > MOST_FUSED_EXPERTS:
            reasons.append(f"torch's grouped kernel takes at most {MOST_FUSED_EXPERTS} experts, got E={problem.E}")
        return tuple(reasons)

    def workspace_bytes(self, problem: MoEProblem, config: BackendConfig) -> int:
        """See `Backend.workspace_bytes`."""
        # No more than two of the four buffers are alive at a time.
        widths = (problem.K, problem.gate_up_rows, problem.N, problem.K)
        widest = max(a + b for a, b in itertools.pairwise(widths))
        element = ELEMENT_BYTES[problem.act_dtype]
        copied = (problem.gate_up_rows + problem.N) * problem.K * problem.E if self.reads_whole_layer(problem) else 0
        computed = 4 if problem.device == "cpu" else 0  # there the stages compute in fp32, beside what they read
        return problem.slots * widest * (element + computed) + copied * element

    def reads_whole_layer(self, problem: MoEProblem) -> bool:
        """See `Backend.reads_whole_layer`."""
        return problem.dtype == "mxfp4"

    def measured_versions(self) -> dict[str, str]:
        """See `Backend.measured_versions`."""
        return {"torch": self.machine.torch}

    def run_into(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,  # torch chooses its tiles itself
        out: Tensor,
    ) -> Tensor:
        """See `Backend.run_into`."""
        # grouped_mm stores rows in the dtype of its operands, so FP16 ones have to be weighted before; see `activate`.
        weighted = hidden_states.dtype == torch.float16
        experts = dequantized(experts, hidden_states.dtype)
        routing = route(topk_ids, experts.E, by_row=False)
        gate_up = F.grouped_mm(
            gather(hidden_states, routing, topk_ids.shape[1]), experts.gate_up.transpose(1, 2), offs=routing.ends
        )
        inner = activate(
            gate_up,
            routing,
            experts.activation,
            interleaved=experts.interleaved,
            bias=experts.gate_up_bias,
            topk_ids=topk_ids,
            topk_weights=topk_weights if weighted else None,
        )
        del gate_up  # so that the allocator can hand its memory to the product that follows
        y = F.grouped_mm(inner, experts.down.transpose(1, 2), offs=routing.ends)
        return combine(
            y,
            routing.row_of_slot,
            topk_weights,
            out,
            down_bias=experts.down_bias,
            topk_ids=topk_ids,
            weighted=weighted,
        )


def _fused(problem: MoEProblem) -> bool:
    capability = problem.capability
    return problem.act_dtype == "bf16" and capability is not None and capability[0] in _FUSED_MAJORS
