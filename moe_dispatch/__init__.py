"""One call runs a Mixture-of-Experts layer on the fastest backend that this machine, dtype and token count allow.

from moe_dispatch import ExpertWeights, moe_forward

experts = ExpertWeights(gate_up, down)
out = moe_forward(hidden_states, experts, topk_weights, topk_ids)

The names below are imported on first use of any of them, so that ``moe-dispatch --help`` does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from moe_dispatch.api import explain, moe_forward, warm_up
    from moe_dispatch.backend import Backend, BackendConfig, Requirements
    from moe_dispatch.dispatch.errors import (
        BackendFailedError,
        BackendUnsupportedError,
        DeviceLostError,
        NoBackendError,
    )
    from moe_dispatch.dispatch.process import stats
    from moe_dispatch.errors import (
        BackendUnavailableError,
        InvalidInputError,
        MoEDispatchError,
        MoEDispatchWarning,
        PolicyFileError,
        UnknownNameError,
    )
    from moe_dispatch.experts import ExpertWeights
    from moe_dispatch.machine import Machine
    from moe_dispatch.modules.layer import MoELayer
    from moe_dispatch.parallel.errors import ExpertParallelLostError, ExpertParallelMismatchError
    from moe_dispatch.parallel.expert_parallel import ExpertParallel
    from moe_dispatch.parallel.sharded_experts import ShardedExperts
    from moe_dispatch.policy import Choice, Policy
    from moe_dispatch.problem import MoEProblem
    from moe_dispatch.registry import register_backend
    from moe_dispatch.routers import Router

    __version__: str

__all__ = [
    "Backend",
    "BackendConfig",
    "BackendFailedError",
    "BackendUnavailableError",
    "BackendUnsupportedError",
    "Choice",
    "DeviceLostError",
    "ExpertParallel",
    "ExpertParallelLostError",
    "ExpertParallelMismatchError",
    "ExpertWeights",
    "InvalidInputError",
    "Machine",
    "MoEDispatchError",
    "MoEDispatchWarning",
    "MoELayer",
    "MoEProblem",
    "NoBackendError",
    "Policy",
    "PolicyFileError",
    "Requirements",
    "Router",
    "ShardedExperts",
    "UnknownNameError",
    "__version__",
    "explain",
    "moe_forward",
    "register_backend",
    "stats",
    "warm_up",
]

_MODULES: Final = {
    "api": ("explain", "moe_forward", "warm_up"),
    "backend": ("Backend", "BackendConfig", "Requirements"),
    "dispatch.errors": ("BackendFailedError", "BackendUnsupportedError", "DeviceLostError", "NoBackendError"),
    "dispatch.process": ("stats",),
    "errors": (
        "BackendUnavailableError",
        "InvalidInputError",
        "MoEDispatchError",
        "MoEDispatchWarning",
        "PolicyFileError",
        "UnknownNameError",
    ),
    "experts": ("ExpertWeights",),
    "machine": ("Machine",),
    "modules.layer": ("MoELayer",),
    "parallel.errors": ("ExpertParallelLostError", "ExpertParallelMismatchError"),
    "parallel.expert_parallel": ("ExpertParallel",),
    "parallel.sharded_experts": ("ShardedExperts",),
    "policy": ("Choice", "Policy"),
    "problem": ("MoEProblem",),
    "registry": ("register_backend",),
    "routers": ("Router",),
}


if not TYPE_CHECKING:  # a type checker would take any name for an attribute

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from moe_dispatch.system.version import installed_version

            return installed_version()
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        # All of them at once: torch.compile cannot trace an import, should the first use of a name be inside a compiled
        # function.
        for module, names in _MODULES.items():
            loaded = importlib.import_module(f"{__name__}.{module}")
            globals().update({each: getattr(loaded, each) for each in names})
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
