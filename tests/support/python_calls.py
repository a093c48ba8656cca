"""What a piece of code calls: a measure of the host's work that no other process disturbs."""

import sys
from collections.abc import Callable


def python_calls(run: Callable[[], object]) -> list[str]:
    """The names of the Python functions that are called while `run` runs, its own among them."""
    calls: list[str] = []
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls
