"""The terms of a cost model of a layer: each is the time of one part of its work.

The predicted time of a backend is the sum of the terms, each times a coefficient that is fitted to the backend's
measurements (see `fit`). Terms are in µs at nominal rates, so a coefficient says how often the backend does that part
of the work; a backend that did each part once at those rates would have ones. With so few terms, and coefficients that
cannot be negative, a fit carries over to shapes that were not measured: it learns how much is read, multiplied and
moved, and not which backend happened to win. On a device with other rates each term is scaled by its own.
"""

import math
from typing import Final, Literal, get_args

from moe_dispatch.problem import MoEProblem, stored_bytes

Term = Literal["launch", "search", "weights", "roofline", "tokens"]
TERMS: Final[tuple[Term, ...]] = get_args(Term)
# Nominal bytes and operations per µs, those of an H200; coefficients scale them.
_BANDWIDTH: Final = 4.3e6
_FP8_RATE: Final = 1.3e9
_RATE: Final = 7e8
_SEARCH_US: Final = 0.01


def terms(problem: MoEProblem, bandwidth: float = 1.0, rate: float = 1.0) -> dict[Term, float]:
    """Each part of the work under uniform routing, in µs at nominal rates, in the order of `TERMS`.

    ``launch`` is 1. ``search`` grows with E, the number of experts among which every stage looks for work. ``weights``
    reads the weights of the hit experts. ``roofline`` reads them and multiplies the rows that there are; the longer of
    the two hides most of the shorter: it is the root of the sum of their squares, 1.4 times either where they are
    equal. ``tokens`` moves a row of K columns for each topk of the expected slots, which is one for each of the M
    tokens where the layer has all experts. Measured layers have, and the coefficient stands for all that grows with
    tokens. Where other ranks hold some experts most of that grows with the slots: half of qwen3-30b-a3b in BF16 takes
    537 µs for 8192 tokens on an H200, this says 510, and with a row for each of the M tokens it would say 584.

    Args:
        problem: The problem.
        bandwidth: Memory bandwidth of the device over that of the device which the coefficients were fitted on.
        rate: Its matrix rate over that of the same device.
    """
    bytes_per_us = bandwidth * _BANDWIDTH
    slots, elements = problem.expected_slots, problem.K * (problem.gate_up_rows + problem.N)  # of an expert's weights
    weights = problem.expected_experts * stored_bytes(problem.dtype, elements) / bytes_per_us
    products = slots * 2 * elements / (rate * _matrix_rate(problem))
    return {
        "launch": 1.0,
        "search": problem.E * _SEARCH_US,
        "weights": weights,
        "roofline": math.hypot(weights, products),
        "tokens": slots / problem.topk * problem.K * 2 / bytes_per_us,
    }


def rows_per_expert(problem: MoEProblem) -> float:
    """Rows per expert, averaged over all experts."""
    return problem.expected_slots / problem.E


def _matrix_rate(problem: MoEProblem) -> float:
    """Operations per µs."""
    # Without FP8 products the weights are dequantised, and multiplied as 16 bits.
    return _FP8_RATE if problem.fp8 and problem.has_fp8_products else _RATE
