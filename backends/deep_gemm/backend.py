"""The DeepGEMM backend."""

from typing import ClassVar, Final, Literal

from torch import Tensor

from moe_dispatch.backend import BackendConfig, Requirements, WritingBackend
from moe_dispatch.backends.deep_gemm.layouts import MaskedRows, PsumRows, Rows, expected_rows, layout_rows
from moe_dispatch.backends.deep_gemm.library import INSTALL_HINT, load, wheel_reasons
from moe_dispatch.backends.stages.combine import Out, combine
from moe_dispatch.backends.triton_common.features import stage_reasons, unrolled_reasons
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.numerics import QuantizedRows
from moe_dispatch.problem import QUANT_BLOCK, DType, MoEProblem
from moe_dispatch.system.libraries import library_version
from moe_dispatch.workspace import CONFIG_SHARE

Layout = Literal["masked", "psum"]

# Up to this many rows per expert the masked layout is the faster one on an H200: its tiles may be lower.
_FEW_ROWS: Final[dict[DType, int]] = {"bf16": 64, "fp8": 32}
_ROWS: Final[dict[Layout, type[Rows]]] = {"masked": MaskedRows, "psum": PsumRows}
# From this capability on DeepGEMM wants packed power-of-two multipliers.
_UE8M0: Final = (10, 0)


class DeepGemmConfig(BackendConfig):
    """How the rows of the experts lie in memory.

    Attributes:
        layout: ``"masked"``: a fixed number per expert, for few tokens. ``"psum"``: one expert after another, each on a
            tile.
    """

    layout: Layout = "psum"


class DeepGemmBackend(WritingBackend):
    """DeepGEMM's grouped GEMMs on Hopper, BF16 and block FP8.

    Tokens are gathered, and in FP8 quantised, straight into DeepGEMM's layout, with the multipliers as its TMA loads
    want them. The activation and the second quantisation are one pass, and so is the weighted sum. None of them touches
    padding.

    DeepGEMM compiles its kernels with nvcc on first use (seconds for each of a few variants per layer) and then takes
    32 MiB of workspace, so a layer must have run once for a token count before it is captured.
    """

    name = "deep_gemm"
    requirements = Requirements(
        dtypes={"bf16": (9, 0), "fp8": (9, 0)},
        bias=True,
        interleaved=True,
        libraries=("deep_gemm",),
        # BF16: DeepGEMM asserts multiples of 64 along the dimension that it sums over, K and then N. FP8: whole groups
        # of multipliers there. It would accept a partial group, which neither its own tests nor vLLM exercise.
        multiples={"bf16": {"K": 64, "N": 64}, "fp8": {"K": QUANT_BLOCK, "N": QUANT_BLOCK}},
        max_capability={"bf16": _UE8M0, "fp8": _UE8M0},
    )
    config_type = DeepGemmConfig
    stores_to_peers = True
    # FP8: the first product is rounded to BF16 before it is quantised again, so some codes fall on the other side.
    tolerance: ClassVar = {"bf16": 1e-2, "fp8": 3e-2}
    install_hint = INSTALL_HINT

    def unavailable_reasons(self) -> tuple[str, ...]:
        """See `Backend.unavailable_reasons`."""
        version = self.machine.libraries.get("deep_gemm", "")
        return (*super().unavailable_reasons(), *wheel_reasons(version, self.machine.torch))

    def measured_versions(self) -> dict[str, str]:
        """See `Backend.measured_versions`: the stages around the products are this package's Triton kernels."""
        libraries = super().measured_versions()
        return {
            **libraries,
            "deep_gemm_pdl": "on" if libraries["deep_gemm"] else "",  # see `library.load`
            "triton": self.machine.triton,
            "moe_dispatch": library_version("moe_dispatch"),
        }

    def further_reasons(self, problem: MoEProblem) -> tuple[str, ...]:
        """See `Backend.further_reasons`."""
        reasons = stage_reasons(self.machine) + unrolled_reasons(problem.topk)
        if problem.dtype == "fp8" and problem.capability is not None and problem.capability >= _UE8M0:
            reasons += ("takes packed power-of-two multipliers on sm_100, and the stages write fp32 ones",)
        return reasons

    def configs(self, problem: MoEProblem) -> tuple[DeepGemmConfig, ...]:
        """See `Backend.configs`."""
        masked, psum = DeepGemmConfig(layout="masked"), DeepGemmConfig(layout="psum")
        # It must hold every token of the call for every expert.
        if self.workspace_bytes(problem, masked) > self.machine.memory_bytes * CONFIG_SHARE:
            return (psum,)
        few = expected_rows(problem.slots, problem.routed_experts or problem.E) <= _FEW_ROWS[problem.dtype]
        return (masked, psum) if few else (psum, masked)

    def workspace_bytes(self, problem: MoEProblem, config: BackendConfig) -> int:
        """See `Backend.workspace_bytes`."""
        rows = layout_rows(_layout(config), problem.M, problem.topk, problem.E)
        # Values and multipliers of one input column, in bytes; outputs are BF16.
        column = 1 + 4 / QUANT_BLOCK if problem.dtype == "fp8" else 2
        first = problem.K * column + problem.gate_up_rows * 2
        middle = problem.gate_up_rows * 2 + problem.N * column
        second = problem.N * column + problem.K * 2
        return int(rows * max(first, middle, second))

    def takes_quantized_rows(self, problem: MoEProblem) -> bool:
        """See `Backend.takes_quantized_rows`."""
        return True

    def run_into(
        self,
        hidden_states: Tensor | QuantizedRows,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,
        out: Out,
    ) -> Out:
        """See `Backend.run_into`.

        Raises:
            BackendUnavailableError: DeepGEMM does not load.
        """
        rows = _ROWS[_layout(config)](load(), experts, topk_ids)
        # Each buffer is passed on without a name of its own, so that its memory is free for the next product.
        gate_up = rows.multiply(rows.fill(hidden_states), experts.gate_up, experts.gate_up_scale)
        inner = rows.activate(gate_up)
        del gate_up
        y = rows.multiply(inner, experts.down, experts.down_scale)
        return combine(
            y,
            rows.routing.row_of_slot,
            topk_weights,
            out,
            down_bias=experts.down_bias,
            topk_ids=topk_ids,
            pdl=rows.pdl,
        )


def _layout(config: BackendConfig) -> Layout:
    assert isinstance(config, DeepGemmConfig)  # noqa: S101 - the dispatcher makes it from config_type
    return config.layout
