"""Our backend for middle and large token counts on Hopper."""

import functools
import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from moe_dispatch.activations import KINDS, UNGATED
from moe_dispatch.arrived_rows import TravellingRows
from moe_dispatch.backend import BackendConfig, Inputs, Requirements
from moe_dispatch.backends.gluon_hopper.config import GluonHopperConfig
from moe_dispatch.backends.gluon_hopper.products import hopper_products
from moe_dispatch.backends.gluon_hopper.tiles import (
    MXFP4_BLOCK_K,
    MXFP4_COPY_ROWS,
    SHARED_MEMORY,
    WINDOW_ROWS,
    permutes_rows,
)
from moe_dispatch.backends.stages.combine import Out, combine
from moe_dispatch.backends.stages.dequantize import dequantized
from moe_dispatch.backends.stages.order_columns import ordered_width
from moe_dispatch.backends.stages.route import route
from moe_dispatch.backends.triton_common.backend import TritonBackend
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.numerics import QuantizedRows
from moe_dispatch.problem import MoEProblem
from moe_dispatch.system.libraries import library_version

if TYPE_CHECKING:
    from moe_dispatch.backends.triton_common.replay import Replay

# Gluon is experimental and changes with every Triton. The kernels were compiled under each of these releases.
FIRST_TRITON: Final = (3, 6)
LAST_TRITON: Final = (3, 9)


class GluonHopperBackend(TritonBackend):
    """Grouped products by warp-specialised kernels.

    The stages: route, [permute or quantise], gate-up with the activation inside, down, combine. In a product one
    program runs on every multiprocessor: a scheduler warp takes tiles from a counter, loader warps fill a ring of
    stages, two warp groups multiply. Deterministic: rows are placed in the order of their slots, and nothing is added
    atomically. MXFP4 weights become BF16 in the consumers' registers, or in a copy that many rows repay.
    """

    name = "gluon_hopper"
    config_type = GluonHopperConfig
    stores_to_peers = starts_before_arrival = True
    # The loader copies whole stages of 128 bytes of K, TMA needs rows that start on 16 bytes, and an FP8 tile is whole
    # blocks of scales: 128 columns of h, 256 of the output. Not FP16: experts' rows are stored before they are weighted
    # and summed, and above 65504 they would be infinite where their sum is not.
    requirements = Requirements(
        dtypes=dict.fromkeys(("bf16", "fp8", "mxfp4"), (9, 0)),
        act_dtypes=frozenset({"bf16"}),
        activations=KINDS - UNGATED,
        bias=True,
        interleaved=True,
        transposed=True,
        multiples={"bf16": {"K": 64, "N": 8}, "fp8": {"K": 256, "N": 128}, "mxfp4": {"K": 32, "N": 32}},
        max_capability=dict.fromkeys(("bf16", "fp8", "mxfp4"), (9, 1)),
    )

    def reasons_of_dtypes(self, problem: MoEProblem) -> tuple[str, ...]:
        """See `TritonBackend.reasons_of_dtypes`."""
        return (*super().reasons_of_dtypes(problem), *_gluon_reasons(self.machine.triton))

    def least_shared_memory(self, problem: MoEProblem) -> int:
        """See `TritonBackend.least_shared_memory`: tiles are fixed, and there are none but for Hopper."""
        hopper = self.machine.capability is not None and self.machine.capability[0] == 9
        return SHARED_MEMORY.get(problem.dtype, 0) if hopper else 0

    def workspace_bytes(self, problem: MoEProblem, config: BackendConfig) -> int:
        """See `Backend.workspace_bytes`."""
        element = 1 if problem.fp8 else 2
        rows = problem.slots + WINDOW_ROWS
        if self.reads_whole_layer(problem):
            problem = replace(problem, dtype="bf16")
            copied = 2 * (problem.gate_up_rows + problem.N) * problem.K * problem.E
            return copied + self.workspace_bytes(problem, config)
        block = MXFP4_BLOCK_K if problem.dtype == "mxfp4" else 1
        K, N = (ordered_width(columns, block) for columns in (problem.K, problem.N))
        permuted = rows * K * element if permutes_rows(problem.dtype, problem.N) else 0
        return permuted + rows * N * element + problem.slots * (problem.K * 2 + 8)

    def reads_whole_layer(self, problem: MoEProblem) -> bool:
        """See `Backend.reads_whole_layer`."""
        return _copies(problem, problem.slots)

    def takes_quantized_rows(self, problem: MoEProblem) -> bool:
        """See `Backend.takes_quantized_rows`."""
        return True

    def launch(
        self,
        hidden_states: Tensor | QuantizedRows | TravellingRows,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,
        out: Out,
    ) -> Out:
        """See `TritonBackend.launch`.

        Where the first product's loader gathers tokens, it copies vectors of 16 bytes: hidden_states that do not start
        on 16 bytes (a view into a flat buffer) are copied to fresh memory first.
        """
        assert isinstance(config, GluonHopperConfig)  # noqa: S101 - the dispatcher made it from config_type
        if _copies(experts, topk_ids.numel()):
            experts = dequantized(experts, torch.bfloat16)
        gathers = not permutes_rows(experts.dtype, experts.N)
        if gathers and isinstance(hidden_states, Tensor) and hidden_states.data_ptr() % 16:
            hidden_states = hidden_states.clone()
        routing = route(topk_ids, experts.E, pdl=True)
        y = hopper_products(
            hidden_states, experts, routing, topk_ids.shape[1], config.group_m, self._features.sms, self._descriptors
        )
        return combine(y, routing.row_of_slot, topk_weights, out, pdl=True)

    def fast_path(self, inputs: Inputs, config: BackendConfig) -> "Replay | None":
        """See `Backend.fast_path`: None where weights are copied, of which a replay knows no address."""
        return None if _copies(inputs[1], inputs[3].numel()) else super().fast_path(inputs, config)


def _copies(layer: MoEProblem | ExpertWeights, slots: int) -> bool:
    """Whether MXFP4 weights are copied to BF16 first, whose product needs whole stages of K.

    All experts that the router chooses among count, because slots of experts elsewhere are no rows here.
    """
    choices = layer.routed_experts or layer.E
    return layer.dtype == "mxfp4" and layer.K % 64 == 0 and slots >= MXFP4_COPY_ROWS * choices


@functools.cache
def _gluon_reasons(triton: str) -> tuple[str, ...]:
    """Why a machine's version of Triton cannot compile the kernels; found without importing it."""
    if not triton:
        return ()  # a reason of every Triton backend
    version = tuple(int(part) for part in re.findall(r"\d+", triton)[:2])
    if not FIRST_TRITON <= version <= LAST_TRITON:
        known = f"{_dotted(FIRST_TRITON)} to {_dotted(LAST_TRITON)}"
        return (f"needs Triton {known}, under whose Gluon its kernels are known to compile, got {triton}",)
    if triton == library_version("triton") and not _has_gluon():
        return (f"needs triton.experimental.gluon for Hopper, which the installed Triton {triton} lacks",)
    return ()


def _has_gluon() -> bool:
    """Whether the installed Triton has Gluon's modules for Hopper; some builds of Triton leave them out."""
    spec = importlib.util.find_spec("triton")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return any(Path(folder, "experimental/gluon/language/nvidia/hopper").is_dir() for folder in folders)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
