"""What can go wrong, as types. Every message says what was given, what is allowed and what to do."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_dispatch.problem import MoEProblem


class MoEDispatchError(Exception):
    """Base of every error that this package raises on purpose."""


class InvalidInputError(MoEDispatchError, ValueError):
    """A tensor or an argument that no backend could take; raised before anything is launched."""


class UnknownNameError(MoEDispatchError, LookupError):
    """A backend, policy or workload that is not registered under this name.

    Args:
        kind: What was looked for.
        name: As given.
        known: Names that would do.
        variable: The environment variable that gave it, if one did.
    """

    def __init__(self, kind: str, name: str, known: Sequence[str], variable: str = "") -> None:
        self.kind, self.name, self.known = kind, name, tuple(known)
        origin = f"{variable} names {name!r}, and " if variable else ""
        super().__init__(f"{origin}no {kind} is called {name!r}; known: {', '.join(sorted(known))}")


class BackendUnavailableError(MoEDispatchError):
    """A backend's library is missing, does not import, or failed its probe.

    Args:
        backend: Its name.
        reasons: Each with its remedy.
        variable: The environment variable that asked for it, if one did.
    """

    def __init__(self, backend: str, reasons: Sequence[str], variable: str = "") -> None:
        self.backend, self.reasons = backend, tuple(reasons)
        text = f"backend {backend!r} is not available: {'; '.join(reasons)}"
        super().__init__(f"{text}. {way_out(variable)}" if variable else text)


class BackendUnsupportedError(MoEDispatchError):
    """The backend named by the caller cannot run this problem. Nothing else was tried in its place.

    Args:
        backend: Its name.
        problem: What it was asked for.
        reasons: All of them.
        variable: The environment variable that asked for it, if one did.
    """

    def __init__(self, backend: str, problem: "MoEProblem", reasons: Sequence[str], variable: str = "") -> None:
        self.backend, self.problem, self.reasons = backend, problem, tuple(reasons)
        lines = "\n".join(f"  - {reason}" for reason in reasons)
        super().__init__(f"backend {backend!r} was asked for and cannot run {problem}:\n{lines}\n{way_out(variable)}")


class BackendFailedError(MoEDispatchError):
    """A backend accepted the problem and then raised, where nothing may run in its place; the cause is chained.

    Args:
        backend: Its name.
        problem: What it was asked for.
        cause: What it raised.
        remedy: What to do, a sentence.
    """

    def __init__(self, backend: str, problem: "MoEProblem", cause: BaseException, remedy: str) -> None:
        self.backend, self.problem = backend, problem
        super().__init__(f"backend {backend!r} failed on {problem}: {type(cause).__name__}: {cause}. {remedy}")


def way_out(variable: str) -> str:
    """How to have a named backend replaced where it cannot; `variable` named it, or the caller if that is empty."""
    how = f"Unset {variable}, which names it," if variable else "Leave `backend` out"
    return f"{how} to let the policy choose."


class NoBackendError(MoEDispatchError):
    """No backend can run the problem; prints the problem and every backend's reasons."""

    def __init__(self, problem: "MoEProblem", reasons: Mapping[str, Sequence[str]]) -> None:
        self.problem, self.reasons = problem, {name: tuple(why) for name, why in reasons.items()}
        lines = [f"no backend can run {problem}:"]
        for name, why in self.reasons.items():
            lines.append(f"  {name}:")
            lines += [f"    - {reason}" for reason in why]
        super().__init__("\n".join(lines))


class DeviceLostError(MoEDispatchError):
    """The CUDA context is gone (illegal access, device-side assert): only a new process can go on."""

    def __init__(self, suspects: Sequence[str], cause: BaseException, *, certain: bool = True) -> None:
        self.suspects = tuple(suspects)
        names = " or ".join(repr(name) for name in suspects) or "unknown"
        blame = (
            f"Culprit: {names}; it is quarantined for this problem and will be avoided after a restart. "
            "`moe-dispatch doctor` lists the quarantine, `moe-dispatch doctor --reset` lifts it."
            if certain
            else f"CUDA reports such errors late: the last MoE backend to run was {names}, which had run well before, "
            "so it is not quarantined; CUDA_LAUNCH_BLOCKING=1 finds the culprit."
        )
        first = (str(cause).splitlines() or ["no message"])[0]
        super().__init__(
            f"the CUDA context of this process is lost ({type(cause).__name__}: {first}). {blame} Restart the process."
        )


class PolicyFileError(MoEDispatchError):
    """A calibration, table or model file that cannot be trusted: damaged, foreign, or of another schema."""


class MoEDispatchWarning(UserWarning):
    """A backend was quarantined or a policy refused; the call still returned the right answer."""


def warn(text: str) -> None:
    """Warn at the line that led here from outside this package: that one is the reader's."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "moe_dispatch":
        level, frame = level + 1, frame.f_back
    warnings.warn(text, MoEDispatchWarning, stacklevel=level)
