"""A map of the fastest backends by layer and M, with their fractions of the roofline, as an SVG picture."""

from collections import Counter
from collections.abc import Mapping
from html import escape
from itertools import groupby
from typing import Final

from moe_dispatch.benchmarks.rows import BenchRow

# All lengths in pixels.
LABELS: Final = 130  # for the names of layers
TOP: Final = 26  # for the title
WIDTH: Final = 62  # of a cell
HEIGHT: Final = 36
LEGEND: Final = 140  # for each name of a backend
TEXT_STYLE: Final = "text{font:13px sans-serif;fill:#333;text-anchor:middle}.start{text-anchor:start}"
STYLE: Final = (
    f"{TEXT_STYLE}.end{{text-anchor:end}}.cells{{font-size:11px;fill:#fff}}.lines{{stroke:#fff;stroke-width:2}}"
)


def winners_map(winners: Mapping[tuple[str, int], BenchRow], colours: Mapping[str, str]) -> str:
    """Draw the fastest rows by workload and M; `colours` is by the name of the backend."""
    workloads = sorted({workload for workload, _ in winners})
    tokens = common_tokens(winners)
    table = {workload: [winners.get((workload, M)) for M in tokens] for workload in workloads}
    right, bottom = LABELS + WIDTH * len(tokens), TOP + HEIGHT * len(workloads)
    any_row = next(iter(winners.values()))
    title = f"Fastest in {any_row.dtype}, with its fraction of the roofline: {any_row.machine}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right} {bottom + 80}" style="background:#fff">',
        f'<style>{STYLE}</style><text class="start" x="{LABELS}" y="16">{escape(title)}</text>',
    ]
    names = sorted({row.backend for rows in table.values() for row in rows if row})
    for number, name in enumerate(names):
        x, y = LABELS + LEGEND * number, bottom + 56
        runs = "".join(_runs(name, rows, TOP + HEIGHT * i) for i, rows in enumerate(table.values()))
        lines += [
            f'<path fill="{colours[name]}" d="M{x} {y}h16v16h-16z{runs}"/>',
            f'<text class="start" x="{x + 22}" y="{y + 13}">{escape(name)}</text>',
        ]
    between = [f"M{LABELS + WIDTH * i} {TOP}V{bottom}" for i in range(1, len(tokens))]
    between += [f"M{LABELS} {TOP + HEIGHT * i}H{right}" for i in range(1, len(workloads))]
    lines.append(f'<path class="lines" d="{"".join(between)}"/>')
    for i, (workload, rows) in enumerate(table.items()):
        y = TOP + HEIGHT * i + HEIGHT // 2 + 4
        numbers = (
            f'<tspan x="{_middle(column)}">{row.fraction:.2f}</tspan>'
            for column, row in enumerate(rows)
            if row and row.fraction
        )
        lines += [
            f'<text class="end" x="{LABELS - 8}" y="{y}">{escape(workload)}</text>',
            f'<text class="cells" y="{y}">{"".join(numbers)}</text>',
        ]
    lines += [f'<text x="{_middle(i)}" y="{bottom + 18}">{M}</text>' for i, M in enumerate(tokens)]
    lines.append(f'<text x="{(LABELS + right) // 2}" y="{bottom + 38}">tokens M</text>')
    return "\n".join([*lines, "</svg>\n"])


def common_tokens(winners: Mapping[tuple[str, int], BenchRow]) -> list[int]:
    """The columns of a map: the token counts that most workloads have.

    A calibration refines a layer's boundaries at token counts that other layers lack; their columns would have holes.
    """
    measured = Counter(M for _, M in winners)
    workloads = {workload for workload, _ in winners}
    return sorted(M for M in measured if 4 * measured[M] > 3 * len(workloads))


def _middle(column: int) -> int:
    return LABELS + WIDTH * column + WIDTH // 2


def _runs(name: str, rows: list[BenchRow | None], y: int) -> str:
    """The outlines of a backend's neighbouring cells in one row."""
    outlines, column = "", 0
    for winner, run in groupby(row.backend if row else "" for row in rows):
        length = WIDTH * len(list(run))
        if winner == name:
            outlines += f"M{LABELS + column} {y}h{length}v{HEIGHT}h-{length}z"
        column += length
    return outlines
