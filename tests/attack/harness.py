"""What every attack has in common: how many inputs, how long each may take, and what may come of it.

An input may end in the right answer or in an exception of this package with a message that says what to do. Any other
exception, a hang and a wrong answer fail the test, and Hypothesis reduces the input to the smallest that still fails.
"""

import contextlib
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, TypeVar

from hypothesis import HealthCheck, Phase, settings

from moe_dispatch.errors import MoEDispatchError, MoEDispatchWarning

LIMIT_S: Final = 30.0  # for one input; the slowest takes a fraction of a second on an idle machine
LARGE: Final = "large"
SMALL: Final = "small"
_SHARE: Final = 200  # how many times fewer inputs the small profile has
LONGEST_MESSAGE: Final = 20_000  # characters

Answer = TypeVar("Answer")


@dataclass
class Figures:
    """By area, how many inputs ran to an accepted end, how many of them were refused, and the longest time of one."""

    inputs: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    slowest_s: dict[str, float] = field(default_factory=dict)

    def add(self, other: "Figures") -> None:
        for total, part in ((self.inputs, other.inputs), (self.refused, other.refused)):
            for area, count in part.items():
                total[area] = total.get(area, 0) + count
        for area, seconds in other.slowest_s.items():
            self.slowest_s[area] = max(self.slowest_s.get(area, 0.0), seconds)


FIGURES: Final = Figures()
profile = SMALL  # set from the command line before the tests are imported


def attack(inputs: int) -> settings:
    """Hypothesis settings for a test.

    Args:
        inputs: Number of inputs in the large profile. The small one, of every test run, has a small share of them and
            draws the same ones each time.
    """
    large = profile == LARGE
    return settings(
        max_examples=inputs if large else max(inputs // _SHARE, 3),
        derandomize=not large,
        database=None,
        deadline=None,  # `watched` has a limit that also ends a hang
        print_blob=True,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def watched(area: str) -> Iterator[None]:
    """Run one input: count it, and fail if it takes longer than `LIMIT_S`.

    A hang in native code does not see the signal; pytest-timeout's thread ends the process then.
    """
    begin = time.monotonic()
    before = signal.signal(signal.SIGALRM, _hung)
    left, _ = signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MoEDispatchWarning)  # a backend that is passed over is warned of
            yield
    except _HungError as error:
        raise AssertionError(f"this input took longer than {LIMIT_S:g} s") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - begin), 0.1) if left else 0.0)
        signal.signal(signal.SIGALRM, before)
    FIGURES.inputs[area] = FIGURES.inputs.get(area, 0) + 1
    FIGURES.slowest_s[area] = max(FIGURES.slowest_s.get(area, 0.0), time.monotonic() - begin)


def answer_or_refusal(area: str, run: Callable[[], Answer]) -> Answer | MoEDispatchError:
    """What a call returns, or the exception of this package that it raises; any other exception passes through."""
    try:
        return run()
    except MoEDispatchError as error:
        assert_complete(str(error))
        FIGURES.refused[area] = FIGURES.refused.get(area, 0) + 1
        return error


def assert_complete(message: str) -> None:
    """A message is a sentence that can be read: not empty, not endless, and no bare repr of another exception."""
    assert len(message.split()) >= 5, f"too short a message: {message!r}"
    assert len(message) <= LONGEST_MESSAGE, f"a message of {len(message)} characters: {message[:500]!r}"
    assert "Traceback" not in message


class _HungError(BaseException):
    """Raised by the timer. No `Exception`: code under attack must not catch it as a failure of a backend."""


def _hung(_signum: int, _frame: object) -> None:
    raise _HungError
