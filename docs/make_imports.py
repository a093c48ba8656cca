"""Draws docs/images/imports.svg: the rooms of the package on their floors, and which imports which, from the sources.

python docs/make_imports.py
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.core.test_imports import FLOORS, imports  # noqa: E402 - found through the line above

BESIDE: Final = ("backends", "policies")
FEWEST: Final = 8  # imports of an arrow: the others hide what matters
MOST_IN_A_ROW: Final = 9
# All lengths in pixels.
WIDTH: Final = 1440
FLOOR_HEIGHT: Final = 64
BOX_HEIGHT: Final = 22
SPACING: Final = 105  # between the middles of two boxes
CROWDED_SPACING: Final = 76
STYLE: Final = (
    "text{font:12px sans-serif;text-anchor:middle;fill:#222}path{stroke:#7a8aa0;marker-end:url(#head)}"
    ".rooms{fill:#e8f0fb;stroke:#44546a;marker:none}.beside{fill:#fff3dd}"
)
HEAD: Final = (
    '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" '
    'markerUnits="userSpaceOnUse" orient="auto"><polygon points="0 0 8 4 0 8" fill="#7a8aa0"/></marker>'
)

Place = tuple[int, int]


def room(module: str) -> str:
    """The room of a module: a folder or a file directly below the package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "moe_dispatch"


def middles() -> dict[str, Place]:
    """Where the middle of each room's box is."""
    floors = [["moe_dispatch" if name == "" else name for name in floor] for floor in FLOORS] + [["benchmarks"]]
    places = {}
    for height, floor in enumerate(reversed(floors)):
        # The rooms of a crowded floor stand in two rows, so that their boxes do not overlap.
        crowded = len(floor) > MOST_IN_A_ROW
        for i, name in enumerate(floor):
            x = WIDTH / 2 + (i - (len(floor) - 1) / 2) * (CROWDED_SPACING if crowded else SPACING)
            y = (height + 0.5) * FLOOR_HEIGHT + (BOX_HEIGHT * 0.65 * (-1) ** i if crowded else 0)
            places[name] = round(x), round(y)
    for x, name in zip((70, WIDTH - 70), BESIDE, strict=True):
        places[name] = x, places["dispatch"][1]
    return places


def box_width(name: str) -> int:
    """The width of a room's box, wide enough for its name in most fonts."""
    return 7 * len(name) + 14


def tip(start: Place, end: Place, name: str) -> Place:
    """Where an arrow meets the border of the box at its end."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    share = min(half / abs(d) for half, d in ((box_width(name) / 2, dx), (BOX_HEIGHT / 2, dy)) if d)
    return round(end[0] - share * dx), round(end[1] - share * dy)


def main() -> None:
    """Draw."""
    places = middles()
    height = (len(FLOORS) + 1) * FLOOR_HEIGHT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" style="background:#fff">',
        f"<style>{STYLE}</style>{HEAD}",
    ]
    arrows = Counter((room(edge.importer), room(edge.imported)) for edge in imports())
    for (start, end), count in sorted(arrows.items()):
        if start != end and {start, end} <= places.keys() and count >= FEWEST:
            (x1, y1), (x2, y2) = places[start], tip(places[start], places[end], end)
            lines.append(f'<path d="M{x1} {y1}L{x2} {y2}" stroke-width="{0.5 + min(count, 30) / 15:.1f}"/>')
    beside = {*BESIDE, "benchmarks"}
    for style, names in (("rooms", places.keys() - beside), ("rooms beside", beside)):
        boxes = ((box_width(name), *places[name]) for name in sorted(names))
        outlines = (f"M{x - w // 2} {y - BOX_HEIGHT // 2}h{w}v{BOX_HEIGHT}h-{w}z" for w, x, y in boxes)
        lines.append(f'<path class="{style}" d="{"".join(outlines)}"/>')
    lines += [f'<text x="{x}" y="{y + 4}">{name}</text>' for name, (x, y) in places.items()]
    (ROOT / "docs/images/imports.svg").write_text("\n".join([*lines, "</svg>", ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
