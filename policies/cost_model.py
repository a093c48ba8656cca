"""What a layer should cost on a backend: a sum of terms that a person can name, with fitted coefficients.

The wave model of RaMP (arXiv 2604.26039) extended by traffic and arithmetic: a grid of tiles runs in waves over the
multiprocessors, and the last wave costs as much as a full one. Coefficients are not negative, so every one of them
reads as a rate or an overhead, and the model stays sane outside the measured range.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

from moe_dispatch.problem import ELEMENT_BYTES, MoEProblem

TERMS: Final = (
    "launch µs",
    "weights µs/GB",
    "activations µs/GB",
    "flops µs/TFLOP",
    "waves µs/wave",
    "experts µs/expert",
)
# Tiles of a backend that does not say: the middle of what grouped kernels use.
_BLOCK_M, _BLOCK_N = 64, 128
_SWEEPS: Final = 2000


def features(problem: MoEProblem, config: Mapping[str, int | str | bool], sms: int) -> tuple[float, ...]:
    """The value of each of `TERMS` for a problem, under uniform routing.

    Args:
        problem: What is asked.
        config: ``block_m`` and ``block_n`` are used where they are given.
        sms: Multiprocessors of the device.
    """
    hit = problem.expected_experts
    rows = problem.slots / hit if hit else 0.0
    block_m, block_n = (_number(config, "block_m", _BLOCK_M), _number(config, "block_n", _BLOCK_N))
    tiles_m = hit * math.ceil(rows / block_m)
    # A wave lasts as long as its reduction: K in the first product, N in the second.
    waves = math.ceil(tiles_m * math.ceil(problem.gate_up_rows / block_n) / sms) * problem.K
    waves += math.ceil(tiles_m * math.ceil(problem.K / block_n) / sms) * problem.N
    row_bytes = (2 * problem.K + problem.gate_up_rows + problem.N) * ELEMENT_BYTES[problem.act_dtype]
    return (
        1.0,
        hit * problem.expert_bytes / 1e9,
        problem.slots * row_bytes / 1e9,
        problem.flops / 1e12,
        waves * block_m * block_n / (1 << 26),
        hit,
    )


def predict(coefficients: Sequence[float], values: Sequence[float]) -> float:
    """Time in µs."""
    return math.fsum(c * x for c, x in zip(coefficients, values, strict=True))


def fit(rows: Sequence[tuple[Sequence[float], float]]) -> tuple[float, ...]:
    """Coefficients of least relative squared error, none of them negative.

    Coordinate descent on the normal equations of the columns scaled to one; with this few terms it reaches the optimum
    of the non-negative problem (Franc, Hlaváč and Navara, "Sequential coordinate-wise algorithm for the non-negative
    least squares problem", CAIP 2005).

    Args:
        rows: Values of the terms, and the measured time in µs.
    """
    scaled = [[value / us for value in values] for values, us in rows]
    norms = [math.sqrt(math.fsum(row[j] ** 2 for row in scaled)) or 1.0 for j in range(len(TERMS))]
    columns = [[row[j] / norms[j] for row in scaled] for j in range(len(TERMS))]
    gram = [[math.fsum(a * b for a, b in zip(one, other, strict=True)) for other in columns] for one in columns]
    gradient = [-math.fsum(column) for column in columns]  # of ½‖A·x − 1‖² at x = 0
    solution = [0.0] * len(TERMS)
    for _ in range(_SWEEPS):
        moved = 0.0
        for j in range(len(TERMS)):
            if gram[j][j] <= 0.0:
                continue
            value = max(0.0, solution[j] - gradient[j] / gram[j][j])
            step = value - solution[j]
            if step:
                solution[j] = value
                gradient = [g + step * gram[i][j] for i, g in enumerate(gradient)]
                moved = max(moved, abs(step))
        if moved < 1e-12:
            break
    return tuple(value / norm for value, norm in zip(solution, norms, strict=True))


def _number(config: Mapping[str, int | str | bool], name: str, default: int) -> int:
    value = config.get(name, default)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default
