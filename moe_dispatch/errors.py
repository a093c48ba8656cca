"""Exceptions and warnings of this package. Each message says what was passed, what is allowed, and what to do."""

import difflib
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Final

# Of a longer name, path or value without a space, a message repeats this many characters: the first and the last.
FIRST: Final = 150
LAST: Final = 50
_LONG_WORD: Final = re.compile(rf"(\S{{{FIRST}}})\S+(\S{{{LAST}}})")


class MoEDispatchError(Exception):
    """Base of every error that this package raises on purpose.

    Args:
        message: The message. Its long words, which come from outside, are shortened.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(_LONG_WORD.sub(r"\1…\2", message))


class InvalidInputError(MoEDispatchError, ValueError):
    """A tensor or an argument that no backend could take; raised before anything is launched."""


class UnknownNameError(MoEDispatchError, LookupError):
    """A backend, policy, workload or machine that is not known under this name.

    Args:
        kind: What the name should have named, for the message: ``"backend"``.
        name: The unknown name.
        known: The known names.
        variable: The environment variable that held the name, if one did.
    """

    def __init__(self, kind: str, name: str, known: Sequence[str], variable: str = "") -> None:
        self.kind, self.name, self.known = kind, name, tuple(known)
        origin = f"{variable} names {name!r}, and " if variable else ""
        similar = _similar(str(name), known)
        suggestion = f" (did you mean {' or '.join(similar)}?)" if similar else ""
        super().__init__(f"{origin}no {kind} is called {name!r}{suggestion}; known: {', '.join(sorted(known))}")


def _similar(name: str, known: Sequence[str]) -> list[str]:
    """Known names that a mistyped or shortened one may stand for, at most three."""
    lower = {each.lower(): each for each in known}
    wanted = name.lower().rpartition("/")[2][:80]
    near = difflib.get_close_matches(wanted, lower, n=3, cutoff=0.7)
    longer = [each for each in lower if len(wanted) > 2 and each.startswith(wanted)]
    return [lower[each] for each in dict.fromkeys([*longer, *near])][:3]


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


def way_out(variable: str) -> str:
    """How to have a named backend replaced where it cannot; `variable` named it, or the caller if that is empty."""
    how = f"Unset {variable}, which names it," if variable else "Leave `backend` out"
    return f"{how} to let the policy choose."


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
