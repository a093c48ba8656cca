"""What our Triton backends are beside their kernels: needs, features of the device, and descriptors of weights.

Imports no Triton, so that a machine without it can still ask.
"""

import threading
import weakref
from typing import Any

from moe_dispatch.backend import Backend
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine, library_version
from moe_dispatch.problem import MoEProblem

from .triton_support import features, triton_reasons, triton_requirements


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

    def _descriptor(self, experts: ExpertWeights, name: str, shape: tuple[int, ...], block: tuple[int, ...]) -> Any:
        """The tensor descriptor of a weight seen in another shape, made once per layer and tile."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        key = (name, shape, block)
        made = self._descriptors.get(experts)
        if made is None or key not in made:
            descriptor = TensorDescriptor.from_tensor(getattr(experts, name).view(shape), list(block))
            with self._lock:
                made = self._descriptors.setdefault(experts, {})
                made.setdefault(key, descriptor)
        return made[key]
