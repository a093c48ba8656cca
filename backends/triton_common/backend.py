"""The base class of our Triton backends: needs, features of the device, tensor descriptors, replays.

Imports no Triton, so that a machine without it can still ask.
"""

import logging
import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
from torch import Tensor

from moe_dispatch.backend import BackendConfig, Inputs, RunInto, WritingBackend
from moe_dispatch.backends.triton_common.descriptors import Descriptors, WeightView
from moe_dispatch.backends.triton_common.features import (
    MOST_UNROLLED,
    features,
    triton_reasons,
    triton_requirements,
    unrolled_reasons,
)
from moe_dispatch.backends.triton_common.quantization import Quantization, quantization, quantization_of
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine
from moe_dispatch.problem import DType, MoEProblem
from moe_dispatch.system.libraries import library_version

if TYPE_CHECKING:
    from moe_dispatch.backends.triton_common.replay import Replay

logger = logging.getLogger(__name__)

MAX_KINDS: Final = 1024  # kinds of call of which a backend keeps replays; when full, all are dropped and made again


class TritonBackend(WritingBackend):
    """A backend whose kernels are compiled by Triton.

    Subclasses write `launch`, choose their kernels by `_features`, say by `least_shared_memory` what the smallest of
    them takes, get tensor descriptors of weights from `_descriptor`, and launch `fast_launch` kernels only, so that
    calls can be repeated as replays.
    """

    requirements = triton_requirements()
    needs_probe = False
    most_topk: ClassVar[float] = MOST_UNROLLED  # `combine` and its like unroll a loop over it
    most_slots: ClassVar[float] = math.inf  # M·topk, above which kernels that were made for decode do not run

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._features = features(machine)
        self._descriptors = Descriptors()
        self._reasons_of_dtypes: dict[tuple[DType, DType], tuple[str, ...]] = {}
        # By kind of call, for token counts of ranges that do not overlap.
        self._replays: dict[tuple[object, ...], list[Replay]] = {}

    def further_reasons(self, problem: MoEProblem) -> tuple[str, ...]:
        """See `Backend.further_reasons`."""
        dtypes = problem.dtype, problem.act_dtype
        if (reasons := self._reasons_of_dtypes.get(dtypes)) is None:
            reasons = self._reasons_of_dtypes[dtypes] = self.reasons_of_dtypes(problem)
        if problem.topk > self.most_topk:
            reasons += unrolled_reasons(problem.topk)
        if (slots := problem.M * problem.topk) > self.most_slots:
            reasons += (f"made for decode: needs M·topk ≤ {self.most_slots}, got {slots}",)
        if problem.dtype not in self.requirements.dtypes:
            return reasons  # there are no configurations to ask for their memory
        needed, available = self.least_shared_memory(problem), self._features.shared_memory
        if needed > available:
            reasons += (f"needs {needed} bytes of shared memory for a block, got {available}",)
        return reasons

    def reasons_of_dtypes(self, problem: MoEProblem) -> tuple[str, ...]:
        """The reasons against a problem that follow from the machine and the two dtypes; asked once for each pair."""
        return triton_reasons(self.machine, problem)

    @abstractmethod
    def least_shared_memory(self, problem: MoEProblem) -> int:
        """Bytes of shared memory that a block of the smallest configuration for a problem takes, or a bound of them.

        On a device that offers as many to a block, `configs` has at least one configuration.
        """

    def quantizes_activations(self, problem: MoEProblem) -> bool:
        """See `Backend.quantizes_activations`: not where the kernels dequantise the weights."""
        return not quantization_of(problem).dequantizes

    def _quantization(self, experts: ExpertWeights) -> Quantization:
        """How the layer's weights are multiplied here."""
        return quantization(experts.dtype, fp8=self._features.fp8)

    def measured_versions(self) -> dict[str, str]:
        """See `Backend.measured_versions`: our source and Triton's compiler make the code that was timed."""
        return {"triton": self.machine.triton, "moe_dispatch": library_version("moe_dispatch")}

    @abstractmethod
    def launch(self, *call: Any) -> Any:
        """Launch the kernels of `Backend.run_into`, whose arguments these are, or what stands for them in a replay."""

    def run_into(self, *call: Any) -> Any:
        """See `Backend.run_into`: by a replay, where calls of this or another token count have left one."""
        replay = self._replay(*call) if isinstance(call[0], Tensor) and isinstance(call[-1], Tensor) else None
        return self.launch(*call) if replay is None else replay.into(*call)

    def _replay(self, *call: Any) -> "Replay | None":
        M = call[0].shape[0]
        for replay in self._replays.get(_kind_of_call(*call), ()):
            if replay.tokens.first <= M <= replay.tokens.last:
                return replay
        return None

    def fast_path(self, inputs: Inputs, config: BackendConfig) -> "Replay | None":
        """See `Backend.fast_path`: a replay of the launches of `run`, where they can be repeated (see `replay`)."""
        if not inputs[0].is_cuda:
            return None
        from moe_dispatch.backends.triton_common.replay import record
        from moe_dispatch.backends.triton_common.stand_ins import NotReplayableError

        replay = self._replay(*inputs, config)
        if replay is None:
            try:
                replay = record(self, self.launch, inputs, config)
            except NotReplayableError as reason:
                logger.info("%s with %s stays without a replay: %s", self.name, config.label, reason)
                return None
            if len(self._replays) >= MAX_KINDS:
                self._replays.clear()
            replays = self._replays.setdefault(_kind_of_call(*inputs, config), [])
            replays[:] = [*(each for each in replays if each.tokens.last), replay]  # without those that failed
        return replay

    def fast_path_into(self, inputs: Inputs, config: BackendConfig) -> RunInto | None:
        """See `Backend.fast_path_into`: the same replay, whose last launch writes to the caller's memory."""
        replay = self.fast_path(inputs, config)
        return None if replay is None else replay.into

    def _descriptor(
        self,
        experts: ExpertWeights,
        name: str,
        shape: tuple[int, ...],
        block: tuple[int, ...],
        swapped: tuple[int, int] | None = None,
    ) -> Any:
        """The tensor descriptor of a layer's weight as it lies in memory now.

        Shape, block and swapped dimensions are those of `WeightView`; shape and block count weights, of the memory
        where those are stored by columns.
        """
        view = WeightView(shape, block, swapped, experts.transposed)
        if experts.dtype == "mxfp4":  # an element of the view has four columns
            columns, width = shape[-1] // 4, block[-1] // 4
            view = WeightView((*shape[:-1], columns), (*block[:-1], width), swapped, element=torch.int16)
        return self._descriptors.get(getattr(experts, name), view)


def _kind_of_call(
    hidden_states: Tensor, experts: ExpertWeights, _: Tensor, topk_ids: Tensor, config: BackendConfig, *_out: Tensor
) -> tuple[object, ...]:
    """What calls of one replay have in common, beside what that checks itself."""
    return experts.spec, hidden_states.dtype, topk_ids.dtype, topk_ids.shape[1], config
