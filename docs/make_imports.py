"""Draws docs/images/imports.webp: the rooms of the package on their floors, and which imports which, from the sources.

python docs/make_imports.py
"""

import io
import sys
from collections import Counter
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.core.test_imports import FLOORS, imports  # noqa: E402 - found through the line above

BESIDE = ("backends", "policies")
FEWEST = 8  # imports of an arrow: the others hide what matters
MOST_IN_A_ROW = 9


def room(module: str) -> str:
    """The room of a module: a folder or a file directly below the package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "moe_dispatch"


def main() -> None:
    """Draw."""
    floors = [["moe_dispatch" if name == "" else name for name in floor] for floor in FLOORS]
    places = {}
    for height, floor in enumerate(floors):
        # The rooms of a crowded floor stand in two rows, so that their boxes do not overlap.
        crowded = len(floor) > MOST_IN_A_ROW
        for place, name in enumerate(floor):
            raised = 0.2 * (-1) ** place if crowded else 0.0
            places[name] = ((place - (len(floor) - 1) / 2) * (1.1 if crowded else 1.5), height + raised)
    top = len(floors)
    for side, name in zip((-7.2, 7.2), BESIDE, strict=True):
        places[name] = (side, 4.0)
    places["benchmarks"] = (0.0, float(top))
    edges = Counter((room(one.importer), room(one.imported)) for one in imports())
    figure, axes = plt.subplots(figsize=(15, 6.4))
    for (start, end), count in edges.items():
        if start == end or start not in places or end not in places or count < FEWEST:
            continue
        weight = min(count, 30) / 30
        arrow = {
            "arrowstyle": "-|>", "color": "#7a8aa0", "alpha": 0.3 + 0.6 * weight, "lw": 0.5 + 2 * weight,
            "shrinkA": 14, "shrinkB": 14,
        }  # fmt: skip
        axes.annotate("", xy=places[end], xytext=places[start], arrowprops=arrow)
    for name, (x, y) in places.items():
        heavy = name in (*BESIDE, "benchmarks")
        box = {"boxstyle": "round,pad=0.35", "fc": "#fff3dd" if heavy else "#e8f0fb", "ec": "#44546a", "lw": 0.8}
        axes.text(x, y, name, ha="center", va="center", fontsize=9, bbox=box)
    axes.set_xlim(-8.6, 8.6)
    axes.set_ylim(-0.6, top + 0.6)
    axes.axis("off")
    figure.tight_layout(pad=0.2)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=76)
    # With 8 colours it is a sixth of the size.
    few = Image.open(picture).convert("RGB").quantize(8).convert("RGB")
    few.save(ROOT / "docs/images/imports.webp", lossless=True, method=6)


if __name__ == "__main__":
    main()
