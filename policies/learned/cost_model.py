"""What the time of a layer is made of: the terms of a cost model for waves of tiles, each for its own part of the work.

A backend's time is their sum, each times a coefficient that is fitted to its measurements (`fit`) and says how much of
that part it does. All are in µs at nominal rates, so that a backend at those rates that does each part once would have
ones. So few terms, with coefficients that cannot be negative, can be carried to shapes that nobody measured: what is
fitted is how much is read, multiplied and moved, not what happened to win.
"""

import math
from typing import Final, Literal, get_args

from moe_dispatch.problem import MoEProblem

Term = Literal["launch", "search", "weights", "tiles", "overlap", "slots", "tokens"]
TERMS: Final[tuple[Term, ...]] = get_args(Term)
# Nominal bytes and operations per µs; any of the right order will do.
_BANDWIDTH: Final = 4.3e6
_FP8_RATE: Final = 1.3e9
_RATE: Final = 7e8
_SEARCH_US: Final = 0.01


def terms(problem: MoEProblem) -> dict[Term, float]:
    """Each part of the work, in µs.

    ``launch`` is 1; ``search`` grows with E, among which every stage looks for work; ``weights`` reads those of the
    hit experts; ``tiles`` multiplies tiles of 64 rows, the last of each expert not full; ``overlap`` is the longer one
    of reading weights and multiplying tiles of 128 rows, which run at once; ``slots`` and ``tokens`` move M·topk and M
    rows of K columns.
    """
    weights = problem.expected_experts * problem.expert_bytes / _BANDWIDTH
    row = problem.K * 2 / _BANDWIDTH
    return {
        "launch": 1.0,
        "search": problem.E * _SEARCH_US,
        "weights": weights,
        "tiles": _multiplied(problem, 64),
        "overlap": max(weights, _multiplied(problem, 128)),
        "slots": problem.slots * row,
        "tokens": problem.M * row,
    }


def rows_per_expert(problem: MoEProblem) -> float:
    """On average, of all experts."""
    return problem.slots / problem.E


def _multiplied(problem: MoEProblem, rows: int) -> float:
    """Time to multiply tiles of so many rows."""
    each = 2 * rows * problem.K * (problem.gate_up_rows + problem.N)
    return _tiles(problem, rows) * each / (_FP8_RATE if problem.dtype == "fp8" else _RATE)


def _tiles(problem: MoEProblem, rows: int) -> float:
    """Tiles that hold the rows of all experts under uniform routing.

    An expert needs its first tile if it is hit, and one more for each multiple of `rows` that its load exceeds. Loads
    are nearly Poisson, and where there is more than one tile nearly normal.
    """
    load = rows_per_expert(problem)
    most = math.ceil((load + 6 * math.sqrt(load)) / rows)
    exceeding = (math.erfc((i * rows + 0.5 - load) / math.sqrt(2 * load)) / 2 for i in range(1, most + 1))
    return problem.expected_experts + problem.E * math.fsum(exceeding)
