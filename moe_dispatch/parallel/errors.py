"""Errors of a layer that is spread over ranks. They are raised on every rank, or on every rank but the failing one."""

from collections.abc import Mapping, Sequence

from moe_dispatch.errors import InvalidInputError, MoEDispatchError


class ExpertParallelLostError(MoEDispatchError):
    """A rank is dead, late or failed, and the call cannot be completed; no later call of this group can.

    Args:
        ranks: Global ranks that are to blame; empty where the others all report the same failure.
        call: The number of the call, counted from 1 on every rank.
        why: What was seen.
    """

    def __init__(self, ranks: Sequence[int], call: int, why: str) -> None:
        self.ranks, self.call = tuple(ranks), call
        which = f"rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}" if ranks else "a rank"
        super().__init__(
            f"expert parallelism lost {which} in call {call}: {why}. Restart the ranks of the group together: a group "
            "does not form again without a lost rank"
        )


class ExpertParallelMismatchError(InvalidInputError):
    """Ranks do not agree on what they are to do together; every rank raises, and nothing was launched.

    Args:
        what: What they do together, for the message: ``"call 3"``.
        differing: Name of a fact -> its value on each rank, in the order of the group.
        ranks: Global ranks, in the same order.
        remedy: What to do, a sentence.
    """

    def __init__(
        self, what: str, differing: Mapping[str, Sequence[object]], ranks: Sequence[int], remedy: str = ""
    ) -> None:
        self.differing = dict(differing)
        lines = [f"the ranks disagree in {what}:"]
        for name, values in differing.items():
            each = ", ".join(f"{value!r} on rank {rank}" for rank, value in zip(ranks, values, strict=True))
            lines.append(f"  {name}: {each}")
        super().__init__("\n".join([*lines, *filter(None, [remedy])]))
