"""Errors of a call that reached the dispatcher. Each carries the problem, or the backend to blame."""

from collections.abc import Mapping, Sequence

from moe_dispatch.errors import MoEDispatchError, way_out
from moe_dispatch.problem import MoEProblem
from moe_dispatch.system import failures


class BackendUnsupportedError(MoEDispatchError):
    """The backend named by the caller cannot run this problem. Nothing else was tried in its place.

    Args:
        backend: The backend's name.
        problem: The problem that it was to run.
        reasons: Every reason why it cannot.
        variable: The environment variable that names the backend; empty if the caller does.
    """

    def __init__(self, backend: str, problem: MoEProblem, reasons: Sequence[str], variable: str = "") -> None:
        self.backend, self.problem, self.reasons = backend, problem, tuple(reasons)
        lines = "\n".join(f"  - {reason}" for reason in reasons)
        super().__init__(f"backend {backend!r} is named and cannot run {problem}:\n{lines}\n{way_out(variable)}")


class BackendFailedError(MoEDispatchError):
    """A backend accepted the problem and then raised, where nothing may run in its place; the cause is chained.

    Args:
        backend: The backend's name.
        problem: The problem that it ran.
        cause: What it raised.
        remedy: What to do, a sentence.
    """

    def __init__(self, backend: str, problem: MoEProblem, cause: BaseException, remedy: str) -> None:
        self.backend, self.problem = backend, problem
        super().__init__(f"backend {backend!r} failed on {problem}: {failures.summary(cause)}. {remedy}")


class NoBackendError(MoEDispatchError):
    """No backend can run the problem. The message lists every backend's reasons."""

    def __init__(self, problem: MoEProblem, reasons: Mapping[str, Sequence[str]]) -> None:
        self.problem, self.reasons = problem, {name: tuple(why) for name, why in reasons.items()}
        lines = [f"no backend can run {problem}:"]
        for name, why in self.reasons.items():
            lines.append(f"  {name}:")
            lines += [f"    - {reason}" for reason in why]
        super().__init__("\n".join(lines))


class DeviceLostError(MoEDispatchError):
    """The CUDA context is lost (illegal access, device-side assert): only a new process can go on.

    Args:
        suspects: Names of the backends that may have caused it; empty if none is known.
        cause: The error that CUDA reported.
        certain: Whether they did: it was the awaited first run of a backend.
    """

    def __init__(self, suspects: Sequence[str], cause: BaseException, *, certain: bool = True) -> None:
        self.suspects = tuple(suspects)
        names = " or ".join(repr(name) for name in suspects)
        ran = f"the last MoE backend to run was {names}, which is only a suspect and not quarantined; " if names else ""
        blame = (
            f"Culprit: {names}; it is quarantined for this problem and will be avoided after a restart. "
            "`moe-dispatch doctor` lists the quarantine, `moe-dispatch doctor --reset` lifts it."
            if certain
            else f"CUDA reports such errors late: {ran}CUDA_LAUNCH_BLOCKING=1 finds the culprit."
        )
        first = (str(cause).splitlines() or ["no message"])[0]
        super().__init__(
            f"the CUDA context of this process is lost ({type(cause).__name__}: {first}). {blame} Restart the process."
        )
