"""The terms of a cost model for waves of tiles: each is the time of one part of a layer's work.

The predicted time of a backend is the sum of the terms, each times a coefficient that is fitted to the backend's
measurements (see `fit`). Terms are in µs at nominal rates, so a coefficient says how often the backend does that part
of the work; a backend that did each part once at those rates would have ones. With so few terms, and coefficients that
cannot be negative, a fit carries over to shapes that were not measured: it learns how much is read, multiplied and
moved, and not which backend happened to win. Every backend reads the weights and multiplies the rows, so that the
roofline's coefficient has a lower bound: what is left to the other terms is small, and a fit carries over to a device
with other rates, where each term is scaled by its own.
"""

import math
from typing import Final, Literal, get_args

from moe_dispatch.problem import MoEProblem, stored_bytes

Term = Literal["launch", "search", "weights", "tiles", "roofline", "slots", "tokens"]
TERMS: Final[tuple[Term, ...]] = get_args(Term)
# Nominal bytes and operations per µs, those of an H200; coefficients scale them.
_BANDWIDTH: Final = 4.3e6
_FP8_RATE: Final = 1.3e9
_RATE: Final = 7e8
_SEARCH_US: Final = 0.01
_ROWS: Final = 64  # of a tile
_TAIL: Final = 6  # standard deviations, beyond which a normal load does not lie


def terms(problem: MoEProblem, bandwidth: float = 1.0, rate: float = 1.0) -> dict[Term, float]:
    """Each part of the work, in µs at nominal rates, in the order of `TERMS`.

    ``launch`` is 1. ``search`` grows with E, the number of experts among which every stage looks for work. ``weights``
    reads the weights of the hit experts. ``tiles`` multiplies tiles of 64 rows, the last one of each expert partly
    empty. ``roofline`` is the longer of reading the weights and multiplying the rows that there are. ``slots`` and
    ``tokens`` move the expected slots and M rows of K columns.

    Args:
        problem: The problem.
        bandwidth: Memory bandwidth of the device over that of the device which the coefficients were fitted on.
        rate: Its matrix rate over that of the same device.
    """
    bytes_per_us, flops_per_us = bandwidth * _BANDWIDTH, rate * _matrix_rate(problem)
    slots, elements = problem.expected_slots, problem.K * (problem.gate_up_rows + problem.N)  # of an expert's weights
    weights = problem.expected_experts * stored_bytes(problem.dtype, elements) / bytes_per_us
    row = problem.K * 2 / bytes_per_us
    product = 2 * elements / flops_per_us  # of one row
    return {
        "launch": 1.0,
        "search": problem.E * _SEARCH_US,
        "weights": weights,
        "tiles": _tiles(problem, _ROWS) * _ROWS * product,
        "roofline": max(weights, slots * product),
        "slots": slots * row,
        "tokens": problem.M * row,
    }


def rows_per_expert(problem: MoEProblem) -> float:
    """Rows per expert, averaged over all experts."""
    return problem.expected_slots / problem.E


def _matrix_rate(problem: MoEProblem) -> float:
    """Operations per µs."""
    # Without FP8 products the weights are dequantised, and multiplied as 16 bits.
    return _FP8_RATE if problem.fp8 and problem.has_fp8_products else _RATE


def _tiles(problem: MoEProblem, rows: int) -> float:
    """Expected number of tiles that hold the rows of all experts under uniform routing.

    An expert needs its first tile if it is hit, and one more for each multiple of `rows` that its load exceeds. Loads
    are nearly Poisson, and nearly normal where they exceed one tile.
    """
    load = rows_per_expert(problem)
    deviation = math.sqrt(load)
    if deviation > rows:
        # The sum below, of a curve that is smooth from one tile to the next: its integral, to nine digits.
        further = (load - 0.5) / rows - 0.5
    else:
        # All loads exceed the multiples up to `full`, and none those beyond `most`.
        full = max(0, math.floor((load - _TAIL * deviation) / rows))
        most = math.ceil((load + _TAIL * deviation) / rows)
        scale = math.sqrt(2) * deviation
        further = full + sum([math.erfc((i * rows + 0.5 - load) / scale) for i in range(full + 1, most + 1)]) / 2
    return problem.expected_experts + problem.E * further
