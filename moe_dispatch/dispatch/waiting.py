"""When something that failed for want of memory is tried again: after so many calls that did without it."""

from dataclasses import dataclass
from typing import Final

# A try that fails frees the allocator's cache and waits for the device, a second at worst, where a call of this size
# takes a millisecond or more. Twice as many calls after each failure keep the tries few; not more than so many, as a
# server may run for months.
FIRST_WAIT: Final = 1024
LONGEST_WAIT: Final = 65536


@dataclass(slots=True, eq=False, kw_only=True)
class Waiting:
    """Counts the calls that do without. It takes no lock: threads may lose a count, or end it twice.

    Attributes:
        wait: How many calls do without after the last failure.
        left: How many of them are still to come; 0 where it may be tried again.
    """

    wait: int = 0
    left: int = 0

    def fail(self) -> None:
        """Begin to wait; the count begins anew where it has not ended, as parts of a call and threads fail in turn."""
        if self.left <= 0:
            self.wait = min(2 * self.wait, LONGEST_WAIT) or FIRST_WAIT
        self.left = self.wait

    def ends(self) -> bool:
        """Count a call that does without; whether it is the last one."""
        if self.left <= 0:
            return False
        self.left -= 1
        if self.left > 0:
            return False
        self.left = 0
        return True
