"""Imports other packages' backends in a process of its own first: an import may hang, or end its process."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from typing import Final

from moe_dispatch.policies.calibration.worker_process import worker_environment
from moe_dispatch.registry import BACKENDS

# What a module raises is told by the real import. The byte comes unless the import hangs or ends the process.
_PROGRAM: Final = """
import importlib, os, sys
try:
    importlib.import_module(sys.argv[1])
except BaseException:
    pass
os.write(int(sys.argv[2]), b".")
os._exit(0)
"""


def import_faults(names: Iterable[str], timeout_s: float) -> dict[str, str]:
    """Why backends may not be imported in this process, by name.

    Only modules of other packages are tried, and only those that are not imported yet. An import of more than
    `timeout_s` seconds counts as hung.
    """
    faults: dict[str, str] = {}
    tried: dict[str, str] = {}
    for name in names:
        module = BACKENDS.module(name)
        if not module or module in sys.modules or module.startswith("moe_dispatch."):
            continue
        if module not in tried:
            tried[module] = _fault(module, timeout_s)
        if tried[module]:
            faults[name] = tried[module]
    return faults


def _fault(module: str, timeout_s: float) -> str:
    ended, to_write = os.pipe()
    process = subprocess.Popen(  # noqa: S603 - our own program under our own interpreter
        [sys.executable, "-P", "-c", _PROGRAM, module, str(to_write)],
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(to_write,),
        env=worker_environment(),
        start_new_session=True,
    )
    os.close(to_write)
    os.set_blocking(ended, False)  # the other end may be held by a process that the import started
    try:
        process.wait(timeout_s)
        hung = False
    except subprocess.TimeoutExpired:
        hung = True
    finally:
        # It may have started others, which live on in its group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    with os.fdopen(ended, "rb", buffering=0) as pipe:
        imported = bool(pipe.read(1))
    if hung:
        return f"the import of {module} did not end within {timeout_s:.0f} s"
    cause = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    return "" if imported else f"the import of {module} ends its process with {cause}"
