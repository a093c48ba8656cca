"""A bar chart of the speed-up over vLLM by dtype and region of token counts, as an SVG picture."""

import dataclasses
from collections.abc import Iterator
from html import escape
from typing import Final

from moe_dispatch.benchmarks.reports.scoreboard import METRICS, Scores
from moe_dispatch.benchmarks.reports.tables import DTYPES
from moe_dispatch.benchmarks.suites import MODELS, REGIONS
from moe_dispatch.benchmarks.targets import SCOREBOARD, Side
from moe_dispatch.problem import DType

# What vLLM runs, in the words of the legend, and the colour of its bars.
BASELINES: Final[dict[Side, tuple[str, str]]] = {
    "vllm": ("over its fused_experts", "#0072B2"),
    "all baselines": ("over the fastest of its three layers at each point", "#E69F00"),
}
TEXT_STYLE: Final = "text{font:13px sans-serif;fill:#333;text-anchor:middle}.start{text-anchor:start}"
# All lengths in pixels.
LEFT: Final = 20
TOP: Final = 60
GROUP: Final = 120  # a region's bars and the space between regions
BAR: Final = 44
HEIGHT: Final = 200  # of a speed-up of TALLEST
TALLEST: Final = 2.0


def speedup_chart(scores: Scores) -> str | None:
    """Draw the geometric means over the models of the suite ``scoreboard``; None where a point lacks a time."""
    means = list(_means(scores))
    if any(mean is None for *_, mean in means):
        return None
    fused_experts = next(row for row in scores.best.values() if row.backend == "vllm")
    release = fused_experts.versions.get("vllm", "")
    right, bottom = 2 * LEFT + GROUP * len(DTYPES) * len(REGIONS), TOP + HEIGHT
    title = f"Speed-up over vLLM {release} on one {fused_experts.machine}: geometric means over {', '.join(MODELS)}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right} {bottom + 50}" style="background:#fff">',
        f'<style>{TEXT_STYLE}</style><text class="start" x="{LEFT}" y="16">{escape(title)}</text>',
    ]
    for number, (says, colour) in enumerate(BASELINES.values()):
        x = LEFT + 200 * number
        lines.append(f'<path fill="{colour}" d="M{x} 28h14v14h-14z"/>')
        lines.append(f'<text class="start" x="{x + 20}" y="40">{escape(says)}</text>')
    for dtype, region, side, mean in means:
        group = DTYPES.index(dtype) * len(REGIONS) + list(REGIONS).index(region)
        x = LEFT + GROUP * group + (GROUP - 2 * BAR) // 2 + BAR * list(BASELINES).index(side)
        height = round(HEIGHT * min(mean or 0.0, TALLEST) / TALLEST)
        lines.append(f'<path fill="{BASELINES[side][1]}" d="M{x} {bottom - height}h{BAR - 2}v{height}h{2 - BAR}z"/>')
        lines.append(f'<text x="{x + BAR // 2 - 1}" y="{bottom - height - 5}">{mean:.2f}×</text>')
    for group, (dtype, (region, tokens)) in enumerate((d, r) for d in DTYPES for r in REGIONS.items()):
        x = LEFT + GROUP * group + GROUP // 2
        lines.append(f'<text x="{x}" y="{bottom + 18}">{dtype.upper()} {region}</text>')
        lines.append(f'<text x="{x}" y="{bottom + 36}">M={tokens[0]} to {tokens[-1]}</text>')
    even = bottom - round(HEIGHT / TALLEST)
    lines.append(f'<path stroke="#333" stroke-dasharray="4" d="M{LEFT} {even}H{right - LEFT}"/>')
    return "\n".join([*lines, "</svg>\n"])


def _means(scores: Scores) -> Iterator[tuple[DType, str, Side, float | None]]:
    """By dtype, region and what is compared with; None where a point has no time of ours or of vLLM's."""
    mean = next(target for target in SCOREBOARD if target.metric == "speed-up, mean")
    for dtype in DTYPES:
        for region, tokens in REGIONS.items():
            for side in BASELINES:
                target = dataclasses.replace(mean, dtype=dtype, tokens=tokens, ours="all backends", theirs=side)
                result = METRICS[target.metric](scores, target)
                yield dtype, region, side, None if result.missing else result.value
