"""What ranks have to agree on before their first call, so that every later choice is the same on each of them."""

from typing import Any

import torch

from moe_dispatch.dispatch.dispatcher import Dispatcher
from moe_dispatch.settings import Settings
from moe_dispatch.system.version import installed_version


def facts(dispatcher: Dispatcher, configured: Settings, device: torch.device) -> dict[str, Any]:
    """What must be equal on every rank: a choice of the backend is a pure function of these and of the problem.

    Args:
        dispatcher: This rank's.
        configured: The values of its environment variables.
        device: Its device.
    """
    machine = dispatcher.machine
    return {
        "device": machine.name,
        "machine": machine.fingerprint,
        "version of torch": machine.torch,
        "version of Triton": machine.triton,
        **{f"version of {library}": version for library, version in library_versions(device).items()},
        "libraries": dict(machine.libraries),
        "MOE_DISPATCH_BACKEND": configured.backend,
        "MOE_DISPATCH_POLICY": configured.policies,
        "MOE_DISPATCH_MINIMIZE": configured.minimize,
        "MOE_DISPATCH_DISABLE": sorted(configured.disabled),
        "digest of the policies' tables": dispatcher.planner.tables_digest(),
    }


def barred_backends(dispatcher: Dispatcher) -> dict[str, tuple[str, ...]]:
    """Backends that this rank cannot use, or that its quarantine has for any problem, each with its reasons."""
    barred = {
        status.name: status.reasons for status in dispatcher.planner.statuses() if status.reasons
    }  # fmt: skip
    for entry in dispatcher.quarantine.entries():
        if entry.is_obeyed:
            barred.setdefault(entry.backend, (f"quarantined: {entry.cause}",))
    return barred


def library_versions(device: torch.device) -> dict[str, str]:
    """Versions of what carries tensors between devices."""
    nccl = torch.cuda.nccl.version() if device.type == "cuda" else ()
    return {"moe_dispatch": installed_version(), "NCCL": ".".join(map(str, nccl))}
