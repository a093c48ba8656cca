"""How much device memory a choice may take beside its inputs and output, and why one that takes more is left out.

Limits are shares of the memory that the device has, not of what is free: choices are made once for a kind of call, are
the same on all ranks of a group, and are explained for machines that are not here. What is free is found out by the
run: see `dispatch/fitting.py`.
"""

from typing import Final

from moe_dispatch.backend import Backend, BackendConfig
from moe_dispatch.errors import BackendUnavailableError
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import LAST_RESORT

# A configuration may take this share of the device's memory whether its backend offers it for the problem or not: most
# choices are configurations that were measured at another token count.
CONFIG_SHARE: Final = 1 / 32
# A backend may take this share, in any configuration.
BACKEND_SHARE: Final = 1 / 8
# Beyond it a backend may take what the slots' rows take, so many times: so many tokens need as much on any backend.
ROWS: Final = 2


def excess(backend: Backend, problem: MoEProblem, config: BackendConfig) -> str:
    """Why the workspace of a configuration speaks against running a problem with it; empty if nothing does.

    Nothing speaks against the last resort, beside which there would be no other.

    A configuration that is carried to more tokens than it was measured at, or to a device with less memory, may take
    many times what its backend would: DeepGEMM's masked layout has M rows for each of the E experts.
    """
    if backend.name == LAST_RESORT:
        return ""
    memory = backend.machine.memory_bytes
    needed = backend.workspace_bytes(problem, config)
    if needed <= memory * CONFIG_SHARE or not memory:
        return ""
    takes = f"takes {gibibytes(needed)} of workspace at M={problem.M}: more than"
    try:
        offered = max(backend.workspace_bytes(problem, each) for each in backend.configs(problem))
    except BackendUnavailableError:  # it fails to answer, which is a reason of its own
        offered = needed
    if needed > offered:
        share = f"1/{1 / CONFIG_SHARE:.0f} of the device's memory ({gibibytes(memory * CONFIG_SHARE)})"
        return f"{takes} {share}, and than any configuration that it offers there ({gibibytes(offered)})"
    if needed > max(memory * BACKEND_SHARE, ROWS * problem.rows_bytes):
        share = f"1/{1 / BACKEND_SHARE:.0f} of the device's memory ({gibibytes(memory * BACKEND_SHARE)})"
        return f"{takes} {share}, and than {ROWS} times the rows of all slots ({gibibytes(problem.rows_bytes)})"
    return ""


def gibibytes(size: float) -> str:
    """A number of bytes for a person: ``"12.3 GiB"``."""
    return f"{size / 2**30:.1f} GiB"
