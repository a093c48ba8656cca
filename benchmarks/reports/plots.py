"""Draw recorded rows: time and fraction of the roofline against M, and the fastest backend by layer and M."""

import io
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from moe_dispatch.benchmarks.rows import BenchRow
from moe_dispatch.errors import MoEDispatchError

# Okabe and Ito's palette, which is distinguishable with every kind of colour vision; the markers are in print too.
COLOURS: Final = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#999999",
    "#8C510A",
    "#5E3C99",
)
MARKERS: Final = "osD^vP*XhP"
INK: Final = "#333333"


class PlotsUnavailableError(MoEDispatchError):
    """matplotlib is not installed."""


def draw(rows: Iterable[BenchRow], folder: Path) -> list[Path]:
    """Draw one picture per (workload, dtype), and one map of the fastest backends per dtype.

    Uniform routing only; eager times only for layers without a graph time.

    Args:
        rows: Rows of one machine.
        folder: Folder that the WebP files are written to.

    Returns:
        The files that were written.

    Raises:
        PlotsUnavailableError: matplotlib is missing.
    """
    pyplot = _pyplot()
    best = _best(rows)
    if not best:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted({backend for *_, backend in best})
    style = {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(names)
    }
    layers = sorted({(workload, dtype) for workload, dtype, *_ in best})
    files = [_draw_layer(pyplot, best, layer, style, folder) for layer in layers]
    return files + [_draw_winners(pyplot, best, dtype, style, folder) for dtype in sorted({d for _, d in layers})]


_Best = dict[tuple[str, str, int, str], BenchRow]


def _best(rows: Iterable[BenchRow]) -> _Best:
    """The fastest configuration of each backend at each (workload, dtype, M)."""
    timed = [row for row in rows if row.us is not None and row.routing == "uniform"]
    timed_in_graphs = {(row.workload, row.dtype) for row in timed if row.mode == "graph"}
    best: _Best = {}
    for row in timed:
        if row.mode == "eager" and (row.workload, row.dtype) in timed_in_graphs:
            continue
        key = row.workload, row.dtype, row.M, row.backend
        if key not in best or (row.us or 0.0) < (best[key].us or 0.0):
            best[key] = row
    return best


def _draw_layer(
    pyplot: Any, best: _Best, layer: tuple[str, str], style: dict[str, dict[str, str]], folder: Path
) -> Path:
    chosen = {key: row for key, row in best.items() if key[:2] == layer}
    lines: dict[str, list[BenchRow]] = defaultdict(list)
    for key in sorted(chosen):
        lines[key[3]].append(chosen[key])
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 8), sharex=True, layout="constrained")
    for name, points in lines.items():
        tokens = [row.M for row in points]
        look = {**style[name], "markersize": 5, "linewidth": 1.6}
        above.plot(tokens, [row.us for row in points], label=name, **look)
        below.plot(tokens, [row.fraction for row in points], **look)
    roofline = sorted({row.M: row.roofline_us for row in chosen.values() if row.roofline_us}.items())
    if roofline:
        above.plot(*zip(*roofline, strict=True), color=INK, linestyle="--", linewidth=1, label="roofline")
    first = next(iter(chosen.values()))
    above.set(xscale="log", yscale="log", ylabel="time of the layer, µs")
    above.set_title(
        f"{first.workload} {first.dtype}: {first.machine}, {first.mode}, {first.routing} routing", loc="left", color=INK
    )
    above.legend(frameon=False, fontsize=8, ncols=2)
    below.axhline(1.0, color=INK, linestyle="--", linewidth=1)
    below.set(ylabel="fraction of the roofline", xlabel="tokens M", ylim=(0, None))
    tokens = sorted({row.M for row in chosen.values()})
    below.set_xticks(tokens, [str(M) for M in tokens], rotation=45 if len(tokens) > 10 else 0)
    below.minorticks_off()
    for axes in (above, below):
        axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    path = folder / f"{_file_name(layer[0])}-{layer[1]}.webp"
    _save(figure, path)
    pyplot.close(figure)
    return path


def _draw_winners(pyplot: Any, best: _Best, dtype: str, style: dict[str, dict[str, str]], folder: Path) -> Path:
    winners: dict[tuple[str, int], BenchRow] = {}
    for (workload, kind, M, _), row in best.items():
        if kind == dtype and ((workload, M) not in winners or (row.us or 0.0) < (winners[workload, M].us or 0.0)):
            winners[workload, M] = row
    workloads = sorted({workload for workload, _ in winners}, reverse=True)
    # A calibration refines a layer's boundaries at token counts that other layers lack; their columns would have holes.
    measured = Counter(M for _, M in winners)
    tokens = sorted(M for M in measured if 4 * measured[M] > 3 * len(workloads))
    winners = {(workload, M): row for (workload, M), row in winners.items() if M in tokens}
    figure, axes = pyplot.subplots(
        figsize=(2.6 + 0.62 * len(tokens), 1.9 + 0.46 * len(workloads)), layout="constrained"
    )
    for (workload, M), row in winners.items():
        x, y = tokens.index(M), workloads.index(workload)
        axes.add_patch(pyplot.Rectangle((x, y), 0.96, 0.94, color=style[row.backend]["color"]))
        fraction = "" if row.fraction is None else f"{row.fraction:.2f}"
        axes.text(x + 0.48, y + 0.47, fraction, ha="center", va="center", color="white", fontsize=8)
    axes.set(xlim=(0, len(tokens)), ylim=(0, len(workloads)), xlabel="tokens M")
    axes.set_xticks([x + 0.48 for x in range(len(tokens))], [str(M) for M in tokens])
    axes.set_yticks([y + 0.47 for y in range(len(workloads))], workloads)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    any_row = next(iter(winners.values()))
    axes.set_title(
        f"Fastest in {dtype}, with its fraction of the roofline: {any_row.machine}", loc="left", color=INK, fontsize=10
    )
    names = sorted({row.backend for row in winners.values()})
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=style[name]["color"]) for name in names]
    figure.legend(handles, names, loc="outside lower left", frameon=False, fontsize=8, ncols=4)
    path = folder / f"winners-{dtype}.webp"
    _save(figure, path)
    pyplot.close(figure)
    return path


def _save(figure: Any, path: Path) -> None:
    """Write a lossless WebP of few colours: a quarter of a PNG's size, for pictures that are kept in a repository."""
    from PIL import Image  # which matplotlib needs, too

    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    Image.open(picture).convert("RGB").quantize(12, dither=Image.Dither.NONE).convert("RGB").save(
        path, lossless=True, quality=100, method=6
    )


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in text)


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise PlotsUnavailableError(
            "drawing needs matplotlib, which is not installed: pip install 'moe-dispatch[plots]'"
        ) from error
    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot
