"""The order in which token counts are measured: coarse to fine, then where the winner changes."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from moe_dispatch.policies.measurements.schema import Identity, LayerShape

# Token counts that every layer gets before any gets the rest: enough to tell which candidates may win between them.
COARSE: Final = 5
# A boundary between two winners is refined until the ratio of its neighbouring token counts is at most this,
REFINE: Final = 1.5
# and only while each neighbour's winner is this much slower than the fastest at the other: that much can be lost there.
DISAGREE: Final = 0.025


def coarse_to_fine(tokens: Sequence[int]) -> list[int]:
    """The two ends first, then repeated halving, so that whatever was measured so far spans the range."""
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


def schedule(layers: Sequence[LayerShape], tokens: Sequence[int]) -> list[tuple[LayerShape, int]]:
    """Every layer at every token count: coarse for all layers, then fine, so that a budget is spent on all layers."""
    order = coarse_to_fine(tokens)
    return [(layer, M) for part in (order[:COARSE], order[COARSE:]) for layer in layers for M in part]


def boundaries(winners: Mapping[int, Identity], behind: Mapping[int, Mapping[Identity, float]]) -> Iterator[int]:
    """Token counts half way, logarithmically, between neighbours of which each one's winner loses at the other.

    Args:
        winners: Token count -> winner, of one layer in one mode.
        behind: Token count -> candidate -> its time over the fastest's there.
    """
    for lower, upper in itertools.pairwise(sorted(winners)):
        lost = min(
            behind.get(lower, {}).get(winners[upper], math.inf),
            behind.get(upper, {}).get(winners[lower], math.inf),
        )
        if lost > 1 + DISAGREE and upper / lower > REFINE:
            yield round(math.sqrt(lower * upper))
