"""What our Triton backends are beside their kernels: needs, features of the device, and descriptors of weights.

Imports no Triton, so that a machine without it can still ask.
"""

import logging
import threading
import weakref
from typing import Any

from moe_dispatch.backend import Backend, BackendConfig, Inputs, Run
from moe_dispatch.backends.triton_common.features import features, triton_reasons, triton_requirements
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine
from moe_dispatch.problem import MoEProblem
from moe_dispatch.system.libraries import library_version

logger = logging.getLogger(__name__)


class TritonBackend(Backend):
    """A backend whose kernels are compiled by Triton."""

    requirements = triton_requirements()
    needs_probe = False

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._features = features(machine)
        self._descriptors: weakref.WeakKeyDictionary[ExpertWeights, dict[tuple[object, ...], Any]] = (
            weakref.WeakKeyDictionary()
        )
        self._lock = threading.Lock()

    def further_reasons(self, problem: MoEProblem) -> tuple[str, ...]:
        """See `Backend.further_reasons`."""
        return triton_reasons(self.machine, problem)

    def measured_versions(self) -> dict[str, str]:
        """See `Backend.measured_versions`: our source and Triton's compiler make the code that was timed."""
        return {"triton": self.machine.triton, "moe_dispatch": library_version("moe_dispatch")}

    def fast_path(self, inputs: Inputs, config: BackendConfig) -> Run | None:
        """See `Backend.fast_path`: the launches of `run`, without looking again for what they are."""
        hidden_states, experts, _, _ = inputs
        if not hidden_states.is_cuda:
            return None
        from moe_dispatch.backends.triton_common.replay import NotReplayableError, record

        kept = self._descriptors.get(experts, {})
        try:
            return record(self, inputs, config, kept, lambda layer, key: self._descriptor(layer, *key))
        except NotReplayableError as reason:
            logger.info("%s with %s stays without a replay: %s", self.name, config.label, reason)
            return None

    def _descriptor(
        self,
        experts: ExpertWeights,
        name: str,
        shape: tuple[int, ...],
        block: tuple[int, ...],
        swapped: tuple[int, int] | None = None,
    ) -> Any:
        """The tensor descriptor of a weight seen in another shape, made once per layer and tile.

        Args:
            experts: The layer.
            name: Of its weight.
            shape: What the weight is viewed as.
            block: The boxes that are loaded, in the view's dimensions, after they are swapped.
            swapped: Two dimensions of the view that change places.
        """
        from triton.tools.tensor_descriptor import TensorDescriptor

        from moe_dispatch.backends.triton_common.fast_launch import hold

        key = (name, shape, block, swapped)
        made = self._descriptors.get(experts)
        if made is None or key not in made:
            view = getattr(experts, name).view(shape)
            view = view.transpose(*swapped) if swapped else view
            descriptor = hold(TensorDescriptor.from_tensor(view, list(block)))
            with self._lock:
                made = self._descriptors.setdefault(experts, {})
                made.setdefault(key, descriptor)
        return made[key]
