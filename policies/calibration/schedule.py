"""Which token counts a calibration measures when: coarse to fine, then where the winner changes."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from moe_dispatch.policies.measurements.schema import Layer
from moe_dispatch.policies.measurements.table import Identity

# Token counts that every layer gets before any gets the others: enough to tell who may win between them.
COARSE: Final = 5
REFINE: Final = 1.5  # boundaries are refined until the neighbours are this close
# and only where each neighbour's winner loses this much at the other, so that much can be lost between them.
DISAGREE: Final = 0.025


def coarse_to_fine(tokens: Sequence[int]) -> list[int]:
    """The ends first, then halves: whatever the budget, what was measured spans the range."""
    order: list[int] = []
    spans = [(0, len(tokens) - 1)]
    for index in (0, len(tokens) - 1):
        if tokens[index] not in order:
            order.append(tokens[index])
    while spans:
        lower, upper = spans.pop(0)
        if upper - lower > 1:
            middle = (lower + upper) // 2
            order.append(tokens[middle])
            spans += [(lower, middle), (middle, upper)]
    return order


def schedule(layers: Sequence[Layer], tokens: Sequence[int]) -> list[tuple[Layer, list[int]]]:
    """Coarse for all layers, then fine for all: whatever the time is enough for, it was spent on every layer."""
    order = coarse_to_fine(tokens)
    return [(layer, part) for part in (order[:COARSE], order[COARSE:]) for layer in layers if part]


def boundaries(winners: Mapping[int, Identity], behind: Mapping[int, Mapping[Identity, float]]) -> Iterator[int]:
    """Token counts half way, logarithmically, between neighbours of which each one's winner loses at the other.

    Args:
        winners: Of one layer in one mode, by token count.
        behind: Token count -> candidate -> its time over the fastest's there.
    """
    for lower, upper in itertools.pairwise(sorted(winners)):
        lost = min(
            behind.get(lower, {}).get(winners[upper], math.inf),
            behind.get(upper, {}).get(winners[lower], math.inf),
        )
        if lost > 1 + DISAGREE and upper / lower > REFINE:
            yield round(math.sqrt(lower * upper))
