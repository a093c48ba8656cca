"""Draw recorded rows: time and fraction of the roofline against M."""

import io
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from moe_dispatch.benchmarks.reports.scoreboard import Scores
from moe_dispatch.benchmarks.reports.speedups import speedup_chart
from moe_dispatch.benchmarks.rows import BenchRow
from moe_dispatch.benchmarks.suites import UNIFORM
from moe_dispatch.errors import InvalidInputError, MoEDispatchError
from moe_dispatch.system.files import write_atomically

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
    """Draw one picture per (workload, dtype), and the speed-up over vLLM.

    Rows of one machine, uniform routing only; eager times only for layers without a graph time. The speed-up is drawn
    where rows are those of a whole suite ``scoreboard``.

    Returns:
        The files that were written.

    Raises:
        PlotsUnavailableError: matplotlib is missing.
        InvalidInputError: The rows are of several machines or hold no time under uniform routing, or the files cannot
            be written.
    """
    pyplot = _pyplot()
    rows = list(rows)
    scores = Scores(rows)
    best = _best(scores)
    try:
        files = _draw(pyplot, best, folder) if best else []
        if chart := speedup_chart(scores):
            files.append(folder / "speedups.svg")
            write_atomically(files[-1], chart)
    except OSError as error:
        raise InvalidInputError(f"pictures cannot be written to {folder} ({error}); --out names a folder") from error
    if not files:
        raise InvalidInputError(
            f"none of the {len(rows)} rows has a time under uniform routing, which is what is drawn"
        )
    return files


def _draw(pyplot: Any, best: "_Best", folder: Path) -> list[Path]:
    names = sorted({backend for *_, backend in best})
    style = {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(names)
    }
    layers = sorted({(workload, dtype) for workload, dtype, *_ in best})
    files: list[Path] = []
    for layer in layers:
        path = folder / f"{_file_name(layer[0])}-{layer[1]}.png"
        while path in files:  # of a name that differs in what a file's name leaves out
            path = path.with_stem(f"{path.stem}_")
        write_atomically(path, _draw_layer(pyplot, best, layer, style))
        files.append(path)
    return files


_Best = dict[tuple[str, str, int, str], BenchRow]


def _best(scores: Scores) -> _Best:
    """The fastest configuration of each backend at each (workload, dtype, M)."""
    uniform = [row for row in scores.best.values() if row.routing == UNIFORM]
    in_graphs = {(row.workload, row.dtype) for row in uniform if row.mode == "graph"}
    drawn = (row for row in uniform if (row.mode == "graph") == ((row.workload, row.dtype) in in_graphs))
    return {(row.workload, row.dtype, row.M, row.backend): row for row in drawn}


def _draw_layer(pyplot: Any, best: _Best, layer: tuple[str, str], style: dict[str, dict[str, str]]) -> bytes:
    """A picture as the content of its file."""
    chosen = {key: row for key, row in best.items() if key[:2] == layer}
    lines: dict[str, list[BenchRow]] = defaultdict(list)
    for key in sorted(chosen):
        lines[key[3]].append(chosen[key])
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 8), sharex=True, layout="constrained")
    for name, points in lines.items():
        tokens = [row.M for row in points]
        look = {**style[name], "markersize": 5, "linewidth": 1.6}
        above.plot(tokens, [row.us for row in points], label=_text(name), **look)
        below.plot(tokens, [row.fraction for row in points], **look)
    roofline = sorted({row.M: row.roofline_us for row in chosen.values() if row.roofline_us}.items())
    if roofline:
        above.plot(*zip(*roofline, strict=True), color=INK, linestyle="--", linewidth=1, label="roofline")
    first = next(iter(chosen.values()))
    above.set(xscale="log", yscale="log", ylabel="time of the layer, µs")
    title = f"{first.workload[:80]} {first.dtype}: {first.machine}, {first.mode}, {first.routing} routing"
    above.set_title(_text(title), loc="left", color=INK)
    above.legend(frameon=False, fontsize=8, ncols=2)
    below.axhline(1.0, color=INK, linestyle="--", linewidth=1)
    below.set(ylabel="fraction of the roofline", xlabel="tokens M", ylim=(0, None))
    tokens = sorted({row.M for row in chosen.values()})
    below.set_xticks(tokens, [str(M) for M in tokens], rotation=45 if len(tokens) > 10 else 0)
    below.minorticks_off()
    for axes in (above, below):
        axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a font lacks a letter of a name, or that names are long
        figure.savefig(picture, dpi=110)
    pyplot.close(figure)
    return picture.getvalue()


def _text(name: str) -> str:
    """A name as matplotlib prints it: dollars are no mathematics, and it has so many letters at most."""
    return "".join(letter if letter.isprintable() else "?" for letter in name[:160]).replace("$", r"\$")


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in ascii(text)[1:-1])[:100]


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise PlotsUnavailableError("drawing needs matplotlib: pip install matplotlib") from error
    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot
