"""One call runs a Mixture-of-Experts layer on the fastest backend that this machine, dtype and token count allow.

from moe_dispatch import ExpertWeights, moe_forward

experts = ExpertWeights(gate_up, down)
out = moe_forward(hidden_states, experts, topk_weights, topk_ids)
"""

from moe_dispatch.api import explain, moe_forward, warm_up
from moe_dispatch.backend import Backend, BackendConfig, Requirements
from moe_dispatch.dispatch.errors import BackendFailedError, BackendUnsupportedError, DeviceLostError, NoBackendError
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
from moe_dispatch.policy import Choice, Policy
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import register_backend

__all__ = [
    "Backend",
    "BackendConfig",
    "BackendFailedError",
    "BackendUnavailableError",
    "BackendUnsupportedError",
    "Choice",
    "DeviceLostError",
    "ExpertWeights",
    "InvalidInputError",
    "Machine",
    "MoEDispatchError",
    "MoEDispatchWarning",
    "MoEProblem",
    "NoBackendError",
    "Policy",
    "PolicyFileError",
    "Requirements",
    "UnknownNameError",
    "explain",
    "moe_forward",
    "register_backend",
    "stats",
    "warm_up",
]
