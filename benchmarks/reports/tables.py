"""The tables of docs/performance.md and README.md, as Markdown, made of recorded rows."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from moe_dispatch.benchmarks.baselines import BASELINES
from moe_dispatch.benchmarks.reports.scoreboard import METRICS, Scores, scoreboard
from moe_dispatch.benchmarks.rows import BenchRow
from moe_dispatch.benchmarks.suites import MODELS, REGIONS, SUITES, TOKENS
from moe_dispatch.benchmarks.targets import SCOREBOARD, Target, markdown
from moe_dispatch.problem import DType

DTYPES: Final[tuple[DType, ...]] = ("bf16", "fp8")
# A name without a letter is written out.
LETTERS: Final = {
    "triton_vector": "v",
    "triton_splitk": "s",
    "triton_persistent": "p",
    "gluon_hopper": "g",
    "deep_gemm": "d",
    "torch_grouped": "t",
    "vllm_fused_moe": "m",
    "vllm": "F",
    "vllm_deep_gemm": "D",
    "vllm_triton_kernels": "T",
}
# README.md's example of a layer, candidate by candidate.
EXAMPLE: Final = ("deepseek-v3", "fp8")
EXAMPLE_TOKENS: Final = (1, 64, 1024, 4096, 16384)
EXAMPLE_NAMES: Final = ("triton_splitk", "gluon_hopper", "deep_gemm", "vllm", "vllm_deep_gemm")
# Marks what rests on fewer times than the suite asks for.
INCOMPLETE: Final = "*"
ABSENT: Final = "–"

Grid = Mapping[tuple[str, int], BenchRow]


def tables(rows: Iterable[BenchRow], sweep: Iterable[BenchRow] = ()) -> dict[str, str]:
    """Tables by title.

    Args:
        rows: Rows of the suite ``scoreboard``, of one machine.
        sweep: Rows of a sweep, of one machine; without any, there are no tables of it.

    Raises:
        InvalidInputError: The rows are of several machines.
    """
    rows, sweep = list(rows), list(sweep)
    scores, swept = Scores(rows), Scores(sweep) if sweep else None
    made = {f"Time in µs and fraction of the roofline, {dtype}": _times(scores, dtype) for dtype in DTYPES}
    grids = {dtype: swept.winners(dtype) for dtype in DTYPES} if swept else {}
    made |= {f"The fastest in the sweep, {dtype}": _grid(grid, dtype) for dtype, grid in grids.items() if grid}
    made["Geometric means of the fractions"] = _means(scores, swept)
    made["Targets"] = markdown(scoreboard(rows))
    made["{}, {}: µs by candidate".format(*EXAMPLE)] = _example(scores)
    made["Letters"] = ", ".join(f"{letter} `{name}`" for name, letter in LETTERS.items())
    return made


def _times(scores: Scores, dtype: DType) -> str:
    """The fastest backend and the fastest baseline by model and M."""
    lines = []
    for model in MODELS:
        ours = [_time(scores.fastest((model, M), dtype, "all backends")) for M in TOKENS]
        theirs = [
            _time(scores.fastest((model, M), dtype, "all baselines"), _untimed(scores, model, M, dtype)) for M in TOKENS
        ]
        lines += [[model, *ours], ["– best baseline", *theirs]]
    return _table([dtype.upper(), f"M={TOKENS[0]}", *map(str, TOKENS[1:])], lines)


def _time(row: BenchRow | None, incomplete: bool = False) -> str:
    if row is None or row.us is None:
        return ABSENT
    fraction = f" ({_short(row.fraction)})" if row.fraction else ""
    return f"{_letter(row)} {_us(row.us)}{INCOMPLETE if incomplete else ''}{fraction}"


def _untimed(scores: Scores, model: str, M: int, dtype: DType) -> bool:
    """Whether a baseline of the suite that takes the dtype has no time at a point."""
    names = (name for name in SUITES["scoreboard"].baselines if dtype in BASELINES[name].requirements.dtypes)
    return any(scores.row((model, M), dtype, name) is None for name in names)


def _grid(winners: Grid, dtype: DType) -> str:
    """The fastest backend by workload and M, with its fraction of the roofline."""
    tokens = _common_tokens(winners)
    lines = []
    for workload in sorted({workload for workload, _ in winners}):
        rows = [winners.get((workload, M)) for M in tokens]
        cells = (f"{_letter(row)} {_short(row.fraction) if row.fraction else ''}" if row else ABSENT for row in rows)
        lines.append([workload, *cells])
    return _table([dtype.upper(), *map(str, tokens)], lines, align="---")


def _common_tokens(winners: Grid) -> list[int]:
    """The token counts that most workloads have.

    A calibration refines a layer's boundaries at token counts that other layers lack; their columns would have holes.
    """
    measured = Counter(M for _, M in winners)
    workloads = {workload for workload, _ in winners}
    return sorted(M for M in measured if 4 * measured[M] > 3 * len(workloads))


def _means(scores: Scores, swept: Scores | None) -> str:
    """By dtype and region: what was reached, the target, and the same means of the baselines and of the sweep."""
    lines = []
    for dtype in DTYPES:
        by_tokens = {t.tokens: t for t in SCOREBOARD if t.metric == "roofline fraction" and t.dtype == dtype}
        targets = [by_tokens[tokens] for tokens in REGIONS.values()]
        theirs = [dataclasses.replace(target, ours="all baselines") for target in targets]
        lines += [
            [dtype.upper(), *(_mean(scores, target) for target in targets)],
            ["– target", *(_short(target.limit) for target in targets)],
            ["– best baseline", *(_mean(scores, target) for target in theirs)],
        ]
        if swept:
            lines.append(["– sweep", *(_mean(swept, target) for target in targets)])
    return _table(["", *(f"{region}, M={', '.join(map(str, tokens))}" for region, tokens in REGIONS.items())], lines)


def _mean(scores: Scores, target: Target) -> str:
    result = METRICS[target.metric](scores, target)
    incomplete = result.missing or (
        target.ours == "all baselines"
        and any(_untimed(scores, model, M, target.dtype) for model in MODELS for M in target.tokens)
    )
    return ABSENT if result.value is None else _short(result.value, digits=3) + (INCOMPLETE if incomplete else "")


def _example(scores: Scores) -> str:
    model, dtype = EXAMPLE
    lines = []
    for M in EXAMPLE_TOKENS:
        rows = [scores.row((model, M), dtype, name) for name in EXAMPLE_NAMES]
        times = [row.us if row else None for row in rows]
        least = min((us for us in times if us), default=None)
        cells = [f"**{_us(us)}**" if us and us == least else _us(us) for us in times]
        lines.append([str(M), *cells, _us(next((row.roofline_us for row in rows if row), None))])
    return _table(["tokens", *(f"`{name}`" for name in EXAMPLE_NAMES), "roofline"], lines)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], align: str = "---:") -> str:
    rule = "|".join(["---", *[align] * (len(head) - 1)])
    return "\n".join([_line(head), f"|{rule}|", *map(_line, lines)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def _letter(row: BenchRow) -> str:
    return LETTERS.get(row.backend, row.backend)


def _us(us: float | None) -> str:
    """A time with three digits or all before the point."""
    return ABSENT if us is None else f"{us:.0f}" if us >= 99.95 else f"{us:.1f}"


def _short(fraction: float, digits: int = 2) -> str:
    return f"{fraction:.{digits}f}".removeprefix("0")
